"""The benchmarks of generation and of attention, small."""

import io
import json

import pytest
from rich.console import Console

from experiments import attention_cost, bench_generation


def said(main, config):
    out = io.StringIO()
    return main(config, Console(file=out, width=200)), out.getvalue()


def test_shifted_attention_is_linear_and_whole_is_not(tmp_path):
    config = attention_cost.Config((128, 512), 64, 2, 8, tmp_path / "out")
    result, text = said(attention_cost.main, config)
    full, shifted = (
        [result["rows"][k][t]["flops"] for t in ("128", "512")] for k in ("full", "shifted")
    )
    assert full[1] > 12 * full[0]
    assert shifted[1] < 4.4 * shifted[0]
    assert "groups of 64" in text
    assert json.loads((tmp_path / "out" / "result.json").read_text())["rows"] == result["rows"]


def test_generation_both_ways(data, tmp_path):
    path = data / "weights" / "stories260K" / "stories260K.bin"
    config = bench_generation.Config(path, tokens=12, rounds=1, out=tmp_path / "out")
    result, text = said(bench_generation.main, config)
    assert result["config"]["model"] == "stories260K.bin"
    assert "12 tokens" in text
    assert (tmp_path / "out" / "result.json").is_file()


def test_no_model_is_told(tmp_path):
    with pytest.raises(ValueError, match="is not a directory"):
        bench_generation.main(bench_generation.Config(tmp_path / "none"), Console(quiet=True))
