"""Claims on LongLoRA: what trained embeddings and norms bring, and what attention costs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from experiments.common.claims import PERCENT, Claim, Results, Verdict, decide, exact, undecided
from experiments.common.claims_intervals import of_mean

SECTION = "LongLoRA"
SOURCE = "Chen et al. 2024"
CLOSE = 0.05  # of full fine-tuning's perplexity
LINEAR, QUADRATIC = 1.1, 1.9  # exponents, at most and at least
COMMAND = (
    "for s in 0 1 2; do python -m experiments.longlora --model stories260K.bin "
    "--vocabulary tok512_stories.bin --data DIR --steps 100 --batch 1 --rows 12 --seed $s "
    "--out docs/results/longlora/seed$s; done"
)
FIGURE = "Llama-2-7B at 32,768 tokens, perplexity: LoRA 11.44, {} full 8.08"


def claims() -> tuple[Claim, ...]:
    """All of them."""
    return (
        Claim(
            "6c",
            SECTION,
            "Trained embeddings and norms beside LoRA lower the perplexity on long texts.",
            f"{SOURCE}, table 2",
            FIGURE.format("with embeddings and norms about full fine-tuning's;"),
            ("longlora",),
            judge_lora,
            COMMAND,
            accepts=lambda r: _has(r, "lora", "longlora"),
            pooled=True,
        ),
        Claim(
            "6d",
            SECTION,
            "LongLoRA's perplexity is at most 5% above full fine-tuning's.",
            f"{SOURCE}, table 2",
            FIGURE.format("LongLoRA about as full;"),
            ("longlora",),
            judge_full,
            COMMAND,
            accepts=lambda r: _has(r, "longlora", "full"),
            pooled=True,
        ),
        Claim(
            "6e",
            SECTION,
            "The cost of shifted attention grows linearly with the text, of whole as its square.",
            f"{SOURCE}, abstract and section 3.2",
            "8,192 tokens cost 16 times as much in whole attention as 2,048",
            ("attention_cost",),
            judge_cost,
            "python -m experiments.attention_cost --out docs/results/attention_cost",
        ),
    )


def _has(result: Mapping[str, Any], *variants: str) -> bool:
    return all(v in result["rows"] for v in variants)


def _perplexity(result: Mapping[str, Any], variant: str) -> float:
    """At the longest context."""
    return result["rows"][variant]["perplexity"][str(max(result["sizes"]["lengths"]))]


def _judged(results: Results, high: str, low: str, line: float) -> Verdict:
    gains = [1 - _perplexity(r, low) / _perplexity(r, high) for r in results]
    ours = ", ".join(
        f"{v} {statistics.fmean(_perplexity(r, v) for r in results):.2f}"
        for v in results[0]["rows"]
    )
    longest = max(results[0]["sizes"]["lengths"])
    ours += f" (perplexity at {longest:,} tokens, seeds: {len(results)})"
    what = f"{low}'s perplexity below {high}'s by"
    return decide(of_mean(gains), line, PERCENT, what=what, ours=ours)


def judge_lora(results: Results) -> Verdict:
    """How far LongLoRA's perplexity is below LoRA's, by seed."""
    return _judged(results, "lora", "longlora", 0.0)


def judge_full(results: Results) -> Verdict:
    """How far LongLoRA's perplexity is below full fine-tuning's, by seed."""
    return _judged(results, "full", "longlora", -CLOSE)


def judge_cost(results: Results) -> Verdict:
    """Exponents of the compiled programs' flops, from the shortest to the longest text."""
    (result,) = results
    short, long = min(result["config"]["lengths"]), max(result["config"]["lengths"])
    if short == long:
        return undecided("", "there is one length alone")

    def growth(kind: str) -> float:
        rows = result["rows"][kind]
        return math.log(rows[str(long)]["flops"] / rows[str(short)]["flops"], long / short)

    whole, shifted = growth("full"), growth("shifted")
    ours = f"flops of {short:,} to {long:,} tokens grow as their power {shifted:.2f} shifted, "
    ours += f"{whole:.2f} whole (groups of {result['config']['group']:,})"
    holds = shifted <= LINEAR and whole >= QUADRATIC
    reason = f"linear is a power of at most {LINEAR}, quadratic of at least {QUADRATIC}"
    return exact(holds, ours, reason)
