"""Claims on QLoRA: a base in NF4 against bf16, and a 65B model on one device."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from experiments.common import claims_scores as scores
from experiments.common.claims import POINTS, Claim, Results, Verdict, decide, exact, undecided
from experiments.common.claims_intervals import of_difference

SECTION = "QLoRA"
SOURCE = "Dettmers et al. 2023"
CLOSE = 0.01  # a point
MODEL, DEVICE = "llama-65b", 48e9


def claims() -> tuple[Claim, ...]:
    """All of them."""
    return (
        Claim(
            "6a",
            SECTION,
            "An adapter on a base in NF4 is at most a point below the same on a base in bf16.",
            f"{SOURCE}, table 4",
            "MMLU, mean over LLaMA 7B to 65B: NF4 with double quantisation 53.1, bf16 53.0",
            ("qlora",),
            judge_format,
            "python -m experiments.qlora --model minilm --task {task} --data DIR --seeds 3 "
            "--epochs 2 "
            "--no-dropout --out docs/results/qlora/{task}",
            accepts=lambda r: "nf4" in r.get("runs", {}) and "bf16" in r["runs"],
            wanted=("sst2",),
        ),
        Claim(
            "6b",
            SECTION,
            "A training step of a 65B model fits in less than 48 GB.",
            f"{SOURCE}, abstract",
            "LLaMA-65B on one GPU of 48 GB",
            ("bench_large", "qlora"),
            judge_65b,
            "python -m experiments.qlora --report-65b --out docs/results/qlora/65b",
            accepts=lambda r: _is_account(r) or _is_step(r),
        ),
    )


def judge_format(results: Results) -> Verdict:
    """NF4 less bf16."""
    (result,) = results
    ours = ", ".join(f"{n} {scores.shown(scores.of_run(result, n))}" for n in result["rows"])
    found = of_difference(scores.of_run(result, "nf4"), scores.of_run(result, "bf16"))
    return decide(found, -CLOSE, POINTS, what="NF4 less bf16", ours=ours)


def _is_account(result: Mapping[str, Any]) -> bool:
    """Of `qlora --report-65b`: compiled, not run."""
    return isinstance(result.get("rows"), list)


def _is_step(result: Mapping[str, Any]) -> bool:
    """Of `bench_large`: run on a device."""
    return "held_bytes" in result and result["config"]["model"] == MODEL


def judge_65b(results: Results) -> Verdict:
    """The bytes of a device: at its peak, or as compiled, of which the least counts."""
    (result,) = results
    if _is_step(result):
        return _ran(result)
    rows = [r for r in result["rows"] if r["model"] == MODEL]
    if not rows:
        return undecided("", f"the file has no {MODEL}")
    each = "; ".join(f"{r['title']}: {r['total'] / 1e9:.1f} GB" for r in rows)
    ours = f"{each} (rank {rows[0]['rank']}, 1 x {rows[0]['sequence']} tokens, compiled, not run)"
    fits = sum(r["total"] < DEVICE for r in rows)
    reason = f"{fits} of {len(rows)} ways to keep the optimiser's state stay under 48 GB"
    return exact(fits > 0, ours, reason)


def _ran(result: Mapping[str, Any]) -> Verdict:
    config, peak = result["config"], result["peak_bytes"]
    seconds = statistics.median(result["step_seconds"])
    ours = f"{config['quantize']}, rank {config['rank']}, {config['batch']} x {config['sequence']} "
    ours += f"tokens: {seconds:.2f} s a step"
    if peak is None:
        return undecided(ours, "the device does not tell its peak")
    reason = "the device's peak is below 48 GB" if peak < DEVICE else "its peak is 48 GB or more"
    return exact(peak < DEVICE, f"{ours}, at most {peak / 1e9:.1f} GB of the device", reason)
