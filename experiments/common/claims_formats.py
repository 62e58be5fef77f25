"""Claims on number formats: what bf16 can tell apart, and what training in it takes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import ml_dtypes
import numpy as np

from experiments.common.claims import PERCENT, Claim, Results, Verdict, decide, exact
from experiments.common.claims_intervals import of_mean

SECTION = "Number formats"
SOURCE = "Micikevicius et al. 2018"
CLOSE = 0.01  # of float32's loss
COMMAND = (
    "for s in 0 1 2; do python -m experiments.precision --model minilm --task {task} --data DIR "
    "--seed $s --out docs/results/precision/{task}_seed$s; done"
)


def claims() -> tuple[Claim, ...]:
    """All of them."""
    return (
        Claim(
            "8a",
            SECTION,
            "bf16 has float32's range and about two digits: x and x(1 + 2^-7) differ, x and "
            "x(1 + 2^-9) are the same number.",
            "Kalamkar et al. 2019, section 3",
            "8 bits of exponent as float32, 7 of fraction",
            (),
            judge_bits,
            "python -m experiments.report",
        ),
        Claim(
            "8b",
            SECTION,
            "Training in bf16 with float32 masters ends at most 1% above float32's loss.",
            f"{SOURCE}, table 1",
            "fp16 with float32 masters, ResNet-50: 76.04% against 75.92%",
            ("precision",),
            judge_masters,
            COMMAND,
            wanted=("sst2",),
            pooled=True,
        ),
        Claim(
            "8c",
            SECTION,
            "Without masters, numbers of 16 bits lose updates, and training ends at a higher loss.",
            f"{SOURCE}, section 3.1",
            "fp16 alone, a speech model: 80% relative loss of accuracy",
            ("precision",),
            judge_alone,
            COMMAND,
            wanted=("sst2",),
            pooled=True,
        ),
    )


def judge_bits(results: Results) -> Verdict:
    """Every positive normal number of bf16, against a neighbour and a near one."""
    del results
    bf16 = ml_dtypes.bfloat16
    info, whole = ml_dtypes.finfo(bf16), np.finfo(np.float32)
    smallest, largest = float(info.tiny), float(info.max)
    # Positive numbers stand in the order of their bits; the largest one's neighbour is infinity.
    first, last = (int(np.array(v, bf16).view(np.uint16)) for v in (smallest, largest))
    x = np.arange(first, last, dtype=np.uint16).view(bf16).astype(np.float64)
    apart, same = (
        float(np.mean((x * (1 + 2.0**p)).astype(bf16).astype(np.float64) != x)) for p in (-7, -9)
    )
    widths = (info.nexp == whole.nexp, smallest == float(whole.tiny))
    share = largest / float(whole.max)
    ours = (
        f"of {len(x):,} positive numbers {apart:.0%} differ from x(1 + 2^-7) and {same:.0%} from "
        f"x(1 + 2^-9); from {smallest:.2g} to {largest:.3g}, {share:.1%} of float32's largest"
    )
    holds = apart == 1 and same == 0 and all(widths) and share > 0.99
    return exact(holds, ours, "every number was tried when this page was made")


def judge_masters(results: Results) -> Verdict:
    """float32's last loss over that with masters, by seed."""
    return _judged(results, "mixed", -CLOSE, below=True)


def judge_alone(results: Results) -> Verdict:
    """The last loss of bf16 alone over float32's, by seed."""
    return _judged(results, "bfloat16 alone", 0.0, below=False)


def _judged(results: Results, name: str, line: float, below: bool) -> Verdict:
    more = [r["rows"][name]["loss"] / r["rows"]["float32"]["loss"] - 1 for r in results]
    found = of_mean([-x for x in more] if below else more)
    what = f"the loss of {name} is {'below' if below else 'above'} float32's by"
    return decide(found, line, PERCENT, what=what, ours=_ours(results))


def _ours(results: Results) -> str:
    parts: list[str] = []
    for name in results[0]["rows"]:
        rows = [r["rows"][name] for r in results]
        moved: Sequence[float] = [x["moved"] for x in rows if x["moved"] is not None]
        share = f", {statistics.fmean(moved):.1%} moved a step" if moved else ""
        parts.append(f"{name} {statistics.fmean(x['loss'] for x in rows):.4f}{share}")
    return f"last losses: {'; '.join(parts)} (seeds: {len(results)})"
