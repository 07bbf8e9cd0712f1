"""The arms beside the baseline: what each does, and that a stopped one goes on to the same files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import finetune.training.stage
import pytest
import torch
from accelerate import Accelerator
from finetune.training.averages import recalibrate_batch_norm
from safetensors.torch import load_file
from small_runs import assert_same, run_digits, run_digits_until

QUICK = ["--batch-size", "400", "--epochs", "1"]
CONTROLS = [*QUICK, "--arms", "baseline", "inmerge", "random-pairs", "dissimilar", "--cooldown-epochs", "1"]


@pytest.fixture(scope="module")
def controls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all merging arms, whose second of two epochs is a cooldown."""
    torch.set_num_threads(1)
    return run_digits(tmp_path_factory.mktemp("controls") / "run", *CONTROLS, "--similarity-threshold", "0.05")


def merges_of(run: Path, arm: str) -> list[dict[str, str]]:
    with (run / f"seed_0/{arm}/merges.csv").open() as file:
        return list(csv.DictReader(file))


def test_every_arm_is_trained_and_compared(controls: Path) -> None:
    summary = json.loads((controls / "summary.json").read_text())
    assert set(summary["differences"]) == {"inmerge", "random-pairs", "dissimilar"}
    assert set(summary["contrasts"]) == {"inmerge - random-pairs"}
    assert len(summary["verdicts"]) == 4
    weights = {(controls / f"seed_0/{arm}/model.safetensors").read_bytes() for arm in summary["arms"]}
    assert len(weights) == 4


def test_controls_draw_what_inmerge_draws(controls: Path) -> None:
    """random-pairs merges some of the same draws, and at the first step as many; dissimilar merges the rest."""
    drawn = {
        arm: [row["drawn"] for row in merges_of(controls, arm)] for arm in ("inmerge", "random-pairs", "dissimilar")
    }
    assert drawn["inmerge"] == drawn["random-pairs"] == drawn["dissimilar"]
    assert sum(int(row["merged"]) for row in merges_of(controls, "random-pairs")) > 0


def test_cooldown_merges_nothing(controls: Path) -> None:
    for arm in ("inmerge", "random-pairs", "dissimilar"):
        rows = merges_of(controls, arm)
        assert sum(int(row["merged"]) for row in rows if row["epoch"] == "1") > 0
        assert {row["drawn"] for row in rows if row["epoch"] == "2"} == {"0"}


def test_controls_without_merges_equal_the_baseline(tmp_path: Path) -> None:
    run = run_digits(tmp_path / "run", *CONTROLS, "--merge-prob", "0")
    arms = [load_file(run / f"seed_0/{arm}/model.safetensors") for arm in ("baseline", "random-pairs", "dissimilar")]
    for weights in arms[1:]:
        assert all(torch.equal(weights[name], arms[0][name]) for name in arms[0])


def run_stopped(monkeypatch: pytest.MonkeyPatch, run: Path, call: int, *arguments: str) -> None:
    """Run until the given call of train_epoch, then go on with --resume."""
    run_digits_until(monkeypatch, run, finetune.training.stage, "train_epoch", call, *arguments)
    run_digits(run, *arguments, "--resume")


def test_stopped_controls_go_on_to_the_same_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, controls: Path
) -> None:
    """Stopped between the merging epoch of random-pairs and its cooldown."""
    run_stopped(monkeypatch, tmp_path / "run", 7, *CONTROLS, "--similarity-threshold", "0.05")
    assert_same(tmp_path / "run", controls)


AVERAGES = [*QUICK, "--arms", "baseline", "inmerge", "ema", "swa", "--merge-prob", "0", "--recalibrate-bn"]


@pytest.fixture(scope="module")
def averages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return run_digits(tmp_path_factory.mktemp("averages") / "run", *AVERAGES)


def test_averages_differ_from_what_they_average(averages: Path) -> None:
    """But an arm that does nothing equals the baseline, statistics of batch norm included."""
    arms = ("baseline", "inmerge", "ema", "swa")
    files = {arm: (averages / f"seed_0/{arm}/model.safetensors").read_bytes() for arm in arms}
    assert files["baseline"] == files["inmerge"]
    assert len(set(files.values())) == 3


@pytest.mark.parametrize(("arm", "epoch"), [("ema", 7), pytest.param("swa", 9, marks=pytest.mark.slow)])
def test_stopped_averages_go_on_to_the_same_files(
    arm: str, epoch: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, averages: Path
) -> None:
    """Stopped between the two epochs of the arm."""
    run_stopped(monkeypatch, tmp_path / arm, epoch, *AVERAGES)
    assert_same(tmp_path / arm, averages)


def test_averaging_leaves_training_as_it_is(averages: Path) -> None:
    """The loss of every epoch is the baseline's: what is evaluated has no influence on what is trained."""

    def losses(arm: str) -> list[str]:
        with (averages / f"seed_0/{arm}/metrics.csv").open() as file:
            return [row["train_loss"] for row in csv.DictReader(file)]

    assert losses("ema") == losses("swa") == losses("baseline")


def test_recalibrated_statistics_are_those_of_the_training_images() -> None:
    """The running mean becomes the mean over all inputs, and training's own momentum is kept."""
    model, inputs = torch.nn.BatchNorm2d(3), torch.randn(6, 4, 3, 5, 5) + 2
    recalibrate_batch_norm(Accelerator(cpu=True), model, inputs)
    torch.testing.assert_close(model.running_mean, inputs.mean(dim=(0, 1, 3, 4)))
    assert model.momentum == 0.1


def test_validation_rounds_merge_without_steps_after_each_epoch(tmp_path: Path) -> None:
    """As many rounds as are asked for, on top of what the steps draw, and what follows trains on from them."""
    arms = ["--arms", "baseline", "inmerge", "validation-rounds", "--merge-rounds", "30", "--limit-train", "400"]
    run = run_digits(tmp_path / "run", *QUICK, *arms, "--similarity-threshold", "0.05")
    drawn = {
        arm: [int(row["drawn"]) for row in merges_of(run, arm) if row["epoch"] == "2"]
        for arm in ("inmerge", "validation-rounds")
    }
    steps, rounds = sum(drawn["inmerge"]), sum(drawn["validation-rounds"])
    assert rounds / steps == pytest.approx(31, rel=0.3)  # one step of 400 images, and 30 rounds
    with (
        (run / "seed_0/inmerge/metrics.csv").open() as file,
        (run / "seed_0/validation-rounds/metrics.csv").open() as other,
    ):
        losses, others = ([row["train_loss"] for row in csv.DictReader(table)] for table in (file, other))
    assert losses[0] == others[0]
    assert losses[1] != others[1]
