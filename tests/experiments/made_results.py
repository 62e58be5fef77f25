"""Results as experiments write them, made of the numbers that a test asks for."""

import json
import pathlib

from experiments.common.report_read import Result

TASKS = ["sst2", "mrpc", "cola", "rte", "qnli"]


def result(name, **data):
    data = {"machine": {}, "versions": {}, "config": {}} | data
    # As it would come from its file: with lists, and names for keys.
    return Result(name, pathlib.Path("results") / name, json.loads(json.dumps(data)), ())


def swept(name, runs, config=None, **data):
    """A sweep's result: runs with a score a seed."""
    made = {
        run: {
            "config": {"method": "lora"},
            "metrics": {"lora": {"accuracy": {}}},
            "seeds": [
                {"seed": i, "validation": {"accuracy": x}, "trained": 1000}
                for i, x in enumerate(scores)
            ],
        }
        for run, scores in runs.items()
    }  # fmt: skip
    return [result(f"{name}/sst2", config={"task": "sst2", **(config or {})}, runs=made, **data)]


def two(name, high, low, **data):
    """Of two runs, one `gap` above the other."""

    def made(gaps):
        return swept(name, {high: [0.8 + g for g in gaps], low: [0.8] * len(gaps)}, **data)

    return made


def scores(values):
    return {"mean": sum(values) / len(values), "std": 0.0, "values": values}


def by_size(kind, models, **data):
    sized = [
        {"family": "encoder", "size": f"{4**k}m", "parameters": 4**k * 10**6, "step": None} | m
        for k, m in enumerate(models)
    ]
    data = {"task": "mrpc", "metric": "accuracy", "models": sized, **data}
    return [result("by_size/x", experiment="by_size", kind=kind, **data)]


def methods(of):
    """Three models, whose scores `of` gives from the gaps by seed and the model's number."""
    return lambda gaps: by_size(
        "methods", [{"scores": {n: scores(x) for n, x in of(gaps, k).items()}} for k in range(3)]
    )


def higher(high, low):
    """Three models, of which one method is above another by the gaps."""
    return methods(lambda gaps, k: {high: [0.7 + g for g in gaps], low: [0.7] * len(gaps)})


def beside(high, low):
    """Two methods side by side."""
    return two("compare_methods", high, low, rows={n: {"trained": 9} for n in (high, low)})


def dimension(kind, steps=False):
    """d90 falls over models, or steps, where a seed's gap is above zero, and grows where below."""

    def made(gaps):
        models = []
        for k in range(3):
            d = [2 ** (8 - k if g > 0 else 8 + k) for g in gaps]
            about = {"size": "4m", "parameters": 10**6, "step": 10 * k} if steps else {}
            models.append(about | {
                "full": scores([0.8] * len(gaps)),
                "scores": {kind: {str(2**i): {} for i in range(2, 11)}},
                "d90": {kind: d[0]}, "d90_seeds": {kind: d},
            })  # fmt: skip
        return by_size("intrinsic_dimension", models)

    return made


def adapters(tasks=TASKS):
    """Adapters over full fine-tuning and over the top layers by the gaps, on every task."""

    def made(gaps):
        runs = {f"{t}_{n}": [0.8] * len(gaps) for t in tasks for n in ("full", "top_1")}
        runs |= {f"{t}_adapter_8": [0.8 + g for g in gaps] for t in tasks}
        rows = (
            {"number": 8, "share": 0.03, "trained": 10},
            {"number": 1, "share": 0.2, "trained": 20},
        )
        points = {"adapter": [rows[0]], "top": [rows[1]]}
        return swept("adapter_size", runs, {"tasks": tasks, "layers": [1]}, points=points)

    return made


def plus(gaps):
    plain = [1 - 0.05 * i for i in range(11)]
    fast = [plain[::2] + [0.0] * 6 if g > 0 else [1.0] * 11 for g in gaps]
    curves = {"1": [plain] * len(gaps), "16": fast}
    rows = {r: {"curves": c, "steps_to_plain_loss": None} for r, c in curves.items()}
    runs = {"ratio_1": [0.8] * len(gaps), "ratio_16": [0.8 + g for g in gaps]}
    return swept("lora_plus", runs, {"window": 20}, rows=rows)


def plus_by_width(gaps):
    """The ratio of the lowest loss grows with the width where a seed's gap is above zero."""
    models = []
    for k in range(3):
        lowest = [(1, 4, 16)[k if g > 0 else 2 - k] for g in gaps]
        curves = {r: [[2.0, 1.0 - (r == at)] for at in lowest] for r in (1, 4, 16)}
        ratios = {str(r): {"curves": c} for r, c in curves.items()}
        models.append({"width": 64 * 2**k, "ratios": ratios})
    return by_size("lora_plus", models)


def answers(gaps, right=0.8):
    """q and v above q alone at rank 1 by the gaps, and rank 1 above rank 8."""
    shared = [right] * len(gaps)
    at = lambda x: {"loss": scores([1.0] * len(x)), "exact": scores(x)}  # noqa: E731
    of = {"q,v": {"1": at([right + g for g in gaps]), "8": at(shared)}, "q": {"1": at(shared)}}
    config = {"task": "wikisql", "model": "decoder/64m/model"}
    return [result("lora_rank_decoder/x", config=config, metric="exact", scores=of)]


def dylora(gaps):
    def at(gap, one, eight, seconds):
        by_rank = {"1": {"accuracy": one + gap}, "8": {"accuracy": eight + gap}}
        return {"by_rank": by_rank, "steps": 10, "step_seconds": seconds}

    made = swept("dylora", dict.fromkeys(("dylora", "lora_r1", "lora_r8"), [0.8] * len(gaps)))[0]
    runs = made.data["runs"]
    for i, g in enumerate(gaps):
        runs["dylora"]["seeds"][i] |= at(g, 0.8, 0.8, 2.0 ** (-4 * g))
        runs["lora_r1"]["seeds"][i] |= at(0, 0.8, 0.8, 0.5)
        runs["lora_r8"]["seeds"][i] |= at(0, 0.8, 0.8, 0.6)
    return [result(made.name, **made.data, seconds={"dylora": 1, "lora at every rank": 2})]


def pooled(name, rows_of, **config):
    """A file a seed."""
    return lambda gaps: [
        result(f"{name}/{i}", config={"seed": i, **config}, rows=rows_of(g), sizes={"lengths": [8]})
        for i, g in enumerate(gaps)
    ]


def longlora(high):
    rows = lambda g: {n: {"perplexity": {"8": 10.0 * (1 - g * (n == "longlora"))}}  # noqa: E731
                      for n in ("longlora", high)}  # fmt: skip
    return pooled("longlora", rows)


def precision(name, sign):
    return pooled("precision", lambda g: {
        "float32": {"loss": 1.0, "moved": 1.0}, name: {"loss": 1.0 + sign * g, "moved": 0.1},
    }, task="sst2")  # fmt: skip


def in_context(of):
    def made(gaps):
        model = {"size": "4m", "tokens_per_prediction": {"0": 9, "16": 90, "peft": 9}}
        data = {"task": "sst2", "majority": 0.5, "models": [model | of(gaps)]}
        return [result("in_context/sst2", **data)]

    return made


def spread(kind):
    # A gap is here how far each of six accuracies is from their mean.
    known = {"k_shot": {"16": scores([0.7, 0.71, 0.72])}}
    return in_context(lambda gaps: known | {kind: {"values": [0.6 + g for g in gaps]}})


def zero(layers=2, kept=5, optimiser=1):
    whole = {"parameters": 8, "gradients": 8, "optimiser": 16}
    first = {"parameters": 3, "gradients": 2, "optimiser": 1}
    shares = {
        str(s): {
            n: {k: x // (int(n) if s >= first[k] else 1) for k, x in whole.items()}
            for n in ("1", "2")
        }
        for s in range(4)
    }  # fmt: skip
    shares["1"]["2"]["optimiser"] *= optimiser
    inside = [{"what": "reduce", "layer": "M0 backward", "live": {"gradients": kept}}] * 2 * layers
    outside = [{"what": "gather", "layer": "", "live": {"gradients": 0}}] * 2
    walks = {"1": {"moments": inside + outside}}
    return [result("zero", config={"layers": layers}, shares=shares, walks=walks)]


def account(*totals):
    rows = [
        {"model": "llama-65b", "title": "x", "total": t, "rank": 64, "sequence": 512}
        for t in totals
    ]
    return [result("qlora/65b", rows=rows)]


def step(peak):
    config = {"model": "llama-65b", "quantize": "nf4", "rank": 64, "batch": 1, "sequence": 512}
    measured = {"held_bytes": {}, "peak_bytes": peak, "step_seconds": [1.0]}
    return [result("bench_large/65b", config=config, **measured)]


def cost(power):
    rows = {
        k: {str(t): {"flops": t**p} for t in (8, 64)} for k, p in (("full", 2), ("shifted", power))
    }
    return [result("attention_cost", config={"lengths": [8, 64], "group": 8}, rows=rows)]


def rule(total):
    config = {"params": 1e9, "precision": "float32", "devices": 1}
    return [result("memory/rule", config=config, total=total, bytes_per_device={"trained": total})]


def tokens(shot):
    model = {"size": "4m", "tokens_per_prediction": {"16": shot, "peft": 9}}
    return [result("in_context/x", models=[model])]
