"""Claims on methods side by side on one task: LoRA, adapters and prompts against full."""

from __future__ import annotations

import functools
from typing import Any

from experiments.common import claims_scores as scores
from experiments.common.claims import POINTS, Claim, Results, Verdict, decide
from experiments.common.claims_intervals import of_difference

SECTION = "Methods side by side"
CLOSE = 0.01  # a point
COMMAND = (
    "python -m experiments.compare_methods --model minilm --task {task} --data DIR "
    "--seeds 3 --epochs 2 "
    "--no-dropout --out docs/results/compare_methods/{task}"
)


def claims() -> tuple[Claim, ...]:
    """All of them."""
    return (
        _claim(
            "10a",
            "LoRA is at most a point below full fine-tuning.",
            "Hu et al. 2022, table 2",
            "RoBERTa-base, mean over GLUE: 87.2 against 86.4; SST-2: 95.1 against 94.8",
            functools.partial(judge_close, method="lora"),
            ("lora", "full"),
        ),
        _claim(
            "10b",
            "Adapters are at most a point below full fine-tuning.",
            "Houlsby et al. 2019, table 1",
            "BERT-large, GLUE: 80.0 against 80.4",
            functools.partial(judge_close, method="adapter"),
            ("adapter", "full"),
        ),
        _claim(
            "10c",
            "Prompt tuning is below full fine-tuning on a small model.",
            "Lester et al. 2021, figure 1",
            "T5-Small to T5-XL stay below full fine-tuning on SuperGLUE",
            judge_prompt,
            ("prompt", "full"),
        ),
    )


def _claim(
    id: str, sentence: str, source: str, figure: str, judge: Any, needs: tuple[str, ...]
) -> Claim:
    return Claim(
        id, SECTION, sentence, source, figure, ("compare_methods",), judge, COMMAND,
        accepts=lambda r: all(n in r["runs"] for n in needs), wanted=("sst2",),
    )  # fmt: skip


def judge_close(results: Results, method: str) -> Verdict:
    """A method less full fine-tuning."""
    (result,) = results
    a, b = scores.of_run(result, method), scores.of_run(result, "full")
    ours = _ours(result, method)
    return decide(of_difference(a, b), -CLOSE, POINTS, what=f"{method} less full", ours=ours)


def judge_prompt(results: Results) -> Verdict:
    """Full fine-tuning less prompt tuning."""
    (result,) = results
    a, b = scores.of_run(result, "full"), scores.of_run(result, "prompt")
    ours = _ours(result, "prompt")
    return decide(of_difference(a, b), 0.0, POINTS, what="full less prompt", ours=ours)


def _ours(result: Any, method: str) -> str:
    sides = [scores.of_run(result, n) for n in (method, "full")]
    metric = scores.metric_of(result["runs"]["full"])
    trained = result["rows"][method]["trained"]
    return (
        f"{method} {scores.shown(sides[0])}, full {scores.shown(sides[1])} ({metric}, "
        f"{scores.seeds(len(sides[0]))}; {trained:,} parameters)"
    )
