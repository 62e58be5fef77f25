"""GLUE's metrics of predictions against labels, each a float."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


def accuracy(prediction: Values, label: Values) -> float:
    """The share that is equal."""
    return float(np.mean(prediction == label))


def f1(prediction: Values, label: Values) -> float:
    """The harmonic mean of precision and recall of class 1; 0 where neither is defined."""
    hits = float(np.sum((prediction == 1) & (label == 1)))
    named = float(np.sum(prediction == 1) + np.sum(label == 1))
    return 2 * hits / named if named else 0.0


def matthews(prediction: Values, label: Values) -> float:
    """Matthews' correlation of two classes; 0 where one of the two sides is constant."""
    if np.ptp(prediction) == 0 or np.ptp(label) == 0:
        return 0.0
    return pearson(prediction, label)


def pearson(prediction: Values, label: Values) -> float:
    """Pearson's correlation; 0 where one of the two is constant."""
    if np.ptp(prediction) == 0 or np.ptp(label) == 0:
        return 0.0
    return float(np.corrcoef(prediction, label)[0, 1])


def spearman(prediction: Values, label: Values) -> float:
    """Pearson's correlation of the ranks, ties sharing their mean rank."""
    return pearson(_ranks(prediction), _ranks(label))


def _ranks(x: Values) -> Values:
    _, inverse, count = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[inverse]


METRICS: dict[str, Callable[[Values, Values], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def evaluate(
    names: tuple[str, ...], outputs: NDArray[np.float32], label: Values
) -> dict[str, float]:
    """Each metric of a model's outputs, `(n, classes)` logits or `(n, 1)` scores."""
    if outputs.shape[-1] == 1:
        prediction = outputs[:, 0].astype(np.float64)
    else:
        prediction = np.argmax(outputs, axis=-1).astype(np.float64)
    return {name: METRICS[name](prediction, label) for name in names}


def majority(names: tuple[str, ...], label: Values, classes: int) -> dict[str, float]:
    """What answering the most frequent class, or the mean score, always gets."""
    if classes:
        values, counts = np.unique(label, return_counts=True)
        answer = values[np.argmax(counts)]
    else:
        answer = label.mean()
    return {name: METRICS[name](np.full_like(label, answer), label) for name in names}
