"""Sensitivity and specificity at an operating point, and how well probabilities are calibrated."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import special
from statsmodels.stats.proportion import proportion_confint

from ..data.tasks import Predictions, Task
from .intervals import LEVEL
from .metrics import operating_points, positives

_STEPS = 50


@dataclass(frozen=True)
class Rate:
    """A share of cases, mean over seeds, with Wilson's interval at LEVEL for as many units as were seen."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Operating:
    """How an arm calls a class.

    Attributes:
        thresholds: of each seed, as chosen on validation; none where the likeliest class is called.
        sensitivity: of its cases; None where there is none. specificity: of the others, likewise.
    """

    thresholds: tuple[float, ...]
    sensitivity: Rate | None
    specificity: Rate | None


def operating(task: Task, validation: list[Predictions], test: list[Predictions]) -> dict[str, Operating]:
    """How an arm calls each scored class on test, over its seeds."""
    cuts = [operating_points(task, val.labels, val.probabilities) for val in validation]
    patients = test[0].patients
    found = {}
    for k, positive in positives(task, test[0].labels).items():
        called = [_called(seed.probabilities, k, cut) for seed, cut in zip(test, cuts, strict=True)]
        right = np.mean([seed == positive for seed in called], axis=0)
        found[task.classes[k]] = Operating(
            tuple(cut[k] for cut in cuts if k in cut),
            *(_rate(right, cases, patients) for cases in (positive, ~positive)),
        )
    return found


def _called(probabilities: np.ndarray, k: int, cuts: Mapping[int, float]) -> np.ndarray:
    return probabilities[:, k] >= cuts[k] if k in cuts else probabilities.argmax(axis=1) == k


def _rate(right: np.ndarray, cases: np.ndarray, patients: list[str] | None) -> Rate | None:
    if not cases.any():
        return None
    # A patient's images are no evidence of their own.
    units = int(cases.sum()) if patients is None else len({patients[row] for row in np.flatnonzero(cases)})
    value = float(right[cases].mean())
    low, high = proportion_confint(value * units, units, 1 - LEVEL, method="wilson")
    return Rate(value, float(min(low, value)), float(max(high, value)))


@dataclass(frozen=True)
class Calibration:
    """Of the outcomes' log odds by the predicted ones; 1 and 0 are perfect.

    Attributes:
        slope: below 1 where the probabilities are too extreme; None where the outcomes can be told apart by them
            without error, or they are all the same.
        intercept: with a slope of 1; above 0 where they are too low.
    """

    slope: float | None
    intercept: float | None


def calibration(positive: np.ndarray, probabilities: np.ndarray) -> Calibration | None:
    """Of a class whose cases are `positive`, bool (N,); None where all or none are."""
    if positive.all() or not positive.any():
        return None
    smallest = np.finfo(float).eps
    odds = special.logit(np.clip(probabilities, smallest, 1 - smallest))
    inside, outside = odds[positive], odds[~positive]
    apart = inside.min() >= outside.max() or inside.max() <= outside.min()
    slope = None if apart else _newton(np.stack([np.ones_like(odds), odds]), positive, 0 * odds)
    at_one = _newton(np.ones((1, len(odds))), positive, odds)
    return Calibration(None if slope is None else float(slope[1]), None if at_one is None else float(at_one[0]))


def _newton(columns: np.ndarray, positive: np.ndarray, offset: np.ndarray) -> np.ndarray | None:
    """The coefficients of a logistic regression, by Newton's method; None where it finds none."""
    found = np.zeros(len(columns))
    for _ in range(_STEPS):
        likely = special.expit(found @ columns + offset)
        weights = likely * (1 - likely)
        information = (columns * weights) @ columns.T
        if np.linalg.cond(information) > 1e12:
            return None
        step = np.linalg.solve(information, columns @ (positive - likely))
        # Halved while it would be too far: from p near 0 or 1 a whole step overshoots.
        step *= min(1.0, 2 / max(np.abs(step).max(), 1e-12))
        found = found + step
        if np.abs(step).max() < 1e-9:
            return found
    return None
