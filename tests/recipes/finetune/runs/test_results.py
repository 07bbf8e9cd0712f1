"""What a stage leaves in its folder reads back as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from finetune.data.images import Split
from finetune.data.tasks import Task
from finetune.runs.results import read_predictions, write_predictions

BINARY = Task("binary", ("no", "yes"))
CLASSES = Task("multi-class", ("a", "b", "c"))
LABELS = Task("multi-label", ("a", "b", "c"))


@pytest.mark.parametrize("task", [BINARY, CLASSES, LABELS], ids=lambda task: task.kind)
def test_predictions_read_back_exactly(tmp_path: Path, task: Task) -> None:
    rng = np.random.default_rng(0)
    outputs = len(task.classes)
    labels = rng.integers(0, 2, (30, outputs)) if task.multi_label else rng.integers(0, outputs, 30)
    probabilities = rng.random((30, outputs)) ** 9
    patients = [f"{k // 2:03d}" for k in range(30)] if task.multi_label else None
    # A reader must not take these for numbers, or for what is missing.
    split = Split(np.zeros((30, 1, 2, 2), np.uint8), labels, ["NA", *(f"{k:03d}" for k in range(29))], patients)
    write_predictions(tmp_path, "test", task, split, probabilities)
    found = read_predictions(tmp_path, "test")
    assert (found.cases, found.patients) == (split.cases, patients)
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_array_equal(found.probabilities, probabilities)
    assert found.probabilities.flags.c_contiguous  # sums depend on the layout
    header = (tmp_path / "predictions_test.csv").read_text().splitlines()[0]
    assert header.startswith("case,patient,label_a,label_b" if task.multi_label else "case,label,prob_0,prob_1")
