"""What the report says in both of its forms: its title, its notes, and lines about a result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.common.report_figures import main_figures
from experiments.common.report_findings import Finding, Judged
from experiments.common.report_read import Result

TITLE = "Claims and results"
REST = "Other results"
NOT_RUN = "not run"
MEANINGS = {
    "reproduced": "the whole 95% interval lies on the claim's side",
    "not reproduced": "the whole interval lies on the other side",
    "not decidable at this scale": "the interval holds the line between both sides, or there are "
    "fewer than two seeds",
    NOT_RUN: "there is no result yet: the command would make one",
}
VERDICTS = tuple(MEANINGS)
INTRODUCTION = (
    "What papers say of parameter-efficient fine-tuning and of training at scale, held against the "
    "results in this repository. Each verdict is computed from the scores of single seeds."
)
NOTES = (
    "Intervals are over seeds (paired where both sides have the same), tasks or prompts, not over "
    "validation examples; what is counted and not sampled has none. The lines that decide, such as "
    "a point below full fine-tuning, are this project's.",
    "In commands DIR is the folder with the task's data (of SST-2 the 6,920 whole sentences, not "
    "GLUE's 67,349 phrases), and MODELS the one that experiments.pretrain wrote its models into. "
    "Where a result does not hold its command, it is made again from the configuration that it "
    "holds.",
)


def word(finding: Finding) -> str:
    """The verdict in words."""
    return NOT_RUN if finding.verdict is None else finding.verdict.kind


def tally(judged: Sequence[Judged]) -> list[tuple[str, int]]:
    """How often there is each verdict."""
    count = Counter(word(f) for j in judged for f in j.findings)
    return [(v, count[v]) for v in VERDICTS]


def sections(judged: Sequence[Judged]) -> dict[str, list[Judged]]:
    """Claims by their section, in order."""
    out: dict[str, list[Judged]] = {}
    for j in judged:
        out.setdefault(j.claim.section, []).append(j)
    return out


def number_of(j: Judged) -> str:
    """A claim's number, as 1a SAID."""
    return j.claim.id.replace("-", " ").replace("said", "SAID").replace("did", "DID")


def where(result: Result) -> str:
    """The machine: processor, memory, accelerators."""
    m = result.data["machine"]
    parts = [f"{m['processor']}, {m['cores']} cores"] if "processor" in m else []
    if "memory_gib" in m:
        parts.append(f"{m['memory_gib']:g} GiB")
    if m.get("platform", "cpu") != "cpu":
        kinds = Counter(m.get("devices", []))
        parts += [kind if n == 1 else f"{n} x {kind}" for kind, n in kinds.items()]
    return ", ".join(parts) or "machine not told"


def date(result: Result) -> str:
    """The day it was run, as its file says."""
    return str(result.data["machine"].get("date", "no date"))


def columns(result: Result, again: Result | None) -> list[tuple[str, ...]]:
    """A result's main figures below a line of heads; with `again` those of another day beside."""
    figures = [main_figures(r.experiment, r.data) for r in (result, again) if r]
    if again is None:
        return [("figure", "value"), *figures[0]]
    later = dict(figures[1])
    head = ("figure", date(result), f"made again {date(again)}")
    return [head, *((k, x, later.get(k, "")) for k, x in figures[0])]


def versions(result: Result) -> str:
    """Versions of what it was run with."""
    found: Mapping[str, Any] = result.data["versions"]
    return ", ".join(f"{name} {version}" for name, version in found.items())


def alt(result: Result, stem: str) -> str:
    """A picture in words."""
    return f"{stem.replace('_', ' ')}: plot of {result.name}"


def first_claims(judged: Sequence[Judged]) -> dict[str, str]:
    """By a result's name the claim that it is first used for: its pictures stand there, once."""
    out: dict[str, str] = {}
    for j in judged:
        for finding in j.findings:
            for result in finding.results:
                out.setdefault(result.name, j.claim.id)
    return out
