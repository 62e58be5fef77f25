"""The main figures of a result, in a few words each, for results that no claim is judged from."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Data = Mapping[str, Any]
MOST = 8  # figures of a result of no form that is known here
SKIPPED = {"config", "machine", "versions", "seeds", "runs", "losses", "answers", "moments"}


def main_figures(experiment: str, data: Data) -> list[tuple[str, str]]:
    """Names and figures; of an unknown form its first numbers."""
    of = FORMS.get(experiment)
    try:
        found = of(data) if of else []
    except (LookupError, TypeError, ValueError):
        found = []  # another form than this experiment's: its numbers are shown as they are
    return found or numbers(data)


def numbers(data: Data) -> list[tuple[str, str]]:
    """The first numbers that stand in a result, by their path."""
    out: list[tuple[str, str]] = []
    for path, value in _walk(data, ""):
        out.append((path, value))
        if len(out) == MOST:
            break
    return out


def _walk(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, int | float):
        yield path, f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
    elif isinstance(value, dict) and "mean" in value:
        spread = f" ± {value['std']:.4g}" if value.get("std") else ""
        yield path, f"{value['mean']:.4g}{spread}"
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in SKIPPED:
                yield from _walk(item, f"{path}, {key}" if path else key)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for i, item in enumerate(value, 1):
            name = str(item.get("title") or item.get("model") or i)
            yield from _walk(item, f"{path}, {name}" if path else name)


def _score(value: Data) -> str:
    spread = f" ± {100 * value['std']:.1f}" if value["std"] else ""
    return f"{100 * value['mean']:.1f}{spread}"


def _glue(data: Data) -> list[tuple[str, str]]:
    metric = next(iter(next(iter(data["metrics"].values()))))
    out = [(f"{name}, {metric}", _score(of[metric])) for name, of in data["metrics"].items()]
    return [*out, ("seeds", str(len(data["seeds"])))]


def _finetune(data: Data) -> list[tuple[str, str]]:
    held = data["held_out"]
    out = [("trained parameters", f"{data['trained']:,}"), ("steps", f"{data['steps']:,}")]
    out.append(("held-out loss before, after", f"{held['loss_before']:.3f}, {held['loss']:.3f}"))
    return out + [(name, f"{x:.1f}") for name, x in (data.get("scores") or {}).items()]


def _peers(data: Data) -> list[tuple[str, str]]:
    out = []
    for r in data["rows"]:
        row = f"{r['model']}, {r['method']}, {r['precision']}, {r['shape']}"
        spans = {"HF PEFT's": (r["ratio_low"], r["ratio"], r["ratio_high"])}
        if r.get("tuned_ratio"):
            spans["the same with our allocator's setting"] = r["tuned_ratio"]
        out += [
            (f"{row}: speed over {of}", f"{middle:.2f} ({low:.2f} to {high:.2f})")
            for of, (low, middle, high) in spans.items()
        ]
    return out


def _steps(data: Data) -> list[tuple[str, str]]:
    out = [
        (f"{name}: ms a step, MiB", f"{r['ms']:,.0f}, {r['mib']:,.0f}")
        for name, r in data["training"].items()
    ]
    tasks = data["config"]["tasks"]
    return out + [
        (f"{name}: speed with {tasks} tasks in a batch over one", f"{r['ratio']:.2f}")
        for name, r in data["many_tasks"].items()
    ]


def _generation(data: Data) -> list[tuple[str, str]]:
    return [
        (f"{data['config']['tokens']} tokens with a cache, ms", f"{data['cached_ms']:,.0f}"),
        ("without, ms", f"{data['plain_ms']:,.0f}"),
        ("times", f"{data['ratio']:.1f}"),
    ]


def _large(data: Data) -> list[tuple[str, str]]:
    milliseconds = 1e3 * statistics.median(data["step_seconds"])
    out = [
        ("parameters, trained", f"{data['parameters']:,}, {data['trained']:,}"),
        ("ms a step", f"{milliseconds:,.0f}"),
        ("tokens a second", f"{data['tokens_per_second']:,.0f}"),
    ]
    if data["peak_bytes"] is not None:
        out.append(("GB of the device at most", f"{data['peak_bytes'] / 1e9:.1f}"))
    if data["mfu"] is not None:
        out.append(("MFU, of the measured rate of products", f"{data['mfu']:.0%}"))
    return out


def _pretrain(data: Data) -> list[tuple[str, str]]:
    return [
        (
            f"{m['family']} {m['size']}, {m['parameters']:,} parameters, {m['steps']:,} steps: "
            "validation loss",
            f"{m['validation'][str(m['steps'])]:.3f}",
        )
        for m in data["models"]
    ]


def _aot(data: Data) -> list[tuple[str, str]]:
    found, estimate = data["bytes_per_device"], data["estimate"]
    return [
        ("devices", f"{data['devices']:,} of {data['chip']['name']}"),
        ("GiB a chip", f"{found['total'] / 2**30:.1f} of {found['limit'] / 2**30:.1f}"),
        ("least seconds of a step", f"{estimate['step_seconds']:.2f}"),
        ("MFU at most", f"{estimate['mfu']:.0%}"),
    ]


def _memory(data: Data) -> list[tuple[str, str]]:
    if "rows" in data:
        held = f"{data['within_10_percent']} of {len(data['rows'])}"
        worst = f"{data['worst']:.1%}"
        return [("accounts within 10% of the compiled step", held), ("furthest off", worst)]
    out = [("GB on each device", f"{data['total'] / 1e9:.2f}")]
    kinds = ", ".join(f"{k} {n / 1e9:.2f}" for k, n in data["bytes_per_device"].items() if n)
    return [*out, ("of it, GB", kinds)]


FORMS: dict[str, Callable[[Data], list[tuple[str, str]]]] = {
    "lora_glue": _glue,
    "finetune": _finetune,
    "bench_peers": _peers,
    "bench_steps": _steps,
    "bench_large": _large,
    "pretrain": _pretrain,
    "bench_generation": _generation,
    "aot": _aot,
    "memory": _memory,
}
