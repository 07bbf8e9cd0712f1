"""Each arm on parts of the test set, against the same figures from the rows of a table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from finetune.data.images import ImageData, Split
from finetune.data.tasks import Task
from finetune.judging.formatting import with_bounds
from finetune.judging.intervals import bootstrap
from finetune.reports.subgroups import subgroup_section
from finetune.runs.finished import FinishedRun
from sklearn.metrics import roc_auc_score
from small_runs import make_run

TASK = Task("multi-label", ("a", "b", "c"))
CASES = 60
ARMS, SEEDS = ("inmerge", "baseline"), (0, 3)


@pytest.fixture
def data() -> ImageData:
    """No woman has label c, one case is of unknown sex, and the one child has no label."""
    rng = np.random.default_rng(0)
    sex = [None, *("FM"[k % 2] for k in range(1, CASES))]
    labels = rng.integers(0, 2, (CASES, 3))
    labels[np.array(sex) == "F", 2] = 0
    age = ["0-17", *["18-39"] * (CASES - 1)]
    split = Split(
        images=np.zeros((CASES, 1, 8, 8), dtype=np.uint8),
        labels=labels,
        cases=[str(k) for k in range(CASES)],
        patients=[f"patient {k // 3}" for k in range(CASES)],
        subgroups={"sex": sex, "age": age, "view": [None] * CASES},
    )
    return ImageData("made", TASK, train=split, val=split, test=split)


@pytest.fixture
def probabilities(data: ImageData, tmp_path: Path) -> dict[str, list[np.ndarray]]:
    """Those of finished arms, which stand in the run folder."""
    rng = np.random.default_rng(1)
    found = {arm: [0.2 * data.test.labels + 0.8 * rng.random((CASES, 3)) for _ in SEEDS] for arm in ARMS}
    make_run(tmp_path, data, found, SEEDS)
    return found


def test_a_row_is_the_mean_over_labels_and_seeds_of_its_cases(
    data: ImageData, probabilities: dict[str, list[np.ndarray]], tmp_path: Path
) -> None:
    section = subgroup_section(FinishedRun(tmp_path), data)
    assert section.header == ["subgroup", "cases", "patients", "labels", *ARMS, "inmerge - baseline"]
    found = {row[0]: dict(zip(section.header, row, strict=True)) for row in section.rows}
    assert list(found) == ["sex: F", "sex: M", "age: 0-17", "age: 18-39"]
    for sex, scored in (("F", (0, 1)), ("M", (0, 1, 2))):
        row = found[f"sex: {sex}"]
        rows = [k for k in range(CASES) if data.test.subgroups["sex"][k] == sex]
        patients = [data.test.patients[k] for k in rows]
        means = {
            arm: np.mean([[roc_auc_score(data.test.labels[rows, k], p[rows, k]) for k in scored] for p in seeds])
            for arm, seeds in probabilities.items()
        }
        assert (row["cases"], row["patients"], row["labels"]) == (str(len(rows)), "20", str(len(scored)))
        assert [row[arm] for arm in ARMS] == [f"{means[arm]:.4f}" for arm in ARMS]
        part = {arm: [p[rows] for p in seeds] for arm, seeds in probabilities.items()}
        low, high = bootstrap(TASK, data.test.labels[rows], part, patients).interval("inmerge", "baseline")
        difference = means["inmerge"] - means["baseline"]
        assert row["inmerge - baseline"] == with_bounds(difference, low, high)
    assert list(found["age: 0-17"].values()) == ["age: 0-17", "1", "1", "0", None, None, None]


def test_what_is_not_known_is_counted(
    data: ImageData, probabilities: dict[str, list[np.ndarray]], tmp_path: Path
) -> None:
    section = subgroup_section(FinishedRun(tmp_path), data)
    expected = "Not known, or not plausible, is the sex of 1 of 60 test cases, the view of 60 of 60 test cases."
    assert section.text.endswith(expected)
