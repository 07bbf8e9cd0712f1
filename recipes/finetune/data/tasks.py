"""The kinds of task: what is predicted, the loss it is trained with, and the probabilities it is judged by."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

Kind = Literal["binary", "multi-class", "multi-label", "ordinal"]


@dataclass(frozen=True)
class Task:
    """What a model learns.

    Attributes:
        kind: "ordinal" is trained and scored as classes; "binary" is two classes, of which one is the positive one.
        classes: names of the classes, or of the labels of a multi-label task, in the order of the model's outputs.
        positive: of a binary task the class whose AUPRC, F1 and calibration are told, as that of the diseased.
    """

    kind: Kind
    classes: tuple[str, ...]
    positive: int = 1

    @property
    def multi_label(self) -> bool:
        return self.kind == "multi-label"


@dataclass(frozen=True)
class Predictions:
    """What a model predicted of a split.

    Attributes:
        labels: class indices, int64 (N,), or 0 and 1, int64 (N, labels).
        probabilities: float64 (N, outputs).
        cases: what names each image.
        patients: whose image each is, where that is known.
    """

    labels: np.ndarray
    probabilities: np.ndarray
    cases: list[str]
    patients: list[str] | None = None


def labels_text(task: Task, labels: Any) -> str:
    """The class of an image, or its labels joined by |."""
    if not task.multi_label:
        return task.classes[labels]
    return "|".join(name for name, has in zip(task.classes, labels, strict=True) if has)


def label_counts(task: Task, labels: np.ndarray) -> dict[str, int]:
    """How many cases are of each class, or have each label, of a multi-label task also how many have none."""
    found = labels.sum(axis=0) if task.multi_label else np.bincount(labels, minlength=len(task.classes))
    counts = dict(zip(task.classes, found.tolist(), strict=True))
    return counts | ({"none": int((labels.sum(axis=1) == 0).sum())} if task.multi_label else {})


def loss(
    task: Task,
    logits: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor | None = None,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """Mean loss of a batch.

    Args:
        labels: class indices (N,), or 0 and 1 of shape (N, labels).
        weights: from balanced_weights, (outputs,).
        smoothing: label smoothing of classes.
    """
    if task.multi_label:
        return F.binary_cross_entropy_with_logits(logits.float(), labels.float(), pos_weight=weights)
    return F.cross_entropy(logits.float(), labels, weight=weights, label_smoothing=smoothing)


def balanced_weights(task: Task, labels: np.ndarray) -> torch.Tensor:
    """What makes rare classes count as much as frequent ones, float32 (outputs,).

    A class is weighed by N / (classes * its cases), as scikit-learn's "balanced", the positive cases of a label by
    negatives / positives; a class or label without cases by 1.
    """
    if task.multi_label:
        positive = labels.sum(axis=0)
        weights = (len(labels) - positive) / np.maximum(positive, 1)
        weights[positive == 0] = 1
    else:
        cases = np.bincount(labels, minlength=len(task.classes))
        weights = len(labels) / (len(task.classes) * np.maximum(cases, 1))
        weights[cases == 0] = 1
    return torch.tensor(weights, dtype=torch.float32)


def probabilities(task: Task, logits: torch.Tensor) -> np.ndarray:
    """Probabilities in float64, shape (N, outputs): softmax, or one sigmoid per label."""
    logits = logits.to("cpu", torch.float64)
    return (logits.sigmoid() if task.multi_label else logits.softmax(dim=1)).numpy()
