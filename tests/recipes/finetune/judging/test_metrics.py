"""Scores, and what is left out of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from finetune.data.images import ImageData, Split
from finetune.data.tasks import Task
from finetune.judging.metrics import METRICS, Chosen, choose_thresholds, operating_points, per_class, score
from finetune.judging.summary import summarise
from finetune.reports.terminal import table
from finetune.runs.finished import FinishedRun
from sklearn.metrics import average_precision_score, f1_score, log_loss, roc_auc_score
from small_runs import make_run

BINARY = Task("binary", ("no", "yes"))
CLASSES = Task("multi-class", ("a", "b", "c"))
LABELS = Task("multi-label", ("a", "b", "c"))
NO_SCALING = {"temperatures": {"all classes": 1.0}}


def test_binary_figures_are_those_of_the_positive_class() -> None:
    """AUROC is the same for either; tables name the class, and a run folder keeps it."""
    rng = np.random.default_rng(0)
    labels, likely = rng.integers(0, 2, 60), rng.random(60)
    probabilities = np.stack([likely, 1 - likely], axis=1)
    task = Task("binary", ("malignant", "benign"), positive=0)
    scores = score(task, labels, probabilities)
    assert scores["auprc"] == pytest.approx(average_precision_score(labels == 0, likely))
    assert scores["f1"] == pytest.approx(f1_score(labels == 0, likely > 0.5))
    assert scores["auroc"] == pytest.approx(score(Task("binary", task.classes), labels, probabilities)["auroc"])
    classes = per_class(task, labels, probabilities)
    assert list(classes) == ["malignant"]
    result = {"epoch": 1, "kept": {"test": scores}, "last": {"test": scores}, "per_class": classes, "merges": {}}
    result |= NO_SCALING
    shown = table(summarise("made", task, {0: {"baseline": result}}))
    assert "AUPRC, F1 and ECE are of the positive class, malignant" in shown.splitlines()[0]


def test_a_run_folder_keeps_the_positive_class(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    labels = np.array([0, 1, 1, 0])
    split = Split(np.zeros((4, 1, 2, 2), np.uint8), labels, list("abcd"))
    data = ImageData("made", Task("binary", ("malignant", "benign"), positive=0), split, split, split)
    probabilities = np.stack([1 - labels, labels], axis=1).astype(float)
    run = FinishedRun(make_run(tmp_path / "run", data, {"baseline": [probabilities]}, [0]))
    assert run.task == data.task


def test_binary_auroc_is_that_of_class_1() -> None:
    labels, positive = np.array([0, 0, 1, 1]), np.array([0.1, 0.4, 0.35, 0.8])
    scores = score(BINARY, labels, np.stack([1 - positive, positive], axis=1))
    assert tuple(scores) == tuple(METRICS)
    assert (scores["accuracy"], scores["balanced_accuracy"], scores["auroc"]) == (0.75, 0.75, 0.75)
    assert scores["auprc"] == average_precision_score(labels, positive)
    assert scores["f1"] == pytest.approx(2 / 3)


def test_class_without_cases_is_left_out_of_the_mean() -> None:
    rng = np.random.default_rng(0)
    labels, probabilities = rng.integers(0, 2, 40), rng.dirichlet(np.ones(3), 40)
    assert per_class(CLASSES, labels, probabilities)["c"] == {"auroc": None, "auprc": None, "f1": None}
    expected = np.mean([roc_auc_score(labels == k, probabilities[:, k]) for k in (0, 1)])
    assert score(CLASSES, labels, probabilities)["auroc"] == pytest.approx(expected)
    one_class = score(CLASSES, np.zeros(40, int), probabilities)
    assert one_class["auroc"] is one_class["auprc"] is one_class["f1"] is one_class["balanced_accuracy"] is None


def test_class_without_cases_is_named() -> None:
    figures = {"auroc": {"mean": 0.5, "std": None, "values": [0.5], "bootstrap_low": None, "bootstrap_high": None}}
    stage = {"epoch": 1, "kept": {"test": {"auroc": 0.5}}, "last": {"test": {"auroc": 0.5}}, "merges": {}}
    stage |= NO_SCALING
    stage["per_class"] = {"Mass": {"auroc": 0.5}, "Hernia": {"auroc": None}}
    summary = summarise("made", LABELS, {0: {"baseline": stage, "inmerge": stage}})
    assert summary["per_class"]["baseline"]["Mass"] == figures
    assert "Left out of the means, with one label only on test: Hernia\n" in table(summary)


def test_multi_label_scores_are_means_over_labels() -> None:
    labels = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0]])
    probabilities = np.array([[0.9, 0.6, 0.1], [0.2, 0.7, 0.2], [0.8, 0.4, 0.6]])
    scores = score(LABELS, labels, probabilities)
    assert scores["accuracy"] == pytest.approx(np.mean([1, 1 / 3, 2 / 3]))
    assert scores["balanced_accuracy"] == pytest.approx(np.mean([1, 0.25]))
    assert scores["auroc"] == pytest.approx(np.mean([1, 0.5]))


def test_macro_means_and_calibration_of_classes() -> None:
    rng = np.random.default_rng(0)
    labels, probabilities = rng.integers(0, 3, 200), rng.dirichlet(np.ones(3), 200)
    scores, one_hot = score(CLASSES, labels, probabilities), np.eye(3)[labels]
    assert scores["auprc"] == pytest.approx(average_precision_score(one_hot, probabilities))
    assert scores["f1"] == pytest.approx(f1_score(labels, probabilities.argmax(1), average="macro"))
    assert scores["log_loss"] == pytest.approx(log_loss(labels, probabilities))
    assert scores["brier"] == pytest.approx(((probabilities - one_hot) ** 2).sum() / 200)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    gaps = [(confidence - right)[np.ceil(confidence * 15) == bin].sum() for bin in range(1, 16)]
    assert scores["ece"] == pytest.approx(np.abs(gaps).sum() / 200, abs=1e-6)


def test_calibration_of_labels_is_the_mean_over_labels() -> None:
    rng = np.random.default_rng(0)
    labels, probabilities = rng.integers(0, 2, (200, 3)), rng.random((200, 3))
    scores = score(LABELS, labels, probabilities)
    alone = [score(BINARY, labels[:, k], np.stack([1 - p, p], 1)) for k, p in enumerate(probabilities.T)]
    for metric in ("log_loss", "brier", "ece", "auprc"):
        assert scores[metric] == pytest.approx(np.mean([figures[metric] for figures in alone]))


def test_a_label_without_cases_is_left_out_of_every_mean() -> None:
    """Of calibration and losses as of AUROC; accuracy is over all."""
    rng = np.random.default_rng(0)
    labels, probabilities = rng.integers(0, 2, (50, 3)), rng.random((50, 3))
    labels[:, 1] = 0
    scored = score(Task("multi-label", ("a", "c")), labels[:, [0, 2]], probabilities[:, [0, 2]])
    scores = score(LABELS, labels, probabilities)
    for metric in set(METRICS) - {"accuracy"}:
        assert scores[metric] == pytest.approx(scored[metric]), metric
    assert score(LABELS, 0 * labels, probabilities)["log_loss"] is not None  # the epoch is kept by it


def test_operating_points_are_chosen_for_binary_tasks_and_labels() -> None:
    labels, positive = np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.35, 0.8])
    both = np.stack([1 - positive, positive], axis=1)
    assert operating_points(BINARY, labels, both) == {1: 0.35}
    assert operating_points(BINARY, 0 * labels, both) == {1: 0.5}
    assert operating_points(CLASSES, labels, np.eye(3)[labels]) == {}
    labels = np.stack([labels, 1 - labels, 0 * labels], axis=1)
    found = operating_points(LABELS, labels, np.tile(positive[:, None], 3))
    assert found == {0: 0.35, 1: 0.1, 2: 0.5}


def test_thresholds_are_the_best_on_validation_and_stay_on_test() -> None:
    """No other threshold does better where they are chosen; labels with one value alone get 0.5; classes have none."""
    rng = np.random.default_rng(0)
    labels = (rng.random((80, 3)) < [0.1, 0.4, 0]).astype(int)
    probabilities = np.clip(0.1 * labels + 0.2 * rng.random((80, 3)), 0, 1)
    thresholds = choose_thresholds(LABELS, labels, probabilities)
    assert thresholds["f1"][2] == thresholds["balanced_accuracy"][2] == 0.5
    chosen = score(LABELS, labels, probabilities, Chosen(thresholds))
    for metric in ("f1", "balanced_accuracy"):
        others = [
            score(LABELS, labels, probabilities, Chosen({**thresholds, metric: np.full(3, cut)}))
            for cut in np.unique(probabilities)[::6]
        ]
        assert chosen[metric] >= max(figures[metric] for figures in others) - 1e-12
    assert chosen["accuracy"] == score(LABELS, labels, probabilities)["accuracy"]
    assert score(LABELS, labels, probabilities / 2, Chosen(thresholds))["f1"] < chosen["f1"]
    inverted = choose_thresholds(LABELS, labels, 1 - probabilities)
    assert all(np.isfinite(values).all() for values in inverted.values())
    assert choose_thresholds(CLASSES, labels[:, 0], probabilities) is None


def test_summary_pairs_the_seeds_and_writes_null_for_what_is_undefined() -> None:
    def result(auroc: float | None, merged: int = 0) -> dict:
        scores = {"test": {"auroc": auroc}}
        merges = {"conv": {"drawn": 10, "merged": merged}} if merged else {}
        per_class = {"yes": {"auroc": auroc}}
        return {"epoch": 1, "kept": scores, "last": scores, "per_class": per_class, "merges": merges, **NO_SCALING}

    results = {
        3: {"baseline": result(0.5), "inmerge": result(0.75, 2)},
        4: {"baseline": result(0.5), "inmerge": result(None, 2)},
    }
    summary = summarise("made", BINARY, results)
    assert summary["seeds"] == [3, 4]
    no_bootstrap = {"bootstrap_low": None, "bootstrap_high": None}
    assert summary["arms"]["baseline"]["auroc"] == {"mean": 0.5, "std": 0.0, "values": [0.5, 0.5], **no_bootstrap}
    assert summary["arms"]["inmerge"]["auroc"] == {"mean": 0.75, "std": None, "values": [0.75, None], **no_bootstrap}
    assert summary["differences"]["inmerge"]["auroc"]["values"] == [0.25, None]
    assert summary["per_class"]["baseline"]["yes"]["auroc"] == summary["arms"]["baseline"]["auroc"]
    difference = summary["per_class"]["inmerge"]["yes"]["auroc"].pop("difference")
    assert summary["per_class"]["inmerge"]["yes"]["auroc"] == summary["arms"]["inmerge"]["auroc"]
    assert (difference["mean"], difference["values"]) == (0.25, [0.25, None])
    assert {value for name, value in difference.items() if name not in ("mean", "values")} == {None}
    assert summary["merges"] == {"inmerge": {"conv": {"drawn": 20, "merged": 4}}}
