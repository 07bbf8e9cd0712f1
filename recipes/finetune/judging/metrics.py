"""Scores of predictions, from scikit-learn and torchmetrics, and the same of many resamples of the cases."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.special import xlogy
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    cohen_kappa_score,
    f1_score,
    precision_recall_curve,
    roc_auc_score,
    roc_curve,
)
from torchmetrics.functional.classification import binary_calibration_error

from ..data.tasks import Task
from . import weighted

PER_CLASS = ("auroc", "auprc", "f1")
CALIBRATION = ("log_loss", "brier", "ece")
METRICS = ("accuracy", "balanced_accuracy", "kappa", *PER_CLASS, *CALIBRATION)
LOWER_IS_BETTER = CALIBRATION
METRIC_NAMES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "kappa": "Cohen's kappa",
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "f1": "F1",
    "log_loss": "log loss",
    "brier": "Brier score",
    "ece": "ECE",
    "medmnist_auc": "medmnist's AUC",
    "medmnist_acc": "medmnist's ACC",
}
_BINS = 15

Thresholds = dict[str, np.ndarray]


def choose_thresholds(task: Task, labels: np.ndarray, probabilities: np.ndarray) -> Thresholds | None:
    """Per label of a multi-label task the thresholds with the best F1 and the best balanced accuracy; None for classes.

    They are chosen on validation and used as they are on test. At 0.5 both figures of a rare label would say nothing
    but that it is rare. A label without positive or negative cases gets 0.5.
    """
    if not task.multi_label:
        return None
    f1, balanced = (np.full(len(task.classes), 0.5) for _ in range(2))
    for k, positive in positives(task, labels).items():
        if _has_both(positive):
            precision, recall, cuts = precision_recall_curve(positive, probabilities[:, k])
            f1[k] = cuts[np.argmax((precision * recall / np.maximum(precision + recall, 1e-12))[:-1])]
            false_positive, true_positive, cuts = roc_curve(positive, probabilities[:, k])
            balanced[k] = cuts[1:][np.argmax((true_positive - false_positive)[1:])]  # the first is infinite
    return {"f1": f1, "balanced_accuracy": balanced}


def as_thresholds(found: dict[str, list[float]] | None) -> Thresholds | None:
    """Thresholds as result.json holds them."""
    return found and {name: np.array(values) for name, values in found.items()}


def score(
    task: Task, labels: np.ndarray, probabilities: np.ndarray, thresholds: Thresholds | None = None
) -> dict[str, float | None]:
    """The figures of METRICS; None where the labels leave one undefined.

    Args:
        labels: class indices (N,), or 0 and 1 of shape (N, labels).
        probabilities: shape (N, outputs).
        thresholds: of a multi-label task, from choose_thresholds; None: 0.5.

    Multi-label tasks get the mean over labels. AUROC, AUPRC (average precision) and F1 are macro means over the classes
    that have positive and negative cases, of a binary task the figures of class 1. Accuracy needs no threshold but 0.5.
    Cohen's kappa weighs disagreements of ordinal classes by the square of their distance. The Brier score of several
    classes is the sum over classes, from 0 to 2. ECE has 15 bins, of the largest probability; of a binary task or a
    label, of the positive one.
    """
    found = list(per_class(task, labels, probabilities, thresholds).values())
    calls = _calls(task, labels, probabilities, thresholds)
    return {
        "accuracy": float(_right(task, labels, probabilities).mean()),
        "balanced_accuracy": _mean([_balanced(*columns) for columns in calls]),
        "kappa": _mean([_kappa(task, *columns) for columns in calls]),
        **{metric: _mean([figures[metric] for figures in found]) for metric in PER_CLASS},
        **_calibration(task, labels, probabilities),
    }


def per_class(
    task: Task, labels: np.ndarray, probabilities: np.ndarray, thresholds: Thresholds | None = None
) -> dict[str, dict[str, float | None]]:
    """PER_CLASS of each class against the rest, of a binary task of class 1 alone; None for a class that no case, or
    every case, has.
    """
    figures: dict[str, dict[str, float | None]] = {}
    called = _called(task, probabilities, thresholds)
    for k, positive in positives(task, labels).items():
        both = _has_both(positive)
        figures[task.classes[k]] = {
            "auroc": float(roc_auc_score(positive, probabilities[:, k])) if both else None,
            "auprc": float(average_precision_score(positive, probabilities[:, k])) if both else None,
            "f1": float(f1_score(positive, called[:, k])) if both else None,
        }
    return figures


def positives(task: Task, labels: np.ndarray) -> dict[int, np.ndarray]:
    """Per scored output which cases are positive: each class against the rest, of a binary task class 1 alone."""
    if task.multi_label:
        return {k: labels[:, k] == 1 for k in range(labels.shape[1])}
    return {k: labels == k for k in ([1] if task.kind == "binary" else range(len(task.classes)))}


def resampled(
    task: Task,
    labels: np.ndarray,
    probabilities: np.ndarray,
    weights: np.ndarray,
    thresholds: Thresholds | None = None,
    metrics: Sequence[str] = METRICS,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The figures that `score` gives, in many resamples of the cases at once; NaN where one leaves a figure undefined.

    Args:
        weights: how often each resample holds each case, (N, B).
        metrics: names from METRICS.

    Returns:
        Per metric (B,), and per scored class its AUROC (B,).
    """
    scored = positives(task, labels)
    aurocs = {task.classes[k]: weighted.auroc(cases, probabilities[:, k], weights) for k, cases in scored.items()}
    calls, classes = _calls(task, labels, probabilities, thresholds), 2 if task.multi_label else len(task.classes)

    def figure(metric: str) -> list[np.ndarray]:
        """One per class or label, whose mean is meant, or just one."""
        match metric:
            case "auroc":
                return list(aurocs.values())
            case "auprc":
                return [weighted.average_precision(cases, probabilities[:, k], weights) for k, cases in scored.items()]
            case "f1":
                called = _called(task, probabilities, thresholds)
                return [weighted.f1(cases, called[:, k], weights) for k, cases in scored.items()]
            case "balanced_accuracy":
                return [weighted.balanced_accuracy(*columns, classes, weights) for columns in calls]
            case "kappa":
                return [weighted.kappa(*columns, classes, weights, task.kind == "ordinal") for columns in calls]
            case "accuracy":
                return [weighted.mean(_right(task, labels, probabilities), weights)]
            case "ece":
                pairs = _outcomes(task, labels, probabilities)
                return [weighted.calibration_error(*pair, _BINS, weights) for pair in pairs]
            case _:
                return [weighted.mean(_losses(task, labels, probabilities)[metric], weights)]

    return {metric: _defined_mean(figure(metric)) for metric in metrics}, aurocs


def _calls(
    task: Task, labels: np.ndarray, probabilities: np.ndarray, thresholds: Thresholds | None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The true and the predicted class of each case, (N,) and (N,); of a multi-label task a pair per label."""
    if not task.multi_label:
        return [(labels, probabilities.argmax(axis=1))]
    above = probabilities >= (0.5 if thresholds is None else thresholds["balanced_accuracy"])
    return list(zip(labels.T, above.T.astype(int), strict=True))


def _called(task: Task, probabilities: np.ndarray, thresholds: Thresholds | None) -> np.ndarray:
    """Which classes F1 takes for predicted, bool (N, outputs)."""
    if task.multi_label:
        return probabilities >= (0.5 if thresholds is None else thresholds["f1"])
    return probabilities.argmax(axis=1)[:, None] == np.arange(probabilities.shape[1])


def _right(task: Task, labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Whether the class of each case, or which share of its labels, was predicted, (N,)."""
    if task.multi_label:
        return (labels == (probabilities > 0.5)).mean(axis=1)
    return labels == probabilities.argmax(axis=1)


def _losses(task: Task, labels: np.ndarray, probabilities: np.ndarray) -> dict[str, np.ndarray]:
    """Log loss and Brier score of each case, (N,); of labels the mean over them."""
    smallest = np.finfo(probabilities.dtype).eps
    likely = np.clip(probabilities, smallest, 1 - smallest)
    if task.kind in ("multi-label", "binary"):
        outputs = list(positives(task, labels))
        true = np.stack(list(positives(task, labels).values()), axis=1)
        p, q = probabilities[:, outputs], likely[:, outputs]
        return {"log_loss": -np.log(np.where(true, q, 1 - q)).mean(axis=1), "brier": ((p - true) ** 2).mean(axis=1)}
    true = np.eye(len(task.classes))[labels]
    return {"log_loss": -xlogy(true, likely).sum(axis=1), "brier": ((probabilities - true) ** 2).sum(axis=1)}


def _outcomes(task: Task, labels: np.ndarray, probabilities: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """What happened, 0 or 1, and how likely it was said to be, (N,) and (N,), of the label or class called."""
    if task.kind in ("multi-label", "binary"):
        return [(cases.astype(int), probabilities[:, k]) for k, cases in positives(task, labels).items()]
    return [(_right(task, labels, probabilities).astype(int), probabilities.max(axis=1))]


def _calibration(task: Task, labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    losses = {metric: float(np.mean(values)) for metric, values in _losses(task, labels, probabilities).items()}
    pairs = [tuple(map(torch.tensor, pair)) for pair in _outcomes(task, labels, probabilities)]
    errors = [binary_calibration_error(confidence, outcomes, n_bins=_BINS) for outcomes, confidence in pairs]
    return losses | {"ece": float(np.mean(errors))}


def _has_both(positive: np.ndarray) -> bool:
    return bool(positive.any() and not positive.all())


def _balanced(labels: np.ndarray, predicted: np.ndarray) -> float | None:
    return float(balanced_accuracy_score(labels, predicted)) if len(np.unique(labels)) > 1 else None


def _kappa(task: Task, labels: np.ndarray, predicted: np.ndarray) -> float | None:
    if len(np.unique(labels)) < 2:
        return None
    classes = range(2 if task.multi_label else len(task.classes))
    weights = "quadratic" if task.kind == "ordinal" else None
    return float(cohen_kappa_score(labels, predicted, labels=classes, weights=weights))


def _defined_mean(values: list[np.ndarray]) -> np.ndarray:
    """The mean over classes or labels in each resample, of those that it leaves defined."""
    return np.ma.masked_invalid(values).mean(axis=0).filled(np.nan)


def _mean(values: list[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None
