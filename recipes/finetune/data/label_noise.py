"""Wrong labels in training, on purpose: where a regulariser should show itself, if anywhere."""

from dataclasses import replace

import numpy as np

from .corruptions import case_generator
from .images import ImageData, Split
from .tasks import Task, labels_text

NOISE_FILE = "label_noise.csv"


def with_label_noise(data: ImageData, rate: float, seed: int) -> ImageData:
    """The data with symmetric noise in the training labels, and what was changed in their description and as a table.

    What becomes of a case depends on the seed and the case alone, so that it is the same in every fold, and however few
    of the images are trained on. In cross-validation validation and test images keep their labels in their own fold.

    Args:
        rate: see noisy_labels.
    """
    if not rate:
        return data
    folds = tuple(replace(fold, train=_noisy(data.task, fold.train, rate, seed)) for fold in data.folds)
    train = _noisy(data.task, data.train, rate, seed)
    pairs = zip(data.train.cases, data.train.labels, train.labels, strict=True)
    rows = [
        [case, labels_text(data.task, true), labels_text(data.task, given)]
        for case, true, given in pairs
        if not np.array_equal(true, given)
    ]
    description = {**data.description, "label_noise": {"rate": rate, "seed": seed, "cases_changed": len(rows)}}
    tables = {**data.tables, NOISE_FILE: (("case", "labels", "trained_with"), rows)}
    changed = {"folds": folds} if folds else {"train": train}
    return replace(data, **changed, description=description, tables=tables)


def _noisy(task: Task, split: Split, rate: float, seed: int) -> Split:
    draws = [case_generator(f"label noise {seed}", case) for case in split.cases]
    return replace(split, labels=noisy_labels(task, split.labels, rate, draws))


def noisy_labels(task: Task, labels: np.ndarray, rate: float, generators: list[np.random.Generator]) -> np.ndarray:
    """Symmetric noise: with this probability a class becomes any of the others, and a label's 0 or 1 the other.

    Args:
        labels: class indices (N,), or 0 and 1 of shape (N, labels).
        generators: one per case.
    """
    if task.multi_label:
        turned = np.array([rng.random(labels.shape[1]) < rate for rng in generators])
        return np.where(turned, 1 - labels, labels)
    classes = len(task.classes)
    steps = [int(rng.integers(1, classes)) if rng.random() < rate else 0 for rng in generators]
    return (labels + np.array(steps, dtype=np.int64)) % classes
