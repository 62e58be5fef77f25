"""LoRA+ by ratio: the steps to plain LoRA's last loss."""

import io

import pytest
from rich.console import Console

from experiments import lora_plus
from tests.experiments.pretended import pretend
from tests.tiny import write_model, write_task


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Of eleven steps in windows of three, two of which are left over."""

    def losses(config, seed):
        pace = config.lora_plus + seed / 3
        return [1 / (1 + pace * i) for i in range(9)] + [0.9, 0.9]

    pretend(monkeypatch, lambda config, seed: 0.7, losses)
    config = lora_plus.Config(
        task="sst2",
        model=str(write_model(tmp_path / "model")),
        data=write_task(tmp_path / "task"),
        out=tmp_path / "out",
        length=12,
        max_steps=11,
        seeds=2,
        ratios=(4.0, 1.0, 0.25),
        window=3,
    )
    said = io.StringIO()
    return lora_plus.main(config, Console(file=said, width=120))["rows"], said.getvalue()


def test_plain_lora_reaches_its_own_last_loss_in_its_last_window(rows):
    found, said = rows
    assert [found[r]["steps_to_plain_loss"] for r in ("4", "1", "0.25")] == [6, 9, None]
    assert "not reached" in said


def test_the_last_loss_is_that_of_the_last_whole_window(rows):
    for row in rows[0].values():
        assert round(row["last_loss"], 5) == row["curve"][-1]
        assert row["last_loss"] < 0.5
