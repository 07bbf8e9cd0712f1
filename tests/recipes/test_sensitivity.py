"""The recipe that sweeps over merge settings: a trial with an arm per point, its panels and table, its confirmation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import finetune.reports.sweep
import pytest
import sensitivity
import torch
from finetune.options import parse_options
from finetune.reports.sweep import best_on_validation, sweep_section
from finetune.runs.finished import FinishedRun
from finetune.sources.options import ChestXrayOptions, options_of_data, with_own_options
from finetune.training.points import read_sweeps, sweep_arms
from small_runs import run_recipe

CONFIGS = Path(sensitivity.__file__).parent / "configs"
DIGITS = ["--dataset", "digits", "--model", "test_resnet", "--no-pretrained", "--image-size", "16"]
SHORT = ["--epochs", "1", "--inmerge-epochs", "1", "--limit-train", "200", "--batch-size", "100"]
SWEEPS = ["--sweep", "skip_layers=0.6,0.8", "similarity_threshold=dissimilar,-0.5", "--sweep=merge_prob=0.1"]
ARMS = [
    "inmerge",
    "inmerge@skip_layers=0.8",
    "dissimilar",
    "inmerge@similarity_threshold=-0.5",
    "inmerge@merge_prob=0.1",
]


def run(output: Path, *arguments: object) -> Path:
    run_recipe(*DIGITS, *SHORT, *SWEEPS, "--output", output, *arguments, recipe=sensitivity.main)
    return output


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return run(tmp_path_factory.mktemp("swept") / "run", "--confirm-seeds", "5")


def test_a_sweep_is_one_trial_with_an_arm_per_point(swept: Path) -> None:
    """The seed has one backbone for all points, and each merges by its own settings."""
    summary = json.loads((swept / "summary.json").read_text())
    assert list(summary["arms"]) == ["baseline", *ARMS]
    assert {path.name for path in (swept / "seed_0").iterdir()} == {"backbone", "baseline", *ARMS}
    assert [found["outcome"] for found in summary["verdicts"]] == ["not judged"] * 5
    merged = {arm: sum(count["merged"] for count in layers.values()) for arm, layers in summary["merges"].items()}
    drawn = {arm: sum(count["drawn"] for count in layers.values()) for arm, layers in summary["merges"].items()}
    assert merged["inmerge@similarity_threshold=-0.5"] == drawn["inmerge"] > merged["inmerge"]
    assert merged["dissimilar"] + merged["inmerge"] == pytest.approx(drawn["inmerge"], abs=3)
    assert drawn["inmerge@merge_prob=0.1"] < drawn["inmerge"] / 2


def test_the_section_has_the_panels_of_the_figure_and_a_row_per_point(
    swept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One panel is drawn here; to lay out those of ten classes takes seconds each."""
    real = finetune.reports.sweep.write_figure
    drawn = swept / "plots/sweep_c.png"
    monkeypatch.setattr(
        finetune.reports.sweep, "write_figure", lambda path, figure: real(path, figure) if path == drawn else None
    )
    section = sweep_section(FinishedRun(swept))
    assert section.header[:3] == ("skip_layers", "merge_prob", "similarity_threshold")
    assert [row[:3] for row in section.rows] == [
        ["0.6", "0.3", "0.3"],
        ["0.8", "0.3", "0.3"],
        ["0.6", "0.3", "dissimilar"],
        ["0.6", "0.3", "-0.5"],
        ["0.6", "0.1", "0.3"],
    ]
    names = ["sweep_a", "sweep_a_per_class", "sweep_b", "sweep_b_per_class", "sweep_c", "sweep_c_per_class"]
    assert [path for path, _ in section.figures] == [f"plots/{name}.png" for name in names]
    assert drawn.read_bytes().startswith(b"\x89PNG")
    assert "A maximum picked from a sweep is not a result: the best of 5 points" in section.text
    assert f"On validation the best one is {best_on_validation(FinishedRun(swept))}." in section.text


def test_a_trial_without_points_has_no_such_section(digits_run: Path) -> None:
    assert sweep_section(FinishedRun(digits_run)) is None


def test_the_point_that_validation_chose_is_confirmed_on_fresh_seeds_alone(swept: Path) -> None:
    confirmed = FinishedRun(swept / "confirmation")
    assert confirmed.seeds == [5]
    assert confirmed.arms == ["baseline", best_on_validation(FinishedRun(swept))]


def test_points_are_added_and_done_ones_are_left_alone(swept: Path, tmp_path: Path) -> None:
    """A point more trains one arm per seed; what was there stays as it was, the confirmation aside."""
    copy = shutil.copytree(swept, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in copy.glob("seed_*/*/model.safetensors")}
    run(copy, "--sweep", "merge_weight=0.5", "--resume")
    after = {path: path.stat().st_mtime_ns for path in copy.glob("seed_*/*/model.safetensors")}
    assert before.items() <= after.items()
    assert {path.parent.name for path in after.keys() - before.keys()} == {"inmerge@merge_weight=0.5"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sweep", "merge_prop=0.1"], "unknown setting 'merge_prop': did you mean merge_prob"),
        (["--sweep", "merge_prob=2"], "merge_prob is 2.0, but it must be a number from 0 to 1"),
        (["--sweep"], "there is nothing to sweep over"),
        ([], "there is nothing to sweep over"),
        (["--sweep", "skip_layers=99"], "test_resnet can't be merged with these options"),
        (["--sweep", "skip_layers=0", "--confirm-seeds", "0"], "--confirm-seeds 0 are among --seeds"),
        (["--sweep", "skip_layers=0", "--dataset", "pneumonia"], "--dataset pneumonia is no 2D set of MedMNIST"),
        (["--sweep", "skip_layers=0", "--dataset", "chestxray14"], "give either --data-dir, the folder of NIH's files"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_recipe(*DIGITS, "--output", tmp_path / "run", *arguments, recipe=sensitivity.main)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_papers_sweep_is_a_config() -> None:
    """With the options of the recipe for ChestX-ray14, of which --hflip has a default of its own."""
    arguments = ["--config", str(CONFIGS / "paper_fig2.yaml"), "--data-dir", "."]
    of_data = options_of_data(arguments)
    assert of_data is ChestXrayOptions
    options = parse_options(with_own_options(sensitivity.SweepOptions, of_data), arguments)
    assert (options.model, options.skip_layers, options.hflip, options.prepare_size) == ("vgg19", 10, 0.5, 224)
    assert options.sweep[0] == "skip_layers=0,5,10,15"
    assert len(sweep_arms(read_sweeps(options.sweep), options, crossed=False)) == 15
