"""Shift in the data: what is compared with what, and how far an arm falls behind the baseline."""

from __future__ import annotations

import numpy as np
import pytest
from finetune.data.tasks import Predictions, Task
from finetune.judging.shift import shifts
from sklearn.metrics import roc_auc_score

CASES = 400
VIEWS = ["PA" if case % 5 < 3 else "AP" for case in range(CASES)]


def predictions(strengths: np.ndarray, seed: int) -> Predictions:
    """Of two labels, told apart by so many standard deviations per case; three images a patient."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((CASES, 2)) < 0.4).astype(np.int64)
    labels = np.concatenate([labels, np.zeros((CASES, 1), dtype=np.int64)], axis=1)  # nobody has the third
    scores = rng.normal(size=labels.shape) + strengths[:, None] * labels
    cases = [str(case) for case in range(CASES)]
    return Predictions(labels, 1 / (1 + np.exp(-scores)), cases, [str(case // 3) for case in range(CASES)])


def made() -> tuple[dict[str, list[Predictions]], dict[str, list[Predictions]]]:
    """The baseline is as good on AP as on PA, the other arm is not; both are better on validation."""
    same, falls = np.full(CASES, 2.0), np.where(np.array(VIEWS) == "PA", 2.0, 0.3)
    test = {"baseline": [predictions(same, 0)], "inmerge": [predictions(falls, 0)]}
    return test, {arm: [predictions(np.full(CASES, 3.0), 1)] for arm in test}


def test_parts_are_compared_on_the_labels_that_both_can_score() -> None:
    test, val = made()
    task = Task("multi-label", ("mass", "nodule", "hernia"))
    found = list(shifts(task, test, val, {"view": VIEWS, "sex": [None] * CASES}))
    assert [shift.names for shift in found] == [("validation", "test"), ("view PA", "view AP")]
    views = found[1]
    assert views.labels == 2
    assert views.cases == (VIEWS.count("PA"), VIEWS.count("AP"))
    rows = np.array(VIEWS) == "AP"
    labels, scores = test["inmerge"][0].labels[rows], test["inmerge"][0].probabilities[rows]
    aurocs = [roc_auc_score(labels[:, k], scores[:, k]) for k in (0, 1)]
    assert views.aurocs["inmerge"][1] == pytest.approx(np.mean(aurocs))
    assert views.per_case[1] == pytest.approx(labels.sum(axis=1).mean())
    lost, low, high = views.differences["inmerge"]
    falls = {arm: pair[0] - pair[1] for arm, pair in views.aurocs.items()}
    assert lost == pytest.approx(falls["inmerge"] - falls["baseline"])
    assert 0 < low < lost < high
    assert found[0].aurocs["baseline"][0] > found[0].aurocs["baseline"][1]


def test_parts_that_can_not_be_scored_and_folds_are_left_out() -> None:
    test, _ = made()
    rare = ["F" if case < 4 else "M" for case in range(CASES)]
    assert list(shifts(Task("multi-label", ("mass", "nodule", "hernia")), test, None, {"sex": rare})) == []


def test_classes_have_no_labels_per_case() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    found = Predictions(labels, rng.dirichlet((1, 1, 1), 90), [str(case) for case in range(90)])
    (shift,) = shifts(Task("multi-class", tuple("abc")), {"baseline": [found]}, {"baseline": [found]}, {})
    assert (shift.per_case, shift.labels, shift.differences) == (None, 3, {})
    assert shift.aurocs["baseline"][0] == shift.aurocs["baseline"][1]
