"""The comparison with HF PEFT: rows, errors, figures."""

import dataclasses
import json
from importlib.util import find_spec

import jax
import pytest
from flax import nnx
from rich.console import Console

from experiments import bench_peers
from experiments.common import peer_cases, peer_measure, peer_model, peer_ours, peer_shown, trace
from experiments.common.models import STRAIGHT, ModelError, machine_layout
from experiments.common.peer_cases import Case, Generation, preset, product
from experiments.common.peer_flops import forward_flops, products, rate_sizes, step_flops
from experiments.common.peer_measure import Options, Row, agree, ratios, speed_of
from experiments.common.peer_ours import Ours
from experiments.common.peers import DisagreementError, PeerError, environment
from experiments.common.runtime import malloc_environment
from jpeft.hf import save_model
from jpeft.models.gpt2 import Gpt2, Gpt2Config
from jpeft.models.llama import Llama, LlamaConfig
from tests.tiny import SHAPE, write_model

LLAMA = LlamaConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A tiny classifier's directory."""
    return write_model(tmp_path_factory.mktemp("peers") / "bert")


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
    """Directories of a tiny Llama and a tiny GPT-2."""
    folder = tmp_path_factory.mktemp("peers")
    save_model(Llama(LLAMA, rngs=nnx.Rngs(0)), folder / "llama")
    shape = Gpt2Config(vocab_size=40, n_positions=64, n_embd=16, n_layer=2, n_head=2)
    save_model(Gpt2(shape, rngs=nnx.Rngs(0)), folder / "gpt2")
    return folder


def sides(directory, method, precision="fp32", generation=None, batch=4, length=4):
    """Both sides of a row in this process, loaded."""
    pytest.importorskip("torch", reason="needs the interop extra")
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from experiments.common.peer_ours import Ours
    from experiments.common.peer_theirs import Theirs

    case = Case(str(directory), method, precision, batch, length)
    job = dataclasses.asdict(case) | {
        "directory": str(directory),
        "cache": jax.config.jax_compilation_cache_dir,
        "threads": 1,  # as a busy machine runs it best
        "device": "cpu",
        "compiled": False,
        "generation": None if generation is None else dataclasses.asdict(generation),
    }
    made = {"jpeft": Ours(job), "peft": Theirs(job)}
    for side in made.values():
        side.load()
    return made


@pytest.mark.interop
@pytest.mark.xdist_group("peers")
@pytest.mark.parametrize("method", peer_cases.METHODS)
def test_every_method_agrees_with_the_peer_on_an_encoder(bert, method, tmp_path):
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
        # Rows of whole blocks: of others its kernel for AVX-512 makes wrong numbers.
        bert = write_model(tmp_path / "wide", hidden_size=64, intermediate_size=128)
    both = sides(bert, method)
    losses = [{name: side.step() for name, side in both.items()} for _ in range(3)]
    agree(losses[0], "fp32")
    for name in both:
        assert losses[0][name] > losses[2][name] > 0
    if method in ("full", "adapter", "prefix"):  # LoRA's starts are drawn by each side
        agree(losses[2], "fp32")
    if method == "prefix":
        evaluated = {name: side.evaluate() for name, side in both.items()}
        agree(evaluated, "fp32")
        assert evaluated["jpeft"] < losses[2]["jpeft"]


@pytest.mark.interop
@pytest.mark.xdist_group("peers")
@pytest.mark.parametrize(("name", "method"), [("llama", "lora_all"), ("gpt2", "prefix")])
def test_decoders_agree_and_generate(decoders, name, method):
    both = sides(decoders / name, method, generation=Generation(3, 5, 4), batch=2, length=8)
    agree({side: run.step() for side, run in both.items()}, "fp32")
    assert {side: run.generate() for side, run in both.items()} == {"jpeft": 15, "peft": 15}
    memory = both["jpeft"].memory(0.0)
    assert memory["program_mib"] > 0
    profile = both["jpeft"].profile(steps=2)
    assert set(profile) == set(trace.KINDS)
    assert profile["matrix products"] > 0
    assert all(side.rate(8, 4, 6) > 0 for side in both.values())


@pytest.mark.interop
@pytest.mark.slow
def test_the_whole_command(bert, tmp_path, monkeypatch):
    monkeypatch.setattr(peer_measure, "malloc_environment", dict)  # the peer in one setting
    for name in ("torch", "transformers", "peft"):
        pytest.importorskip(name)
    options = {"models": (str(bert),), "shapes": ("4x8",), "out": tmp_path / "out"}
    config = bench_peers.Config(**options, rounds=2, steps=1, threads=1)
    console = Console(record=True, width=120)
    (row,) = bench_peers.main(config, console)
    text = console.export_text()
    assert "memory of a training step" in text
    assert "4x8" in text
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["finished"]
    (saved,) = result["rows"]
    assert saved["tokens_per_second"] == row.tokens_per_second
    assert saved["ratio_low"] <= saved["ratio"] <= saved["ratio_high"]
    assert set(saved["start"]) == {"jpeft", "jpeft_warm", "peft"}
    assert all(s > 0 for parts in saved["start"].values() for s in parts.values())
    assert saved["eval"]["tokens_per_second"]["peft"] > 0
    assert saved["program_mib"] > 0
    assert saved["matrix_flops_per_second"] == max(saved["matrix_rates"].values())
    for side, mfu in saved["mfu"].items():
        speed = saved["tokens_per_second"][side]
        wanted = speed * saved["flops_per_token"]
        assert mfu * saved["matrix_flops_per_second"] == pytest.approx(wanted)
    with pytest.raises(ValueError, match="--overwrite"):
        bench_peers.main(config, Console(quiet=True))


def row_of(case):
    """A row as if measured."""
    own = {"jpeft": [4.0, 6.0, 9.0], "peft": [2.0, 2.0, 2.0], "peft_tuned": [3.0, 3.0, 3.0]}
    speed = speed_of(own)
    return Row(
        model=case.model,
        method=case.method,
        precision=case.precision,
        shape=case.shape,
        tokens_per_second=speed.tokens_per_second,
        ratio=speed.ratio,
        ratio_low=speed.ratio_low,
        ratio_high=speed.ratio_high,
        compiled_ratio=None,
        tuned_ratio=speed.tuned_ratio,
        tuned_memory_ratio=0.75,
        eval=speed,
        generation=None,
        generation_shape=None,
        memory_mib={"jpeft": 2.0, "peft": None},
        memory_ratio=None,
        program_mib=1.0,
        start={"jpeft": {"import": 1.0, "load": 1.0, "first_step": 1.0}},
        first_loss={},
        last_loss={},
        mfu={"jpeft": 0.5, "peft": 0.25},
        profile=dict.fromkeys(trace.KINDS, 2.0),
    )


@pytest.mark.parametrize("error", [PeerError("no such layer"), DisagreementError("differ")])
def test_a_row_that_cannot_be_measured_is_left_out(monkeypatch, tmp_path, error):
    def measured(case, options, folder, tell):
        if case.method == "qlora":
            raise error
        return row_of(case)

    monkeypatch.setattr(bench_peers, "measure", measured)
    monkeypatch.setattr(peer_model, "write", lambda *a: None)
    config = bench_peers.Config(models=("shape",), methods=("qlora", "lora"), out=tmp_path)
    console = Console(record=True, width=120)
    if isinstance(error, DisagreementError):
        with pytest.raises(PeerError, match="shape, qlora, fp32, 32x64: differ"):
            bench_peers.main(config, console)
    else:
        assert [r.method for r in bench_peers.main(config, console)] == ["lora"]
    result = json.loads((tmp_path / "result.json").read_text())
    assert [r["method"] for r in result["rows"]] == ["lora"]
    assert result["left_out"][0]["reason"] == str(error)
    text = console.export_text()
    assert "is left out" in text
    assert "50 / 25" in text  # the shares of the device's rate
    assert text.count("its allocator as ours") >= 3  # the row, training, memory


def test_a_run_that_is_cut_keeps_its_rows(monkeypatch, tmp_path):
    def measured(case, options, folder, tell):
        if case.method == "full":
            raise KeyboardInterrupt
        return row_of(case)

    monkeypatch.setattr(bench_peers, "measure", measured)
    monkeypatch.setattr(peer_model, "write", lambda *a: None)
    config = bench_peers.Config(models=("shape",), methods=("lora", "full"), out=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        bench_peers.main(config, Console(quiet=True))
    result = json.loads((tmp_path / "result.json").read_text())
    assert not result["finished"]
    assert len(result["rows"]) == 1
    assert (tmp_path / "bench_peers.png").exists() == (find_spec("matplotlib") is not None)


def test_no_row_is_begun_when_the_time_is_over(monkeypatch):
    monkeypatch.setattr(bench_peers, "measure", lambda *a: pytest.fail("begun"))
    config = bench_peers.Config(models=("shape",), minutes=0.0)
    with pytest.raises(PeerError, match="no row"):
        bench_peers.main(config, Console(quiet=True))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"models": ("lama-3-8b",)}, ModelError, "did you mean 'llama-3-8b'"),
        ({"methods": ("lora",), "preset": "cpu"}, ValueError, "--preset cpu has rows of its own"),
        ({"shapes": ("32",)}, ValueError, "--shapes 32: this is two numbers"),
        ({"models": ("gpt2",), "shapes": ("1x2000",)}, ValueError, "model's 1024 positions"),
        ({"models": ("gpt2",), "prompt": 1000}, ValueError, "more than the model's 1024"),
        ({"generation": "many"}, ValueError, "--generation many"),
        ({"rounds": 0}, ValueError, "at least 1"),
    ],
)
def test_errors_are_told_before_anything_runs(monkeypatch, options, error, message):
    monkeypatch.setattr(bench_peers, "measure", lambda *a: pytest.fail("it runs"))
    with pytest.raises(error, match=message):
        bench_peers.main(bench_peers.Config(**options), Console(quiet=True))


def test_a_model_of_another_kind_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ModelError, match="is of type 't5'"):
        peer_cases.check_model(str(tmp_path))


def test_a_prefix_needs_positions(bert):
    case = Case(str(bert), "prefix", "fp32", 4, SHAPE["max_position_embeddings"])
    with pytest.raises(ValueError, match="and 20 of the prefix"):
        peer_cases.check(case, {case.model: "bert"}, None)


def test_presets_and_products():
    assert len(preset("cpu")) == 15
    assert {c.model for c in preset("gpu")} == {"llama-3.2-1b", "llama-3-8b"}
    assert bench_peers.cases(bench_peers.Config(), "gpu") == preset("gpu")
    assert not any(c.remat for c in bench_peers.cases(bench_peers.Config(remat="no"), "gpu"))
    made = product(["a"], ["lora", "full"], ["fp32", "bf16"], ["1x2"], False)
    assert [(c.method, c.precision) for c in made][:2] == [("lora", "fp32"), ("full", "fp32")]
    config = bench_peers.Config(models=("shape", "gpt2"))
    assert [c.shape for c in bench_peers.cases(config, "cpu")] == ["32x64", "8x128"]


def test_ratios_are_within_rounds():
    assert ratios([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]) == (2.0, 3.0, 4.0)
    speed = speed_of({"jpeft": [2.0, 4.0], "peft": [1.0, 1.0], "peft_compiled": [2.0, 2.0]})
    assert speed.ratio == 3.0
    assert speed.compiled_ratio == (1.0, 1.5, 2.0)
    assert speed.tuned_ratio is None
    assert speed_of({"jpeft": [3.0], "peft": [1.0], "peft_tuned": [2.0]}).tuned_ratio == (1.5,) * 3


def test_disagreement_is_an_error():
    agree({"jpeft": 1.0, "peft": 1.0005}, "fp32")
    agree({"jpeft": 1.0, "peft": 1.04}, "bf16")
    for wrong in (1.01, float("nan")):
        with pytest.raises(DisagreementError, match="same thing"):
            agree({"jpeft": 1.0, "peft": wrong}, "fp32")


def test_flops_by_method(bert, decoders):
    p = products(bert)
    d, f, n = SHAPE["hidden_size"], SHAPE["intermediate_size"], 8
    # Two layers, of the second's all but keys and values for one token of eight.
    attention = 4 * n * d * (1 + 1 / n)
    forward = 2 * (4 * d * d + 2 * d * f) + 2 * (2 + 2 / n) * d * d + 2 * 2 * d * f / n + attention
    assert forward_flops(p, n) == pytest.approx(forward)
    assert step_flops(p, "full", n) == pytest.approx(3 * forward)
    # The first layer's q, k and v are frozen but for what LoRA adds, and so is what they read.
    frozen = 2 * (forward - attention) + 3 * attention - 2 * 3 * d * d
    lora = frozen + 3 * (2 * 8 * 2 * d) * (1 + 1 / n + 1 + 1)
    assert step_flops(p, "lora", n) == pytest.approx(lora)
    assert step_flops(p, "lora", n, alike=True) == pytest.approx(lora + 2 * 3 * d * d)
    adapters = 3 * 2 * (1 + 1 / n) * (4 * peer_cases.BOTTLENECK * d)
    before = 2 * d * d + 2 * 4 * n * d  # of the first adapter: attention and its product
    assert step_flops(p, "adapter", n) == pytest.approx(frozen - before + adapters)
    assert step_flops(p, "lora_all", n) == step_flops(p, "qlora", n) > lora
    llama = products(decoders / "llama")
    assert llama.head == (16, 40)
    assert llama.linear[1] == (16, 8)
    layers, linear = llama.layers, sum(a * b for a, b in llama.linear)
    whole = layers * (2 * linear + 4 * n * llama.heads) + 2 * 16 * 40
    assert forward_flops(llama, n) == whole
    gpt2 = products(decoders / "gpt2")
    assert [gpt2.linear[i] for i in gpt2.some] == [(16, 48)]


def test_the_product_whose_rate_is_taken(bert):
    widest = (SHAPE["hidden_size"], SHAPE["intermediate_size"])
    assert rate_sizes(products(bert), 24, "cpu") == (24, *widest)
    assert rate_sizes(products(bert), 24, "gpu") == (8192, 8192, 8192)


def test_the_environment_of_a_side(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "a=1")
    assert environment("cpu", 3, tuned=True)["GLIBC_TUNABLES"] == "a=1"
    plain = environment("cpu", 3, tuned=False)
    assert plain["GLIBC_TUNABLES"] == "a=1"  # the user's own is for all sides
    monkeypatch.delenv("GLIBC_TUNABLES")
    assert "GLIBC_TUNABLES" not in environment("cpu", 3, tuned=False)
    own = environment("cpu", 3, tuned=True).get("GLIBC_TUNABLES")
    assert own == malloc_environment().get("GLIBC_TUNABLES")
    assert (plain["OMP_NUM_THREADS"], plain["JAX_PLATFORMS"]) == ("3", "cpu")
    assert environment("gpu", 0, tuned=True)["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"


def test_the_peer_runs_as_it_is_and_with_our_allocator(monkeypatch):
    started = []

    class Fake:
        def __init__(self, side, job):
            started.append(side)
            self.side = side

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def ask(self, command):
            if command == "start":
                return {"start": {"side": self.side}}
            peak = {"jpeft": 3.0, "peft": 4.0, "peft_tuned": 2.0}[self.side]
            return {"peak_mib": peak, "program_mib": 1.0}

    monkeypatch.setattr(peer_measure, "Worker", Fake)
    options = peer_measure.Options(2, 4, 1.0, 0, True, False, "cpu", None)
    monkeypatch.setattr(peer_measure, "malloc_environment", lambda: {"GLIBC_TUNABLES": "x"})
    assert peer_measure.peers_of(options) == ("peft", "peft_tuned", "peft_compiled")
    found, warm = peer_measure._memory(options, {}, {}, lambda _: None)
    assert found == {"jpeft": 3.0, "peft": 4.0, "peft_tuned": 2.0, "program": 1.0}
    assert warm == {"side": "jpeft"}
    assert started == ["jpeft", "peft", "peft_tuned"]
    on_gpu = dataclasses.replace(options, device="gpu", compiled=False)
    assert peer_measure.peers_of(on_gpu) == ("peft",)
    monkeypatch.setattr(peer_measure, "malloc_environment", dict)
    assert peer_measure.peers_of(dataclasses.replace(options, compiled=False)) == ("peft",)
    given = {"jpeft": {"peak_mib": 7.0, "program_mib": 6.0}}
    alone = peer_measure._memory(on_gpu, {}, given, lambda _: None)[0]
    assert alone == {"jpeft": 7.0, "program": 6.0}


def test_a_plot_has_every_row(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [row_of(c) for c in preset("cpu")[:3]]
    peer_shown.draw(tmp_path, rows, "a source", Console(quiet=True))
    assert (tmp_path / "bench_peers.png").stat().st_size > 0
    assert (tmp_path / "bench_peers.svg").stat().st_size > 0


def test_a_compiled_peer_that_fails_is_left_out_and_told():
    class Fake:
        def __init__(self, fails):
            self.fails = fails

        def ask(self, command):
            if self.fails:
                raise PeerError("no compiler")
            return {"seconds": 0.5, "loss": 1.0}

    options = peer_measure.Options(2, 4, 1.0, 0, True, False, "cpu", None)
    notes = []
    workers = {"jpeft": Fake(False), "peft": Fake(False), "peft_compiled": Fake(True)}
    speed = peer_measure._Turns(workers, options, notes).speed("steps", 10)
    # Two steps of half a second fill a turn of one second.
    assert speed.tokens_per_second == {"jpeft": 40.0, "peft": 40.0}
    assert speed.compiled_ratio is None
    assert notes == ["compiled, steps: no compiler"]


def test_layers_are_straight_on_a_gpu_where_a_step_is_run_many_times(monkeypatch):
    assert "unroll" not in machine_layout()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for encoder in (True, False):
        assert machine_layout(encoder) == {}
        assert machine_layout(encoder, long=True, full=True) == {"unroll": STRAIGHT}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_gpus_layout_is_the_same_step(method, tmp_path, monkeypatch):
    save_model(Llama(LLAMA, rngs=nnx.Rngs(0)), tmp_path / "model")
    case = Case("model", method, "fp32", 2, 8)
    options = Options(1, 1, 1.0, 0, False, False, "cpu", None)
    job = peer_measure.job_of(case, options, tmp_path / "model", tmp_path / "cache")
    for name in ("cache_programs", "one_at_a_time"):  # settings of a whole process
        monkeypatch.setattr(peer_ours.runtime, name, lambda *_: None)

    def losses():
        ours = Ours(job)
        ours.load()
        return ours.layout, [ours.step() for _ in range(2)]

    _, expected = losses()
    monkeypatch.setattr(peer_ours, "machine_layout", lambda *_, **__: {"unroll": STRAIGHT})
    other, got = losses()
    assert other == {"unroll": STRAIGHT}
    assert got == pytest.approx(expected, rel=1e-5)
    assert got[0] != got[1]
