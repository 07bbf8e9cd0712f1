"""Scores of predictions, from scikit-learn and torchmetrics."""

import numpy as np
import torch
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    log_loss,
    precision_recall_curve,
    roc_auc_score,
    roc_curve,
)
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from ..data.tasks import Task

PER_CLASS = ("auroc", "auprc", "f1")
CALIBRATION = ("log_loss", "brier", "ece")
METRICS = ("accuracy", "balanced_accuracy", *PER_CLASS, *CALIBRATION)
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
    The Brier score of several classes is the sum over classes, from 0 to 2. ECE has 15 bins, of the largest
    probability; of a binary task or a label, of the positive one.
    """
    found = list(per_class(task, labels, probabilities, thresholds).values())
    if task.multi_label:
        above = probabilities >= (0.5 if thresholds is None else thresholds["balanced_accuracy"])
        accuracy = np.mean(labels == (probabilities > 0.5))
        balanced = _mean([_balanced(*columns) for columns in zip(labels.T, above.T, strict=True)])
    else:
        predicted = probabilities.argmax(axis=1)
        accuracy, balanced = accuracy_score(labels, predicted), _balanced(labels, predicted)
    return {
        "accuracy": float(accuracy),
        "balanced_accuracy": balanced,
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
    for k, positive in positives(task, labels).items():
        if task.multi_label:
            predicted = probabilities[:, k] >= (0.5 if thresholds is None else thresholds["f1"][k])
        else:
            predicted = probabilities.argmax(axis=1) == k
        both = _has_both(positive)
        figures[task.classes[k]] = {
            "auroc": float(roc_auc_score(positive, probabilities[:, k])) if both else None,
            "auprc": float(average_precision_score(positive, probabilities[:, k])) if both else None,
            "f1": float(f1_score(positive, predicted)) if both else None,
        }
    return figures


def positives(task: Task, labels: np.ndarray) -> dict[int, np.ndarray]:
    """Per scored output which cases are positive: each class against the rest, of a binary task class 1 alone."""
    if task.multi_label:
        return {k: labels[:, k] == 1 for k in range(labels.shape[1])}
    return {k: labels == k for k in ([1] if task.kind == "binary" else range(len(task.classes)))}


def _calibration(task: Task, labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float | None]:
    if task.kind in ("multi-label", "binary"):
        pairs = [(positive, probabilities[:, k].copy()) for k, positive in positives(task, labels).items()]
        eces = [
            binary_calibration_error(torch.from_numpy(p), torch.from_numpy(positive).long(), n_bins=_BINS)
            for positive, p in pairs
        ]
        return {
            "log_loss": float(np.mean([log_loss(positive, p, labels=[False, True]) for positive, p in pairs])),
            "brier": float(np.mean([np.mean((p - positive) ** 2) for positive, p in pairs])),
            "ece": float(np.mean(eces)),
        }
    classes = len(task.classes)
    ece = multiclass_calibration_error(torch.from_numpy(probabilities), torch.from_numpy(labels), classes, n_bins=_BINS)
    return {
        "log_loss": float(log_loss(labels, probabilities, labels=range(classes))),
        "brier": float(np.mean(((probabilities - np.eye(classes)[labels]) ** 2).sum(axis=1))),
        "ece": float(ece),
    }


def _has_both(positive: np.ndarray) -> bool:
    return bool(positive.any() and not positive.all())


def _balanced(labels: np.ndarray, predicted: np.ndarray) -> float | None:
    return float(balanced_accuracy_score(labels, predicted)) if len(np.unique(labels)) > 1 else None


def _mean(values: list[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None
