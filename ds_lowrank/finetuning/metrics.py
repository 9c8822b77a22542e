"""What is measured of predictions, by the libraries that others measure it with."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[Any]
LOWER_IS_BETTER = ("loss", "perplexity")


def accuracy(predictions: Numbers, labels: Numbers) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, predictions))


def f1(predictions: Numbers, labels: Numbers) -> float:
    """Of class 1, in two classes."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, zero_division=0.0))


def mcc(predictions: Numbers, labels: Numbers) -> float:
    """Matthews's correlation coefficient; 0 where all predictions are the same."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))


def pearson(predictions: Numbers, labels: Numbers) -> float:
    """Not a number where all predictions are the same."""
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predictions, labels)


def spearman(predictions: Numbers, labels: Numbers) -> float:
    """Not a number where all predictions are the same."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predictions, labels)


def _correlation(function: Callable[..., Any], predictions: Numbers, labels: Numbers) -> float:
    if len(labels) < 2:
        return math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constant input, which the result says too
        return float(function(predictions, labels).statistic)


METRICS: dict[str, Callable[[Numbers, Numbers], float]] = {
    function.__name__: function for function in (accuracy, f1, mcc, pearson, spearman)
}


def measure(names: Sequence[str], predictions: Sequence[float], labels: Sequence[float]) -> dict[str, float]:
    """The named metrics over all examples: predicted and true classes, or predicted and true numbers."""
    return {name: METRICS[name](np.asarray(predictions), np.asarray(labels)) for name in names}


def better(name: str, value: float, than: float | None) -> bool:
    """Whether `value` of a metric is better; anything is better than None, and what is no number is never better."""
    if math.isnan(value):
        return False
    if than is None:
        return True
    return value < than if name in LOWER_IS_BETTER else value > than
