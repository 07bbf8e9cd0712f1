"""The kinds of task: what is predicted, the loss it is trained with, and the probabilities it is judged by."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

Kind = Literal["binary", "multi-class", "multi-label", "ordinal"]


@dataclass(frozen=True)
class Task:
    """What a model learns.

    Attributes:
        kind: "ordinal" is trained and scored as classes; "binary" is two classes, and class 1 is the positive one.
        classes: names of the classes, or of the labels of a multi-label task, in the order of the model's outputs.
    """

    kind: Kind
    classes: tuple[str, ...]

    @property
    def multi_label(self) -> bool:
        return self.kind == "multi-label"


def loss(task: Task, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean loss of a batch; labels are class indices (N,), or 0 and 1 of shape (N, labels)."""
    if task.multi_label:
        return F.binary_cross_entropy_with_logits(logits.float(), labels.float())
    return F.cross_entropy(logits.float(), labels)


def probabilities(task: Task, logits: torch.Tensor) -> np.ndarray:
    """Probabilities in float64, shape (N, outputs): softmax, or one sigmoid per label."""
    logits = logits.to("cpu", torch.float64)
    return (logits.sigmoid() if task.multi_label else logits.softmax(dim=1)).numpy()
