"""A claim of a paper that results are held against, and the verdict on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from experiments.common.claims_intervals import Interval

Kind = Literal["reproduced", "not reproduced", "not decidable at this scale"]
Results = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What results say of a claim.

    **Attributes:** `ours`, our figures in words; `interval`, the interval that decides, in words;
    `reason`, why the verdict is this one, in a sentence; `found`, that interval in numbers, None
    where there is none.
    """

    kind: Kind
    ours: str
    interval: str
    reason: str
    found: Interval | None = None


Judge = Callable[[Results], Verdict]


def anything(result: Mapping[str, Any]) -> bool:
    """True of every result."""
    del result
    return True


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a paper says, and how it is judged.

    **Attributes:** `source`, the paper and where in it; `figure`, its figure in words;
    `experiments`, whose results bear on it, none for a claim that is arithmetic; `accepts`, which
    of those; `judge`, from one result to a verdict, or with `pooled` from those that differ in
    their seed alone; `command`, what would make such a result, `{task}` standing for one of
    `wanted`, the tasks to be judged on.
    """

    id: str
    section: str
    sentence: str
    source: str
    figure: str
    experiments: tuple[str, ...]
    judge: Judge
    command: str
    accepts: Callable[[Mapping[str, Any]], bool] = anything
    wanted: tuple[str, ...] = ()
    pooled: bool = False


@dataclasses.dataclass(frozen=True)
class Scale:
    """How a number is shown: times `factor`, with so many digits, and its unit after it."""

    factor: float = 1.0
    unit: str = ""
    digits: int = 2
    signed: bool = True

    def text(self, x: float) -> str:
        """The number alone."""
        # Rounded first, so that what rounds to zero has no sign.
        x = round(self.factor * x, self.digits) + 0.0
        sign = "+" if self.signed and x > 0 else ""
        return f"{sign}{x:,.{self.digits}f}".replace("-", "\N{MINUS SIGN}")

    def interval(self, x: Interval) -> str:
        """Estimate, interval and how it was found."""
        low, high = self.text(x.low), self.text(x.high)
        return f"{self.text(x.mid)}{self.unit}, 95% CI {low} to {high} ({x.how})"


POINTS = Scale(100, " points", 1)
PERCENT = Scale(100, "%", 1)
TIMES = Scale(1, " times", 2, signed=False)


def decide(
    found: Interval | None,
    line: float,
    scale: Scale,
    *,
    what: str,
    ours: str,
    lack: str = "there are fewer than two seeds",
) -> Verdict:
    """Whether what was measured lies above a line: its whole interval has to, or none of it.

    **Arguments:** `found`, None where there was too little; `lack`, then what was.
    """
    if found is None:
        return undecided(ours, f"{lack}: no interval")
    shown, at = f"{what}: {scale.interval(found)}", scale.text(line) + scale.unit
    kind: Kind = "not decidable at this scale"
    reason = f"the interval holds {at}: it may be either"
    if found.low > line:
        kind, reason = "reproduced", f"the whole interval lies above {at}"
    elif found.high < line:
        kind, reason = "not reproduced", f"the whole interval lies below {at}"
    return Verdict(kind, ours, shown, reason, found)


def undecided(ours: str, reason: str, interval: str = "none") -> Verdict:
    """Too little to judge by."""
    return Verdict("not decidable at this scale", ours, interval, reason)


def exact(holds: bool, ours: str, reason: str) -> Verdict:
    """Of what is counted and not sampled."""
    kind: Kind = "reproduced" if holds else "not reproduced"
    return Verdict(kind, ours, "exact: counted, not sampled", reason)
