"""Each arm on parts of the test set, against the same figures from the rows of a table."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from finetune.data.images import ImageData, Split
from finetune.data.tasks import Task
from finetune.judging.formatting import bounds, with_bounds
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
    """Of the labels with enough positive and negative cases; arms and differences have bootstrap intervals."""
    section = subgroup_section(FinishedRun(tmp_path), data)
    assert section.header == ["subgroup", "cases", "patients", "labels", *ARMS, "inmerge - baseline"]
    found = {row[0]: dict(zip(section.header, row, strict=True)) for row in section.rows}
    assert list(found) == ["sex: F", "sex: M", "gap of sex: F to M", "age: 0-17", "age: 18-39"]
    of_sex = {}
    for sex, scored in (("F", (0, 1)), ("M", (0, 1, 2))):
        row = found[f"sex: {sex}"]
        rows = [k for k in range(CASES) if data.test.subgroups["sex"][k] == sex]
        patients = [data.test.patients[k] for k in rows]
        of_sex[sex] = {
            arm: [[roc_auc_score(data.test.labels[rows, k], p[rows, k]) for k in scored] for p in seeds]
            for arm, seeds in probabilities.items()
        }
        means = {arm: np.mean(aurocs) for arm, aurocs in of_sex[sex].items()}
        assert (row["cases"], row["patients"], row["labels"]) == (str(len(rows)), "20", str(len(scored)))
        part = {arm: [p[rows] for p in seeds] for arm, seeds in probabilities.items()}
        resampled = bootstrap(TASK, data.test.labels[rows], part, patients)
        for arm in ARMS:
            assert row[arm] == f"{means[arm]:.4f} {bounds(*resampled.interval(arm))}"
        difference = means["inmerge"] - means["baseline"]
        assert row["inmerge - baseline"] == with_bounds(difference, *resampled.interval("inmerge", "baseline"))
    assert list(found["age: 0-17"].values()) == ["age: 0-17", "1", "1", "0", None, None, None]
    gap = found["gap of sex: F to M"]
    assert gap["labels"] == "2"  # c is none of the women's
    for arm in ARMS:
        women, men = (np.mean([aurocs[:2] for aurocs in of_sex[sex][arm]]) for sex in "FM")
        mean, low, high = (float(number) for number in re.findall(r"[-+]?\d\.\d+", gap[arm]))
        assert mean == pytest.approx(women - men, abs=0.006)
        assert low < women - men < high


def test_labels_with_few_cases_are_left_out(
    data: ImageData, probabilities: dict[str, list[np.ndarray]], tmp_path: Path
) -> None:
    data.test.labels[:, 0] = 0
    data.test.labels[1:20:2, 0] = 1  # nine women and one man fewer than ten
    data.test.labels[1, 0] = 0
    rows = {row[0]: row for row in subgroup_section(FinishedRun(tmp_path), data).rows}
    women, men = (int(rows[f"sex: {sex}"][3]) for sex in "FM")
    assert (women, men) == (1, 1 + 1)


def test_what_is_not_known_is_counted(
    data: ImageData, probabilities: dict[str, list[np.ndarray]], tmp_path: Path
) -> None:
    section = subgroup_section(FinishedRun(tmp_path), data)
    expected = "Not known, or not plausible, is the sex of 1 of 60 test cases, the view of 60 of 60 test cases."
    assert section.text.endswith(expected)
