"""A zoo among files of others, with damaged cells, and with cells that other jobs work on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import model_zoo
import pytest
from finetune.judging.summary import SCHEMA
from finetune.runs.lock import hold_run
from finetune.zoo import check_zoo, write_zoo
from small_runs import run_recipe

GRID = ["--datasets", "digits", "--models", "test_resnet", "--no-pretrained", "--image-size", "16", "--hflip", "0.5"]
GRID += ["--epochs", "2", "--inmerge-epochs", "2", "--similarity-threshold", "-0.5", "--output", "zoo"]


@pytest.fixture
def zoo(digits_run: Path, tmp_path: Path) -> Path:
    """Two finished cells."""
    for name in ("a", "b"):
        shutil.copytree(digits_run, tmp_path / "zoo" / name)
    return tmp_path / "zoo"


@pytest.mark.parametrize("name", ["zoo.csv", "zoo.md", "zoo.png"])
@pytest.mark.parametrize("put", [lambda path: path.write_text("mine"), Path.mkdir, os.mkfifo])
def test_files_of_others_are_not_written_over(
    attack: Callable[..., str], tmp_path: Path, name: str, put: Callable[[Path], None]
) -> None:
    (tmp_path / "zoo").mkdir()
    put(tmp_path / "zoo" / name)
    assert f"zoo/{name} is there, and not by inmerge_optim" in attack(*GRID, recipe=model_zoo.main)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--merge-prob", "1.5"],
        ["--similarity-threshold", "4dd"],
        ["--skip-layers", "99"],
        ["--opt", "sdg"],
        ["--models", "test_resnet", "test_vit"],
        ["--tracker", "mlflow"],
        ["--lr", "nan"],
        ["--output", "/proc/inmerge/zoo"],
        ["--output", "x" * 300],
    ],
)
def test_options_are_refused_before_any_cell_is_begun(attack: Callable[..., str], arguments: list[str]) -> None:
    """They once left an error file for each cell."""
    assert attack(*GRID, *arguments, recipe=model_zoo.main)


@pytest.mark.parametrize(
    "damage",
    [
        lambda cell: (cell / "summary.json").write_text("{"),
        lambda cell: (cell / "summary.json").write_text("[]"),
        lambda cell: (cell / "summary.json").write_text(json.dumps({"schema": SCHEMA})),
        lambda cell: (cell / "config.yaml").write_text("a: [b: c"),
        lambda cell: (cell / "expected_merges.json").write_text("[" * 100_000),
        lambda cell: (cell / "seed_0/baseline/timing.json").write_text("null"),
        lambda cell: (cell / "link").symlink_to("/etc"),
    ],
)
def test_a_damaged_cell_is_named_and_the_others_have_their_rows(zoo: Path, damage: Callable[[Path], object]) -> None:
    damage(zoo / "a")
    text = write_zoo(zoo)
    assert "- a: not in the table, " in text
    assert text.count("| digits | test_resnet | inmerge |") == 1
    check_zoo(zoo)  # over its own it writes again
    (zoo / "a.error.json").write_text("{")
    assert "- a: failed, a.error.json can't be read" in write_zoo(zoo)


def test_a_cells_name_is_a_text(zoo: Path) -> None:
    (zoo / "a").rename(zoo / "<script>![](http:x) | \x1b[2J")
    (zoo / "<script>![](http:x) | \x1b[2J.error.json").write_text(json.dumps({"error": "\x1b[2J<b>"}))
    text = write_zoo(zoo)
    assert "- \\<script>!\\[](http:x) | \\x1b[2J: failed, \\x1b[2J\\<b>" in text


def test_a_cell_that_another_job_works_on_is_left_to_it(
    zoo: Path, digits_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no failure; the next call finds it finished."""
    monkeypatch.chdir(zoo.parent)
    with hold_run(zoo / "digits-test_resnet"):
        run_recipe(*GRID, recipe=model_zoo.main)
    output = capsys.readouterr().out
    assert "digits-test_resnet is left out here: zoo/digits-test_resnet is in use by process" in output
    assert not list(zoo.glob("*.error.json"))
