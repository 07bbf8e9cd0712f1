"""Figures of many resamples at once are scikit-learn's on each of them."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from finetune.data.tasks import Task
from finetune.judging import weighted
from finetune.judging.metrics import (
    RESAMPLED,
    Scored,
    choose,
    per_class,
    resample,
    resample_aurocs,
    score,
)
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    cohen_kappa_score,
    f1_score,
    roc_auc_score,
)

TASKS = [
    Task("binary", ("no", "yes")),
    Task("multi-class", ("a", "b", "c")),
    Task("ordinal", ("0", "1", "2", "3", "4")),
    Task("multi-label", ("a", "b", "c")),
]


def test_scores_with_ties_and_cases_left_out() -> None:
    rng = np.random.default_rng(0)
    positive, scores = rng.random(60) < 0.3, rng.integers(0, 8, 60) / 8
    weights = rng.integers(0, 4, (60, 20)).astype(np.float32)
    for found, expected in (
        (weighted.auroc, roc_auc_score),
        (weighted.average_precision, average_precision_score),
    ):
        values = [expected(positive, scores, sample_weight=column) for column in weights.T]
        np.testing.assert_allclose(found(positive, scores, weights), values, rtol=0, atol=1e-6)
        assert np.isnan(found(positive, scores, positive[:, None].astype(np.float32)))[0], "positive cases alone"
    f1 = [f1_score(positive, scores > 0.5, sample_weight=column) for column in weights.T]
    np.testing.assert_allclose(weighted.f1(positive, scores > 0.5, weights), f1)


def test_calls_of_classes() -> None:
    """A class that a resample leaves out, or that is never called, is as in scikit-learn."""
    rng = np.random.default_rng(0)
    labels, predicted = rng.choice(5, 60, p=[0.6, 0.3, 0, 0.05, 0.05]), rng.choice([0, 1, 4], 60)
    weights = rng.integers(0, 2, (60, 20)).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = [balanced_accuracy_score(labels, predicted, sample_weight=column) for column in weights.T]
        drawn = [balanced_accuracy_score(labels[c > 0], predicted[c > 0]) for c in weights.T]
    np.testing.assert_allclose(expected, drawn)
    np.testing.assert_allclose(weighted.balanced_accuracy(labels, predicted, 5, weights), expected)
    for quadratic, kind in ((False, None), (True, "quadratic")):
        kappas = [
            cohen_kappa_score(labels, predicted, labels=range(5), weights=kind, sample_weight=column)
            for column in weights.T
        ]
        np.testing.assert_allclose(weighted.kappa(labels, predicted, 5, weights, quadratic), kappas)
    one = (labels == 0).astype(np.float32)[:, None]
    assert np.isnan(weighted.balanced_accuracy(labels, predicted, 5, one))
    assert np.isnan(weighted.kappa(labels, predicted, 5, one))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_resamples_are_scored_as_the_drawn_cases_are(task: Task) -> None:
    """Every metric, on each resample with its cases repeated; undefined (NaN) where `score` has None.

    Losses of labels leave out those that all cases or none have, once for all resamples: the bootstrap takes none that
    lacks a class of a label.
    """
    rng = np.random.default_rng(0)
    outputs, cases = len(task.classes), 40
    if task.multi_label:
        labels = (rng.random((cases, outputs)) < [0.5, 0.1, 0.03]).astype(int)
        probabilities = np.clip(0.3 * labels + rng.random((cases, outputs)) * 0.6, 0, 1)
    else:
        labels = rng.integers(0, outputs, cases)
        probabilities = rng.dirichlet(np.ones(outputs), cases) + 0.3 * np.eye(outputs)[labels]
        probabilities /= probabilities.sum(axis=1, keepdims=True)
    chosen = choose(task, labels, probabilities)
    draws = rng.multinomial(cases, np.full(cases, 1 / cases), size=12)
    scored, weights = Scored(task, labels, probabilities, chosen), draws.T.astype(np.float32)
    found, aurocs = resample(scored, weights, RESAMPLED), resample_aurocs(scored, weights)
    for k, draw in enumerate(draws):
        rows = np.repeat(np.arange(cases), draw)
        expected = score(task, labels[rows], probabilities[rows], chosen)
        values = {metric: None if np.isnan(values[k]) else values[k] for metric, values in found.items()}
        if task.multi_label and not all(len(np.unique(column)) == 2 for column in labels[rows].T):
            for metric in ("log_loss", "log_loss_scaled", "brier", "ece", "ece_scaled"):
                del values[metric], expected[metric]
        assert values == pytest.approx(expected, abs=1e-6)
        for name, figures in per_class(task, labels[rows], probabilities[rows], chosen).items():
            assert (figures["auroc"] is None) == np.isnan(aurocs[name][k])
            assert figures["auroc"] is None or aurocs[name][k] == pytest.approx(figures["auroc"])
