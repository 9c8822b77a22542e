"""Metrics of predictions, computed by scikit-learn and SciPy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[Any]
LOWER_IS_BETTER = ("loss", "perplexity")


def accuracy(predictions: Numbers, labels: Numbers) -> float:
    """The fraction of correct predictions."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, predictions))


def f1(predictions: Numbers, labels: Numbers) -> float:
    """The F1 score of class 1, for two classes."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, zero_division=0.0))


def mcc(predictions: Numbers, labels: Numbers) -> float:
    """Matthews correlation coefficient; 0 if all predictions are equal."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))


def pearson(predictions: Numbers, labels: Numbers) -> float:
    """Pearson correlation; NaN if all predictions are equal or there are fewer than two."""
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predictions, labels)


def spearman(predictions: Numbers, labels: Numbers) -> float:
    """Spearman rank correlation; NaN if all predictions are equal or there are fewer than two."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predictions, labels)


def _correlation(function: Callable[..., Any], predictions: Numbers, labels: Numbers) -> float:
    if len(labels) < 2:
        return math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about constant input, which the result shows too
        return float(function(predictions, labels).statistic)


METRICS: dict[str, Callable[[Numbers, Numbers], float]] = {
    function.__name__: function for function in (accuracy, f1, mcc, pearson, spearman)
}


def measure(names: Sequence[str], predictions: Sequence[float], labels: Sequence[float]) -> dict[str, float]:
    """Compute metrics over all examples.

    Args:
        names: keys of ``METRICS``.
        predictions: predicted classes or numbers.
        labels: true classes or numbers, in the same order.

    Returns:
        The values, keyed by name.
    """
    return {name: METRICS[name](np.asarray(predictions), np.asarray(labels)) for name in names}


def better(name: str, value: float, than: float | None) -> bool:
    """Whether a metric has improved.

    Args:
        name: the metric, or ``loss``.
        value: its new value; NaN is never better.
        than: the best value so far; None if there is none, and then any number is better.
    """
    if math.isnan(value):
        return False
    if than is None:
        return True
    return value < than if name in LOWER_IS_BETTER else value > than
