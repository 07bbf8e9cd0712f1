"""Arms that are tuned before the trial, on validation images and seeds that it doesn't use."""

from __future__ import annotations

import json
from pathlib import Path

import model_zoo
import pytest
import sensitivity
from finetune.reports.sweep import best_on_validation, mean_on_validation
from finetune.runs.finished import FinishedRun
from small_runs import content_of, run_digits, run_recipe

QUICK = ["--epochs", "0", "--inmerge-epochs", "1", "--limit-train", "100", "--batch-size", "50", "--seeds", "0"]
GRID = ["weight-decay@weight_decay=0.001", "weight-decay@weight_decay=10.0"]
TUNED = [*QUICK, "--arms", "baseline", "weight-decay", "--tune", *GRID]


def test_the_best_point_on_validation_takes_the_place_of_the_bare_arm(tmp_path: Path) -> None:
    """On the trial's own seed no other point is trained; what was tried and spent stands in its run folder."""
    run = run_digits(tmp_path / "run", *TUNED, "--tune-seeds", "7")
    grid = FinishedRun(tmp_path / "run-tuning")
    assert (grid.seeds, grid.arms) == ([7], ["baseline", *GRID])
    best = best_on_validation(grid)
    assert mean_on_validation(grid, best) == max(mean_on_validation(grid, arm) for arm in GRID)
    assert FinishedRun(run).arms == ["baseline", best]
    (section,) = json.loads((run / "sections.json").read_text())
    assert section["title"] == "Tuning"
    assert section["text"].startswith(f"{best} was chosen of 2 settings by the mean AUROC on validation over seeds 7, ")
    assert "The budget was 2 stages of 1 epochs, and as many backbones as seeds" in section["text"]
    assert [row[0] for row in section["rows"]] == ["baseline", *GRID]
    before = content_of(tmp_path)
    run_digits(run, *TUNED, "--tune-seeds", "7", "--resume")
    assert content_of(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tune", GRID[0]], "have no effect alone: give both"),
        (["--tune-seeds", "7"], "have no effect alone: give both"),
        (["--tune", GRID[0], "--tune-seeds", "0", "7"], "--tune-seeds 0 are among --seeds"),
        (["--tune", "weight-decay@weight_decay=1.0", "--tune-seeds", "7", "--arms", "baseline"], "settings of one arm"),
        (["--tune", GRID[0], "inmerge@merge_prob=0.1", "--tune-seeds", "7"], "must be settings of one arm"),
        (["--tune", "baseline@weight_decay=1.0", "--tune-seeds", "7"], "must be settings of one arm"),
        (
            ["--tune", GRID[0], "--tune-seeds", "7", "--arms", "baseline", "weight-decay", GRID[0]],
            "by its bare name alone",
        ),
        (["--tune", "weight-decay@lr=1", "--tune-seeds", "7"], "'lr=1' sets none of"),
    ],
)
def test_what_is_no_tuning_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_digits(tmp_path / "run", *QUICK, "--arms", "baseline", "weight-decay", *arguments)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.rglob("seed_*"))


@pytest.mark.parametrize(
    ("recipe", "arguments"),
    [
        (model_zoo.main, ["--models", "test_resnet", "--datasets", "digits"]),
        (sensitivity.main, ["--dataset", "digits", "--model", "test_resnet", "--sweep", "merge_prob=0.1"]),
    ],
)
def test_recipes_of_many_trials_refuse_to_tune(capsys: pytest.CaptureFixture[str], recipe, arguments) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_recipe(*arguments, "--tune-seeds", "7", recipe=recipe)
    assert "--tune and --tune-seeds have no effect here" in capsys.readouterr().err
