"""The QLoRA experiment, quantised bases in the others, and the account of large models."""

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest
from rich.console import Console

import jpeft
from experiments import finetune, lora_glue, qlora
from experiments.common import qlora_account
from tests import tiny

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qlora")
    return tiny.write_model(folder / "model"), tiny.write_task(folder / "task")


def options(places, **more):
    model, task = places
    made = {"task": "sst2", "data": task, "model": str(model), "max_steps": 3, "batch": 8}
    return made | {"buckets": 1} | more


def test_every_base_is_compared(places, tmp_path):
    formats = ("bf16", "nf4")
    config = qlora.Config(
        **options(places), out=tmp_path / "out", rank=4, formats=formats, baseline=False
    )
    rows = qlora.main(config, QUIET)["rows"]
    assert tuple(rows) == formats
    assert all(0 <= r["mean"] <= 1 and r["step_ms"] > 0 for r in rows.values())
    written = json.loads((tmp_path / "out" / "result.json").read_text())
    assert written["rows"]["nf4"]["base_mib"] == rows["nf4"]["base_mib"]
    if importlib.util.find_spec("matplotlib"):
        assert "<svg" in (tmp_path / "out" / "qlora.svg").read_text()
    trained = {r["seeds"][0]["trained"] for r in written["runs"].values()}
    assert len(trained) == 1


def test_the_base_stays_quantised_while_it_is_trained_on(places):
    config = lora_glue.Config(**options(places, quantize="nf4", optimiser="adamw8bit"))
    model = lora_glue.build(config, places[0], 2, 0)
    trainer = lora_glue.trainer_of(config, model, 0, 3)
    kinds = {type(x) for p, x in trainer.frozen.items() if p.endswith("kernel")}
    assert jpeft.Quantized in kinds
    sizes = {x.dtype.name for x in jax.tree.leaves(trainer.frozen) if x.ndim == 3}
    assert sizes == {"uint8"}


def test_what_trains_the_weights_is_refused(places):
    for method in ("full", "said"):
        config = lora_glue.Config(**options(places, quantize="nf4", method=method))
        with pytest.raises(ValueError, match="keeps the model's weights as they are"):
            lora_glue.main(config, QUIET)
    both = lora_glue.Config(**options(places, optimiser="adamw8bit", offload=True))
    with pytest.raises(ValueError, match="use one of the two"):
        lora_glue.main(both, QUIET)
    with pytest.raises(ValueError, match="use --formats"):
        qlora.main(qlora.Config(**options(places, quantize="nf4")), QUIET)


def test_finetune_on_four_bits(tmp_path):
    config = finetune.Config(
        quantize="nf4", method="lora", precision="mixed", offload=True, max_steps=3, batch=4,
        generate=2, new_tokens=4, held_out=4, limit=12, buckets=1, out=tmp_path / "out",
    )  # fmt: skip
    result = finetune.main(config, QUIET)
    assert np.isfinite(result["held_out"]["loss"])
    again = dataclasses.replace(config, quantize=None, offload=False, overwrite=True)
    assert result["losses"] != finetune.main(again, QUIET)["losses"]


@pytest.mark.slow
def test_65_billion_parameters_on_one_device():
    pytest.importorskip("libtpu")
    case = next(c for c in qlora_account.cases() if c.model == "llama-65b" and c.offload)
    # Short rows compile in half the time, and what they have of their own is small in any case.
    found = qlora_account.account(dataclasses.replace(case, sequence=16))
    assert found["parameters"] > 65.2e9
    assert found["bytes"]["frozen"] > 0.5 * found["parameters"]
    assert found["total"] <= 41e9
    # Masters and moments: twelve bytes for each that is trained.
    assert found["host"] == pytest.approx(12 * found["trained"], rel=1e-3)
