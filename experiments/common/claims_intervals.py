"""95% confidence intervals of few numbers: of a mean, of a difference, of a deviation."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy import stats

LEVEL = 0.95
DRAWS = 10_000


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with its 95% interval.

    **Attributes:** `how`, in words, what kind of interval it is, and over how many of what.
    """

    mid: float
    low: float
    high: float
    how: str

    def map(self, function: Callable[[float], float]) -> Interval:
        """The interval of an increasing function of the estimate."""
        return Interval(function(self.mid), function(self.low), function(self.high), self.how)


def of_mean(values: Sequence[float], of: str = "seeds") -> Interval | None:
    """Student's t interval of a mean; None of fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    mid, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(n)
    reach = quantile(n - 1) * error
    return Interval(mid, mid - reach, mid + reach, f"t, {n} {of}")


def of_difference(a: Mapping[int, float], b: Mapping[int, float]) -> Interval | None:
    """The interval of the mean of `a` less that of `b`, each value by its seed.

    Paired where both have two seeds or more in common; else Welch's, of independent samples; None
    where a side has fewer than two values.
    """
    shared = sorted(a.keys() & b.keys())
    if len(shared) >= 2:
        return of_mean([a[s] - b[s] for s in shared], "seeds, paired")
    if min(len(a), len(b)) < 2:
        return None
    means = [statistics.fmean(x.values()) for x in (a, b)]
    errors = [(statistics.variance(x.values()) / len(x), len(x)) for x in (a, b)]
    mid, total = means[0] - means[1], sum(e for e, _ in errors)
    how = f"Welch's t, {len(a)} and {len(b)} seeds"
    if total == 0:
        return Interval(mid, mid, mid, how)
    freedom = total**2 / sum(e**2 / (n - 1) for e, n in errors)
    reach = quantile(freedom) * math.sqrt(total)
    return Interval(mid, mid - reach, mid + reach, how)


def of_groups(groups: Sequence[Sequence[float]], of: str) -> Interval | None:
    """The bootstrap interval of the mean over groups, such as tasks, of each group's mean.

    Groups are drawn again, and then each one's values; None of fewer than two groups.
    """
    if len(groups) < 2:
        return None
    rng = np.random.default_rng(0)
    arrays = [np.asarray(g, float) for g in groups]
    # Means of each group's values drawn again, once for each time that the group can be drawn.
    means = np.stack(
        [x[rng.integers(len(x), size=(DRAWS, len(groups), len(x)))].mean(-1) for x in arrays]
    )
    which = rng.integers(len(groups), size=(DRAWS, len(groups)))
    rows, places = np.arange(DRAWS)[:, None], np.arange(len(groups))[None]
    drawn = means[which, rows, places].mean(-1)
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(drawn, (tail, 100 - tail))
    mid = float(np.mean([x.mean() for x in arrays]))
    return Interval(mid, float(low), float(high), f"bootstrap, {len(groups)} {of}")


def of_deviation(sets: Sequence[Sequence[float]], of: str) -> Interval | None:
    """The chi-squared interval of the standard deviation within sets, pooled over them.

    None where no set has two values.
    """
    freedom = sum(len(x) - 1 for x in sets)
    if freedom < 1:
        return None
    squares = sum(statistics.variance(x) * (len(x) - 1) for x in sets if len(x) > 1)
    tail = (1 - LEVEL) / 2
    low, high = (math.sqrt(squares / float(stats.chi2.ppf(q, freedom))) for q in (1 - tail, tail))
    how = f"chi-squared, {sum(len(x) for x in sets)} {of}"
    return Interval(math.sqrt(squares / freedom), low, high, how)


def quantile(freedom: float) -> float:
    """Student's t that the middle 95% lie within."""
    return float(stats.t.ppf((1 + LEVEL) / 2, freedom))
