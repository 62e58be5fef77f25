"""What cannot be is told before anything is claimed, thrown away or trained."""

import dataclasses
import io
import json
import pathlib

import pytest
from rich.console import Console

from experiments import (
    attention_cost,
    bench_generation,
    bench_pipeline,
    bench_steps,
    by_size,
    compare_methods,
    dylora,
    finetune,
    in_context,
    intrinsic_dimension,
    longlora,
    lora_glue,
    lora_plus,
    lora_rank,
    lora_rank_decoder,
    precision,
    prompt_tuning,
    step_cost,
)
from experiments.common.command import USER_ERRORS
from experiments.common.options import at_least, one_or_more
from tests.experiments.pretended import pretend
from tests.tiny import write_model, write_task


@pytest.fixture
def made(tmp_path):
    """Options of a small run on a model 16 wide, which reads 24 tokens."""
    return {
        "model": str(write_model(tmp_path / "model")),
        "data": write_task(tmp_path / "task"),
        "out": tmp_path / "out",
        "task": "sst2",
        "epochs": 1,
        "batch": 8,
        "length": 12,
        "words": (5, 18),
    }


def run(module, options):
    console = Console(file=io.StringIO(), width=200)
    return module.main(module.Config(**options), console)


def stand(out):
    """A finished run, as far as its files go."""
    out.mkdir()
    for name in ("config.json", "result.json"):
        (out / name).write_text("{}")


def stands(out):
    """Whether it is there as it was."""
    return all((out / n).read_text() == "{}" for n in ("config.json", "result.json"))


def over(made):
    """Options that throw away what is there."""
    return {"out": made["out"], "overwrite": True}


ENDS = {
    "data": (lora_glue, {"data": pathlib.Path("/no/such")}, "there is no such folder"),
    "model": (lora_glue, {"model": "/no/such/model"}, "there is no such directory"),
    "targets": (lora_glue, {"targets": ("qeury",)}, "matches no parameter"),
    "rank": (lora_glue, {"rank": 17}, "rank 17 is above the size"),
    "prompt": (lora_glue, {"method": "prompt", "prompt": 22}, "22 virtual tokens leave 2 of the"),
    "mesh": (lora_glue, {"mesh": "fsdp=8", "batch": 12}, "8 devices cannot share evenly"),
    "parts": (lora_glue, {"accumulate": 3}, "--accumulate 3: a batch of 8 rows has no such parts"),
    "ranks": (lora_rank, {"ranks": (1, 17)}, "rank 17 is above the size"),
    "dims": (intrinsic_dimension, {"dims": (40, 1)}, "d=1 leaves nothing .* choose a larger d"),
    "lengths": (prompt_tuning, {"lengths": (1, 30)}, "30 virtual tokens leave 0 of the 24"),
    "window": (lora_plus, {"ratios": (1.0, 4.0)}, "--window 20: a run has 5 steps"),
    "plain": (lora_plus, {"ratios": (4.0,)}, "1 is what the others are held against"),
    "cut": (dylora, {"rank": 17}, "rank 17 is above the size"),
}  # fmt: skip


@pytest.mark.parametrize("what", ENDS)
def test_a_run_that_cannot_begin_loses_and_claims_nothing(what, made, monkeypatch):
    module, options, told = ENDS[what]
    monkeypatch.setattr(lora_glue, "run_seed", lambda *args: pytest.fail("it trains"))
    for overwrite in (False, True):
        with pytest.raises(USER_ERRORS, match=told):
            run(module, made | options | {"overwrite": overwrite})
        assert not made["out"].exists()
    stand(made["out"])
    with pytest.raises(USER_ERRORS, match=told):
        run(module, made | options | {"overwrite": True})
    assert stands(made["out"])


@pytest.mark.parametrize(
    ("module", "options", "told"),
    [
        (finetune, {"method": "lora", "rank": 100}, "rank 100 is above the size"),
        (finetune, {"task": "gsm8k", "data": pathlib.Path("/no/such")}, "/no/such"),
        (finetune, {"accumulate": 3}, "--accumulate 3: a batch of 16 rows"),
        (lora_rank_decoder, {"ranks": (1, 100)}, "rank 100 is above the size"),
    ],
)
def test_a_decoder_that_cannot_begin_loses_nothing(module, options, told, made):
    stand(made["out"])
    with pytest.raises(USER_ERRORS, match=told):
        run(module, options | over(made))
    assert stands(made["out"])


def test_data_that_are_not_there_throw_away_no_model_s_answers(made):
    stand(made["out"])
    with pytest.raises(USER_ERRORS, match="there is no such folder"):
        run(in_context, {"data": pathlib.Path("/no/such"), "task": "sst2"} | over(made))
    assert stands(made["out"])


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (longlora, {}),
        (attention_cost, {}),
        (bench_steps, {}),
        (bench_generation, {"model": pathlib.Path("no/such")}),
        (step_cost, {}),
        (precision, {}),
    ],
)
def test_a_result_that_stands_is_not_written_over(module, options, made):
    stand(made["out"])
    with pytest.raises(ValueError, match="holds a result: pass --overwrite"):
        run(module, options | {"out": made["out"]})
    assert stands(made["out"])


def test_going_on_and_throwing_away_are_one_too_many(made):
    stand(made["out"])
    with pytest.raises(ValueError, match="--resume goes on .* --overwrite throws it away"):
        run(lora_glue, made | {"resume": True, "overwrite": True})
    assert stands(made["out"])


@pytest.mark.parametrize(
    "option",
    [
        {"max_steps": 0}, {"max_steps": -5}, {"epochs": 0}, {"seeds": 0}, {"seeds": -1},
        {"batch": 0}, {"batch": -3}, {"length": 0}, {"save_every": 0}, {"accumulate": 0},
    ],
)  # fmt: skip
@pytest.mark.parametrize("module", [lora_glue, compare_methods, bench_pipeline])
def test_numbers_that_train_nothing_are_refused(module, option, made):
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} {value}: at least"):
        run(module, made | option)
    assert not made["out"].exists()


@pytest.mark.parametrize(
    "option",
    [
        {"max_steps": 0}, {"epochs": -1}, {"batch": 0}, {"length": 0}, {"limit": 0},
        {"limit": -1}, {"held_out": 0}, {"generate": -1}, {"beams": 0}, {"new_tokens": 0},
        {"save_every": 0}, {"accumulate": 0},
    ],
)  # fmt: skip
def test_numbers_that_finetune_cannot_take_are_refused(option, made):
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} {value}: at least"):
        run(finetune, option | {"out": made["out"]})
    assert not made["out"].exists()


@pytest.mark.parametrize(
    ("module", "option"),
    [
        (lora_plus, "ratios"),
        (lora_rank, "ranks"),
        (lora_rank, "weights"),
        (compare_methods, "methods"),
        (intrinsic_dimension, "dims"),
        (attention_cost, "lengths"),
        (by_size, "dims"),
        (prompt_tuning, "lengths"),
        (prompt_tuning, "starts"),
    ],
)
def test_a_sweep_over_nothing_is_refused(module, option, made):
    with pytest.raises(ValueError, match=f"--{option}: one or more, each once"):
        run(module, (made if issubclass(module.Config, lora_glue.Config) else {}) | {option: ()})


@pytest.mark.parametrize("option", ["lengths", "heads", "width"])
def test_attention_over_nothing_is_refused(option):
    values = {"lengths": (2048, 0), "heads": 0, "width": 0}
    with pytest.raises(ValueError, match=f"--{option} 0: at least 1"):
        run(attention_cost, {option: values[option]})


@pytest.mark.parametrize("module", [intrinsic_dimension, prompt_tuning, by_size])
def test_no_epochs_of_full_fine_tuning_are_refused(module, made):
    made = {k: v for k, v in made.items() if module is not by_size or k != "model"}
    with pytest.raises(ValueError, match="--full-epochs 0: at least 1"):
        run(module, made | {"full_epochs": 0})


def test_least_numbers_and_lists():
    @dataclasses.dataclass(frozen=True)
    class Options:
        save_every: int | None = None
        ranks: tuple[int, ...] = (1, 2)

    at_least(Options(), save_every=1, ranks=1)
    one_or_more(Options(), "ranks")
    with pytest.raises(ValueError, match="^--save-every -1: at least 1$"):
        at_least(Options(save_every=-1), save_every=1)
    with pytest.raises(ValueError, match="^--ranks 1: at least 2$"):
        at_least(Options(), ranks=2)
    with pytest.raises(ValueError, match="^--ranks 1 1: one or more, each once$"):
        one_or_more(Options(ranks=(1, 1)), "ranks")


def test_finished_runs_are_kept_when_what_is_swept_changes(made, monkeypatch):
    seen = pretend(monkeypatch, lambda config, seed: 0.5)
    run(lora_rank, made | {"ranks": (1, 4), "weights": ("q",)})
    assert list(seen) == ["q_r1", "q_r4"]
    (made["out"] / "result.json").unlink()
    seen.clear()
    result = run(lora_rank, made | {"ranks": (1, 2), "weights": ("q", "q,v"), "resume": True})
    assert list(seen) == ["q_r2", "qv_r1", "qv_r2"]
    assert json.loads((made["out"] / "result.json").read_text())["scores"] == result["scores"]
