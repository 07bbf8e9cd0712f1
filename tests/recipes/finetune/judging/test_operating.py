"""Sensitivity, specificity and calibration, against statsmodels and figures by hand."""

from __future__ import annotations

import numpy as np
import pytest
import statsmodels.api as sm
from finetune.data.tasks import Predictions, Task
from finetune.judging.operating import calibration, operating
from scipy import special
from statsmodels.stats.proportion import proportion_confint

BINARY = Task("binary", ("no", "yes"))


def predictions(labels: np.ndarray, positive: np.ndarray, patients: list[str] | None = None) -> Predictions:
    return Predictions(labels, np.stack([1 - positive, positive], 1), list(map(str, range(len(labels)))), patients)


def test_the_threshold_of_validation_is_used_on_test() -> None:
    val = predictions(np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.7, 0.9]))
    labels, positive = np.array([0, 0, 0, 1, 1]), np.array([0.1, 0.75, 0.2, 0.6, 0.8])
    found = operating(BINARY, [val], [predictions(labels, positive)])["yes"]
    assert found.thresholds == (0.7,)
    assert (found.sensitivity.value, found.specificity.value) == (pytest.approx(1 / 2), pytest.approx(2 / 3))
    low, high = proportion_confint(1, 2, method="wilson")
    assert (found.sensitivity.low, found.sensitivity.high) == pytest.approx((low, high))


def test_rates_are_means_over_seeds_and_intervals_are_over_patients() -> None:
    """A perfect specificity has an interval still; ten images of one patient count as one."""
    val = predictions(np.array([0, 1]), np.array([0.1, 0.9]))
    labels, patients = np.repeat([0, 1, 1], 10), [f"patient {k // 10}" for k in range(30)]
    seeds = [predictions(labels, likely, patients) for likely in (0.95 * labels, 0.95 * (np.arange(30) >= 20))]
    found = operating(BINARY, [val, val], seeds)["yes"]
    assert found.sensitivity.value == pytest.approx(0.75)
    assert (found.sensitivity.low, found.sensitivity.high) == pytest.approx(proportion_confint(1.5, 2, method="wilson"))
    assert found.specificity.value == found.specificity.high == 1
    assert found.specificity.low == pytest.approx(proportion_confint(1, 1, method="wilson")[0])


def test_the_likeliest_of_several_classes_is_called() -> None:
    labels = np.array([0, 1, 2, 2])
    test = Predictions(labels, np.eye(3)[[0, 1, 2, 0]], list("abcd"))
    found = operating(Task("multi-class", ("x", "y", "z")), [test], [test])
    assert found["z"].thresholds == ()
    assert found["z"].sensitivity.value == 0.5
    assert found["x"].specificity.value == pytest.approx(2 / 3)


def test_calibration_is_a_logistic_regression_on_the_predicted_odds() -> None:
    rng = np.random.default_rng(0)
    odds = rng.normal(-1, 2, 400)
    positive = rng.random(400) < special.expit(0.5 * odds + 0.7)
    found = calibration(positive, special.expit(odds))
    both = sm.GLM(positive, sm.add_constant(odds), family=sm.families.Binomial()).fit()
    alone = sm.GLM(positive, np.ones(400), offset=odds, family=sm.families.Binomial()).fit()
    assert found.slope == pytest.approx(both.params[1], abs=1e-6)
    assert found.intercept == pytest.approx(alone.params[0], abs=1e-6)


def test_what_can_not_be_calibrated_is_none() -> None:
    positive = np.array([False, False, True, True])
    assert calibration(positive, np.array([0.1, 0.2, 0.8, 1.0])).slope is None
    assert calibration(positive, np.full(4, 0.25)).slope is None
    assert calibration(positive, np.full(4, 0.25)).intercept == pytest.approx(special.logit(0.5) - special.logit(0.25))
    assert calibration(np.zeros(4, bool), np.full(4, 0.2)) is None
    sure = calibration(np.array([False, True, False, True]), np.array([0.0, 0.0, 1.0, 1.0]))
    assert sure.slope is None or abs(sure.slope) < 1e-6
