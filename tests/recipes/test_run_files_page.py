"""The page of a run's files names all that a run writes into them."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "run_files.md"
OF_RUN = ["summary.json", "versions.json", "data.json"]
OF_STAGE = ["result.json", "timing.json", "metrics.csv", "merges.csv", "predictions_val.csv", "predictions_test.csv"]


def names_in(path: Path) -> set[str]:
    """The columns of a table, or the keys of an object."""
    text = path.read_text(encoding="utf-8")
    return set(next(csv.reader(text.splitlines())) if path.suffix == ".csv" else json.loads(text))


@pytest.fixture(scope="module")
def told() -> set[str]:
    return set(re.findall(r"`([^`]+)`", PAGE.read_text(encoding="utf-8")))


@pytest.mark.parametrize("file", [*OF_RUN, *(f"seed_0/inmerge/{name}" for name in OF_STAGE)])
def test_every_column_and_key_is_told(digits_run, told, file):
    path = digits_run / file
    assert path.name in told
    patterns = {"prob_<index>": r"prob_\d+", "val_": r"val_\w+"}
    shapes = [pattern for name, pattern in patterns.items() if name in told]
    assert not {name for name in names_in(path) - told if not any(re.fullmatch(shape, name) for shape in shapes)}


def test_the_keys_of_verdicts_and_differences_are_told(digits_run, told):
    summary = json.loads((digits_run / "summary.json").read_text(encoding="utf-8"))
    assert summary["schema"] == int(re.search(r"now (\d+)", PAGE.read_text(encoding="utf-8"))[1])
    assert set(summary["verdicts"][0]) <= told
    assert set(summary["differences"]["inmerge"]["auroc"]) <= told
    assert set(summary["rule"]) <= told


def test_every_file_of_a_run_is_told_of_somewhere(digits_run, told):
    told = told | set(re.findall(r"[\w.]+\.\w+", (PAGE.parents[1] / "trial.md").read_text(encoding="utf-8")))
    left = {path.name for path in digits_run.rglob("*") if path.is_file() and "plots" not in path.parts}
    assert not left - told
