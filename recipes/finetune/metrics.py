"""Scores of predictions, from scikit-learn."""

import numpy as np
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score

from finetune.tasks import Task

METRICS = ("accuracy", "balanced_accuracy", "auroc")


def score(task: Task, labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float | None]:
    """Accuracy, balanced accuracy and AUROC; None where the labels leave a figure undefined.

    Args:
        labels: class indices (N,), or 0 and 1 of shape (N, labels).
        probabilities: shape (N, outputs).

    Multi-label tasks get the mean over labels, at a threshold of 0.5 where one is needed. AUROC is the macro mean
    over classes (one against the rest), of a binary task that of class 1.
    """
    if task.multi_label:
        predicted = probabilities > 0.5
        accuracy = np.mean([accuracy_score(labels[:, k], predicted[:, k]) for k in range(labels.shape[1])])
        balanced = [_balanced(labels[:, k], predicted[:, k]) for k in range(labels.shape[1])]
        balanced_accuracy = _mean(balanced)
    else:
        predicted = probabilities.argmax(axis=1)
        accuracy = accuracy_score(labels, predicted)
        balanced_accuracy = _balanced(labels, predicted)
    auroc = _mean(list(auroc_per_class(task, labels, probabilities).values()))
    return {"accuracy": float(accuracy), "balanced_accuracy": balanced_accuracy, "auroc": auroc}


def positives(task: Task, labels: np.ndarray) -> dict[int, np.ndarray]:
    """Per scored output which cases are positive: each class against the rest, of a binary task class 1 alone."""
    if task.multi_label:
        return {k: labels[:, k] == 1 for k in range(labels.shape[1])}
    return {k: labels == k for k in ([1] if task.kind == "binary" else range(len(task.classes)))}


def auroc_per_class(task: Task, labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float | None]:
    """AUROC of each class against the rest; of a binary task that of class 1 alone; None for a class that no case, or
    every case, has.
    """
    result: dict[str, float | None] = {}
    for k, positive in positives(task, labels).items():
        one_value = positive.all() or not positive.any()
        result[task.classes[k]] = None if one_value else float(roc_auc_score(positive, probabilities[:, k]))
    return result


def _balanced(labels: np.ndarray, predicted: np.ndarray) -> float | None:
    return float(balanced_accuracy_score(labels, predicted)) if len(np.unique(labels)) > 1 else None


def _mean(values: list[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None
