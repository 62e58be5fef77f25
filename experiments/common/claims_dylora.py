"""Claims on DyLoRA: the quality of every rank from one run, and its time against a search."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from experiments.common import claims_scores as scores
from experiments.common.claims import POINTS, TIMES, Claim, Results, Verdict, decide
from experiments.common.claims_intervals import of_mean

SECTION = "DyLoRA"
SOURCE = "Valipour et al. 2023"
CLOSE = 0.01  # a point
COMMAND = (
    "python -m experiments.dylora --task {task} --data DIR --seeds 3 --rank 8 "
    "--out docs/results/dylora/{task}"
)


def claims() -> tuple[Claim, ...]:
    """All of them."""
    return (
        _claim(
            "5c",
            "One DyLoRA run is at every rank at most a point below LoRA trained at that rank.",
            "RoBERTa-base, mean over GLUE, rank 8: 85.44 against LoRA's 85.27",
            judge_apart,
        ),
        _claim(
            "5d",
            "At rank 1 DyLoRA is above a LoRA of the largest rank that is cut to it.",
            "RoBERTa-base, mean over GLUE, rank 1: 84.22 against 54.90",
            judge_cut,
        ),
        _claim(
            "5e",
            "One DyLoRA run is faster than a search over ranks, by at least half as many times as "
            "there are ranks.",
            "4 to 7 times faster than a search over ranks",
            judge_time,
        ),
    )


def _claim(id: str, sentence: str, figure: str, judge: Any) -> Claim:
    return Claim(
        id, SECTION, sentence, SOURCE, figure, ("dylora",), judge, COMMAND, wanted=("sst2",)
    )


def ranks_of(result: Mapping[str, Any]) -> list[int]:
    """The ranks at which LoRA was trained, ascending."""
    return sorted(int(n.removeprefix("lora_r")) for n in result["runs"] if n.startswith("lora_r"))


def at_rank(result: Mapping[str, Any], run: str, rank: int) -> scores.Seeds:
    """Scores by seed of a run used at a rank."""
    metric = scores.metric_of(result["runs"][run])
    return {s["seed"]: s["by_rank"][str(rank)][metric] for s in result["runs"][run]["seeds"]}


def _ours(result: Mapping[str, Any]) -> str:
    ranks = ranks_of(result)
    return "; ".join(
        f"rank {r}: DyLoRA {scores.shown(at_rank(result, 'dylora', r))}, "
        f"LoRA {scores.shown(scores.of_run(result, f'lora_r{r}'))}, "
        f"LoRA cut {scores.shown(at_rank(result, f'lora_r{ranks[-1]}', r))}"
        for r in ranks
    )


def judge_apart(results: Results) -> Verdict:
    """At the rank where DyLoRA is furthest below: DyLoRA less LoRA."""
    (result,) = results
    each = {
        r: scores.less(at_rank(result, "dylora", r), scores.of_run(result, f"lora_r{r}"))
        for r in ranks_of(result)
    }
    found = {r: of_mean(list(x.values()), "seeds, paired") for r, x in each.items()}
    # The claim is of every rank: one that is below for certain decides, else the one whose interval
    # reaches lowest.
    worst = min(
        found, key=lambda r: (0, 0.0) if (x := found[r]) is None else (x.high >= -CLOSE, x.low)
    )
    what = f"DyLoRA less LoRA at rank {worst}, the least favourable"
    return decide(found[worst], -CLOSE, POINTS, what=what, ours=_ours(result))


def judge_cut(results: Results) -> Verdict:
    """At the lowest rank: DyLoRA less the largest LoRA cut to it."""
    (result,) = results
    low, high = min(ranks_of(result)), max(ranks_of(result))
    each = scores.less(at_rank(result, "dylora", low), at_rank(result, f"lora_r{high}", low))
    found = of_mean(list(each.values()), "seeds, paired")
    what = f"rank {low}, DyLoRA less LoRA of rank {high} cut"
    return decide(found, 0.0, POINTS, what=what, ours=_ours(result))


def judge_time(results: Results) -> Verdict:
    """Seconds of training of LoRA at every rank over those of the DyLoRA run, by seed."""
    (result,) = results
    ranks = ranks_of(result)

    def seconds(run: str) -> dict[int, float]:
        return {s["seed"]: s["steps"] * s["step_seconds"] for s in result["runs"][run]["seeds"]}

    one, each = seconds("dylora"), [seconds(f"lora_r{r}") for r in ranks]
    shared = sorted(set(one).intersection(*each))
    times = [math.log(sum(x[s] for x in each) / one[s]) for s in shared]
    found = of_mean(times, "seeds, paired")
    whole = {k: f"{x:,.0f} s" for k, x in result["seconds"].items()}
    ours = f"all runs: DyLoRA {whole['dylora']}, LoRA at {len(ranks)} ranks "
    ours += whole["lora at every rank"]
    shown = None if found is None else found.map(math.exp)
    line = len(ranks) / 2
    return decide(shown, line, TIMES, what="faster by", ours=ours)
