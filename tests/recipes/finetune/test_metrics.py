"""Scores, and what is left out of them."""

from __future__ import annotations

import numpy as np
import pytest
from finetune.data import Split
from finetune.metrics import auroc_per_class, score
from finetune.results import read_predictions, write_predictions
from finetune.summary import summarise
from finetune.tasks import Task
from sklearn.metrics import roc_auc_score

BINARY = Task("binary", ("no", "yes"))
CLASSES = Task("multi-class", ("a", "b", "c"))
LABELS = Task("multi-label", ("a", "b", "c"))


def test_binary_auroc_is_that_of_class_1() -> None:
    labels, positive = np.array([0, 0, 1, 1]), np.array([0.1, 0.4, 0.35, 0.8])
    scores = score(BINARY, labels, np.stack([1 - positive, positive], axis=1))
    assert scores == {"accuracy": 0.75, "balanced_accuracy": 0.75, "auroc": 0.75}


def test_class_without_cases_is_left_out_of_the_mean() -> None:
    rng = np.random.default_rng(0)
    labels, probabilities = rng.integers(0, 2, 40), rng.dirichlet(np.ones(3), 40)
    per_class = auroc_per_class(CLASSES, labels, probabilities)
    assert per_class["c"] is None
    probabilities[:, 2] = 0
    expected = np.mean([roc_auc_score(labels == k, probabilities[:, k]) for k in (0, 1)])
    assert score(CLASSES, labels, probabilities)["auroc"] == pytest.approx(expected)
    assert score(CLASSES, np.zeros(40, int), probabilities)["auroc"] is None


def test_multi_label_scores_are_means_over_labels() -> None:
    labels = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0]])
    probabilities = np.array([[0.9, 0.6, 0.1], [0.2, 0.7, 0.2], [0.8, 0.4, 0.6]])
    scores = score(LABELS, labels, probabilities)
    assert scores["accuracy"] == pytest.approx(np.mean([1, 1 / 3, 2 / 3]))
    assert scores["balanced_accuracy"] == pytest.approx(np.mean([1, 0.25]))
    assert scores["auroc"] == pytest.approx(np.mean([1, 0.5]))


@pytest.mark.parametrize("task", [BINARY, CLASSES, LABELS], ids=lambda task: task.kind)
def test_predictions_read_back_exactly(tmp_path, task: Task) -> None:
    rng = np.random.default_rng(0)
    outputs = len(task.classes)
    labels = rng.integers(0, 2, (30, outputs)) if task.multi_label else rng.integers(0, outputs, 30)
    probabilities = rng.random((30, outputs)) ** 9
    split = Split(np.zeros((30, 1, 2, 2), np.uint8), labels, [f"case {k}" for k in range(30)])
    write_predictions(tmp_path, "test", task, split, probabilities)
    found = read_predictions(tmp_path / "predictions_test.csv")
    np.testing.assert_array_equal(found[0], labels)
    np.testing.assert_array_equal(found[1], probabilities)
    header = (tmp_path / "predictions_test.csv").read_text().splitlines()[0]
    assert header.startswith("case,label_a,label_b" if task.multi_label else "case,label,prob_0,prob_1")


def test_summary_pairs_the_seeds_and_writes_null_for_what_is_undefined() -> None:
    def result(auroc: float | None, merged: int = 0) -> dict:
        scores = {"test": {"auroc": auroc}}
        merges = {"conv": {"drawn": 10, "merged": merged}} if merged else {}
        return {"epoch": 1, "kept": scores, "last": scores, "merges": merges}

    results = {
        3: {"baseline": result(0.5), "inmerge": result(0.75, 2)},
        4: {"baseline": result(0.5), "inmerge": result(None, 2)},
    }
    summary = summarise("binary", results)
    assert summary["seeds"] == [3, 4]
    assert summary["arms"]["baseline"]["auroc"] == {"mean": 0.5, "std": 0.0, "values": [0.5, 0.5]}
    assert summary["arms"]["inmerge"]["auroc"] == {"mean": 0.75, "std": None, "values": [0.75, None]}
    assert summary["differences"]["inmerge"]["auroc"]["values"] == [0.25, None]
    assert summary["merges"] == {"inmerge": {"conv": {"drawn": 20, "merged": 4}}}
