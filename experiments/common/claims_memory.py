"""Claims on memory and communication: ZeRO's stages, and the account of a billion parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.common.claims import Claim, Results, Verdict, exact

SECTION = "Training at scale"
SOURCE = "Rajbhandari et al. 2020"
CLOSE = 0.01  # relative: Adam's counter and the like are not shared
KERNELS = 2  # of a layer, in `experiments.zero`
SHARED = {"parameters": 3, "gradients": 2, "optimiser": 1}  # from which stage on
VOLUME = {0: 2.0, 1: 2.0, 2: 2.0, 3: 3.0}  # elements sent a parameter and step
BYTES = 24.0  # a parameter


def claims() -> tuple[Claim, ...]:
    """All of them."""
    command = "python -m experiments.zero --out docs/results/zero"
    return (
        Claim(
            "9a",
            SECTION,
            "Over N devices ZeRO's stages 1, 2 and 3 leave each an Nth of the optimiser's state, "
            "then of the gradients too, then of the parameters too.",
            f"{SOURCE}, figure 1",
            "mixed precision, 64 devices: 4 times, 8 times and N times less",
            ("zero",),
            judge_memory,
            command,
        ),
        Claim(
            "9b",
            SECTION,
            "Stages 1 and 2 send as much as data parallelism, 2 elements a parameter; stage 3 "
            "sends 3.",
            f"{SOURCE}, section 7",
            "2, 2, 2 and 3 elements a parameter for stages 0 to 3",
            ("zero",),
            judge_volume,
            command,
            accepts=lambda r: bool(r["walks"]),
        ),
        Claim(
            "9c",
            SECTION,
            "Full fine-tuning of a billion parameters in float32 takes about 24 GB.",
            "the rule of thumb for Adam: 4 bytes of weight, 4 of gradient, 8 of state, about 8 of "
            "activations",
            "24 GB",
            ("memory",),
            judge_rule,
            "python -m experiments.memory --params 1e9 --out docs/results/memory/rule",
            accepts=lambda r: (
                r["config"].get("params") is not None
                and r["config"]["precision"] == "float32"
                and r["config"]["devices"] == 1
            ),
        ),
    )


def judge_memory(results: Results) -> Verdict:
    """Each kind's bytes at every stage and number of devices, against whole or an Nth."""
    (result,) = results
    whole = result["shares"]["0"]["1"]
    worst = 0.0
    for stage, shares in result["shares"].items():
        for n, kinds in shares.items():
            for kind, found in kinds.items():
                part = int(n) if int(stage) >= SHARED[kind] else 1
                worst = max(worst, abs(found / (whole[kind] / part) - 1))
    most = max(result["shares"]["0"], key=int)
    ours = ", ".join(
        f"stage {s}: {sum(shares[most].values()) / 1e9:.2f} GB"
        for s, shares in result["shares"].items()
    )
    return exact(
        worst <= CLOSE,
        f"{ours} on each of {most} devices, of {sum(whole.values()) / 1e9:.2f} GB",
        f"the stages' shardings are off the rule by {worst:.2%} at most",
    )


def judge_volume(results: Results) -> Verdict:
    """Elements that the compiled step gathers and reduces, a parameter."""
    (result,) = results
    found = {int(s): sent(result, int(s)) for s in result["walks"]}
    ours = ", ".join(f"stage {s}: {x:.2f}" for s, x in found.items())
    return exact(
        all(abs(x - VOLUME[s]) <= CLOSE for s, x in found.items()),
        f"{ours} elements sent a parameter",
        "each gather and reduction of a kernel is counted in the compiled program; a reduction "
        "that leaves gradients whole counts twice, as it gathers them again",
    )


def sent(result: Mapping[str, Any], stage: int) -> float:
    """Elements sent a parameter, in units of all parameters."""
    kernels = KERNELS * result["config"]["layers"]
    moments = result["walks"][str(stage)]["moments"]
    gathers = [m for m in moments if m["what"] == "gather"]
    # Inside a layer it is one kernel; outside, one of all layers at once.
    units = sum(1 if m["layer"] else result["config"]["layers"] for m in gathers)
    reductions = [m for m in moments if m["what"] == "reduce" and m["layer"]]
    whole = result["shares"]["0"]["1"]["gradients"]
    kept = max((m["live"]["gradients"] for m in reductions), default=0)
    return (units + len(reductions) * (2 if kept >= whole else 1)) / kernels


def judge_rule(results: Results) -> Verdict:
    """The account's bytes a parameter."""
    (result,) = results
    count, kinds = result["config"]["params"], result["bytes_per_device"]
    parts = ", ".join(f"{k} {n / 1e9:.1f}" for k, n in kinds.items() if n)
    each = result["total"] / count
    return exact(
        abs(each / BYTES - 1) <= CLOSE,
        f"{result['total'] / 1e9:.1f} GB for {count:,.0f} parameters: {parts}",
        f"{each:.1f} bytes a parameter; this is the rule's own arithmetic, and activations go with "
        "the batch: memory --check sets accounts beside compiled programs",
    )
