"""Claims on the intrinsic dimension of fine-tuning: d90 by size and along pre-training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.common import claims_models as by
from experiments.common import claims_scores as scores
from experiments.common.claims import Claim, Results, Scale, Verdict, decide, undecided
from experiments.common.claims_intervals import Interval, of_mean

SECTION = "Intrinsic dimension"
SHARE = 0.9  # of full fine-tuning's score, which d90 is the dimension for
SMALL = 0.01  # of a model's parameters
COMMAND = (
    "python -m experiments.by_size --kind intrinsic_dimension --task {task} --data DIR --seeds 3"
)
FACTOR = Scale(1, " times", 2, signed=False)
RATIO = Scale(100, "%", 1, signed=False)


def claims() -> tuple[Claim, ...]:
    """All of them."""
    return (
        *(_by_size(kind) for kind in ("SAID", "DID")),
        *(_along(kind) for kind in ("SAID", "DID")),
        Claim(
            "1c",
            SECTION,
            "A random subspace of less than 1% of the parameters reaches 90% of full fine-tuning.",
            "Aghajanyan et al. 2021, table 1",
            "MRPC: d90 of BERT-base 1,608 (SAID) and 1,861 (DID), of about 110,000,000 parameters",
            ("intrinsic_dimension",),
            judge_small,
            "python -m experiments.intrinsic_dimension --model minilm --task {task} --data DIR "
            "--seeds 3 "
            "--dims 50 200 1000 5000 20000 --out docs/results/intrinsic_dimension/{task}",
            wanted=("mrpc",),
        ),
    )


def _by_size(kind: str) -> Claim:
    return Claim(
        f"1a-{kind.lower()}",
        SECTION,
        f"d90 falls as models grow, found with {kind}.",
        "Aghajanyan et al. 2021, figure 3 and table 1",
        "MRPC, SAID (DID): BERT-base 1,608 (1,861), BERT-large 1,037 (2,493), "
        "RoBERTa-base 896 (1,000), RoBERTa-large 207 (322)",
        ("by_size",),
        lambda results: judge_size(results, kind),
        f"{COMMAND} --models MODELS/encoder/*/model --out docs/results/by_size/{{task}}_dimension",
        accepts=lambda r: _dimensions(r) and len(by.last_of_each(r["models"])) > 1,
        wanted=("mrpc", "rte", "sst2"),
    )


def _along(kind: str) -> Claim:
    return Claim(
        f"1b-{kind.lower()}",
        SECTION,
        f"d90 falls along pre-training, found with {kind}.",
        "Aghajanyan et al. 2021, figure 2",
        "falls over 200,000 updates of a RoBERTa-base, on six data sets",
        ("by_size",),
        lambda results: judge_training(results, kind),
        f"{COMMAND} --models MODELS/encoder/16m/step_* --out docs/results/by_size/{{task}}_steps",
        accepts=lambda r: _dimensions(r) and bool(by.along_training(r["models"])),
        wanted=("sst2",),
    )


def _dimensions(result: Mapping[str, Any]) -> bool:
    return result.get("kind") == "intrinsic_dimension"


def judge_size(results: Results, kind: str) -> Verdict:
    """The slope of log d90 over log parameters, by seed."""
    (result,) = results
    models = [m for m in by.last_of_each(result["models"]) if not hollow(m, result)]
    weights = by.weights_of_slope(by.doublings(models), by.families(models))
    each = "; ".join(f"{by.name_of(m)}: {_d90(m, kind)}" for m in models)
    what = "d90 when parameters double"
    lack = "there are fewer than two sizes of one family, or two seeds"
    return _falls([(models, weights)], kind, _ours(each, kind, result), what, lack)


def judge_training(results: Results, kind: str) -> Verdict:
    """The slope of log d90 over the checkpoints' order, by seed, mean over sizes."""
    (result,) = results
    found = by.along_training([m for m in result["models"] if not hollow(m, result)])
    sets = [(ms, by.weights_of_slope([float(i) for i in range(len(ms))])) for ms in found.values()]
    each = "; ".join(
        f"{name}: " + ", ".join(f"{_d90(m, kind)} at {_step(m)}" for m in models)
        for name, models in found.items()
    )
    what = "d90 from one checkpoint to the next"
    lack = "there are fewer than two checkpoints, or seeds"
    return _falls(sets, kind, _ours(each, kind, result), what, lack)


def hollow(model: by.Model, result: Mapping[str, Any]) -> bool:
    """Whether answering the largest class alone reaches d90's mark: then d90 says nothing."""
    trivial = result.get("constant", result.get("majority"))
    return trivial is not None and trivial >= SHARE * model["full"]["mean"]


def _ours(each: str, kind: str, result: Mapping[str, Any]) -> str:
    out = [m for m in result["models"] if hollow(m, result)]
    names = ", ".join(f"{by.name_of(m)} at {_step(m)}" for m in out)
    left = f"; left out, the largest class alone being at 90%: {names}" if out else ""
    return f"{each or 'no model'} ({result['task']}, {kind}{left})"


def _falls(
    sets: Sequence[tuple[Sequence[by.Model], tuple[float, ...] | None]],
    kind: str,
    ours: str,
    what: str,
    lack: str,
) -> Verdict:
    parts: list[tuple[scores.Seeds, scores.Seeds]] = []
    for ms, weights in sets:
        if weights is None:
            return undecided(ours, f"{lack}: no interval")
        parts.append(_slopes(ms, weights, kind))
    sides = list(zip(*parts, strict=True))
    if not sides:
        return undecided(ours, f"{lack}: no interval")
    low, high = (of_mean(list(scores.mean_of(s).values())) for s in sides)
    if low is None or high is None:
        return undecided(ours, f"{lack}: no interval")
    middle = (low.mid + high.mid) / 2
    unsure = "" if low == high else ", from the least to the most that d90 can be"
    # Falling is what is asked for: how many times smaller d90 gets.
    found = Interval(-middle, -high.high, -low.low, low.how + unsure).map(lambda x: 2.0**x)
    return decide(found, 1.0, FACTOR, what=f"{what} falls by", ours=ours)


def _slopes(
    models: Sequence[by.Model], weights: Sequence[float], kind: str
) -> tuple[scores.Seeds, scores.Seeds]:
    # Only some dimensions were tried: both ends of where d90 may be are taken, whichever makes the
    # slope least and most.
    count = min(len(m["d90_seeds"][kind]) for m in models)
    low, high = scores.Seeds(), scores.Seeds()
    for seed in range(count):
        low[seed] = high[seed] = 0.0
        for model, w in zip(models, weights, strict=True):
            products = sorted(w * math.log2(x) for x in _ends(model, kind, seed))
            low[seed] += products[0]
            high[seed] += products[1]
    return low, high


def _ends(model: by.Model, kind: str, seed: int) -> tuple[int, int]:
    """Where a seed's d90 lies: above the last dimension that was tried and did not reach, up to the
    first that did, or up to all parameters.
    """
    d = model["d90_seeds"][kind][seed]
    if d is None:
        return largest(model, kind), model["parameters"]
    return max((x for x in map(int, model["scores"][kind]) if x < d), default=1), d


def largest(model: by.Model, kind: str) -> int:
    """The largest dimension that was tried."""
    return max(int(d) for d in model["scores"][kind])


def _d90(model: by.Model, kind: str) -> str:
    d = model["d90"][kind]
    return f"> {largest(model, kind):,}" if d is None else f"{d:,}"


def _step(model: by.Model) -> str:
    step = model.get("step")
    return "the end" if step is None else f"step {step:,}"


def judge_small(results: Results) -> Verdict:
    """The score in the largest subspace under 1% of the parameters, over full fine-tuning's."""
    (result,) = results
    full = scores.of_run(result, "full")
    count = result["runs"]["full"]["seeds"][0]["trained"]
    tried = sorted({int(d) for scored in result["scores"].values() for d in scored})
    small = [d for d in tried if d < SMALL * count]
    d90 = ", ".join(
        f"{k} {'not reached' if d is None else f'{d:,}'}" for k, d in result["d90"].items()
    )
    ours = f"d90: {d90}; of {count:,} parameters"
    if not small:
        return undecided(ours, f"no subspace of less than {SMALL:.0%} of the parameters was tried")
    constant = result.get("constant")
    if constant is not None and constant >= SHARE * result["full"]["mean"]:
        return undecided(ours, "answering the largest class alone reaches 90% of full fine-tuning")
    sides = [scores.of_run(result, f"{kind}_{small[-1]}") for kind in result["scores"]]
    best = scores.mean_of(sides)
    share = {s: best[s] / full[s] for s in best.keys() & full.keys()}
    what = f"score in {small[-1]:,} dimensions (mean of kinds) over full fine-tuning's"
    return decide(of_mean(list(share.values())), SHARE, RATIO, what=what, ours=ours)
