"""Results made again by their commands, on another day, held against what was stated first."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

from experiments.common import report_words as words
from experiments.common.claims import Verdict
from experiments.common.report_findings import Again, Finding, Judged, verdict_on
from experiments.common.report_read import ReportError, Result

WITHIN = "within the interval"
OUTSIDE = "outside the interval"
SAME = "the same figures"
OTHER = "other figures, and the verdict is another"
ALSO = "other figures, and the same verdict"
NONE = "other figures, and no interval to hold them against"
KINDS = (SAME, WITHIN, OUTSIDE, ALSO, OTHER, NONE)


def by_name(results: Sequence[Result], again: Sequence[Result]) -> dict[str, Result]:
    """What was made again, by its name.

    **Raises:** `ReportError` for one whose name is not among `results`.
    """
    known = {r.name for r in results}
    for r in again:
        if r.name not in known:
            raise ReportError(
                f"{r.path} is no result made again: of {r.name} there is no first result"
            )
    return {r.name: r for r in again}


def held(judged: Sequence[Judged], again: Mapping[str, Result]) -> tuple[Judged, ...]:
    """Findings with what was found again, where each of their results was made again.

    **Raises:** `ReportError` for a result that lacks what a claim reads.
    """
    return tuple(
        dataclasses.replace(j, findings=tuple(_finding(j, f, again) for f in j.findings))
        for j in judged
    )


def _finding(j: Judged, f: Finding, again: Mapping[str, Result]) -> Finding:
    if f.verdict is None or not f.results or any(r.name not in again for r in f.results):
        return f
    results = tuple(again[r.name] for r in f.results)
    now = verdict_on(j.claim, results)
    return dataclasses.replace(f, again=Again(results, now, compared(f.verdict, now)))


def compared(first: Verdict, now: Verdict) -> str:
    """How what was found again stands to the first time: one of `KINDS`."""
    if now.ours == first.ours and now.interval == first.interval:
        return SAME
    if first.found is not None and now.found is not None:
        return WITHIN if first.found.low <= now.found.mid <= first.found.high else OUTSIDE
    if "not decidable" in first.kind:
        return NONE
    return ALSO if now.kind == first.kind else OTHER


def told(f: Finding) -> str:
    """What was found again, in words; nothing where it was not made again."""
    if f.again is None:
        return ""
    days = ", ".join(sorted({words.date(r) for r in f.again.results}))
    now = f.again.verdict
    figures = "" if f.again.kind == SAME else f": {now.interval if now.found else now.ours}"
    return f"{days}, {f.again.kind}{figures}"


def summary(judged: Sequence[Judged]) -> str:
    """How many findings were made again, and how they came out; nothing where none was."""
    count = Counter(f.again.kind for j in judged for f in j.findings if f.again)
    if not count:
        return ""
    each = "; ".join(f"{kind}: {count[kind]}" for kind in KINDS if count[kind])
    total = sum(count.values())
    return f"Made again by the same commands on another day: {total} findings; {each}."
