"""The zoo: a grid of trials in shards, killed and gone on with, that ends in one table of all cells."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import finetune.training.stage
import model_zoo
import pytest
import torch
from finetune.judging.pooling import holm, pool
from finetune.zoo import write_zoo
from small_runs import content_of, run_digits, run_recipe

RECIPES = Path(model_zoo.__file__).parent
# A small ConvNeXt has but one layer to merge.
pytestmark = pytest.mark.filterwarnings("ignore:only .* counted layers of ConvNeXt:UserWarning")
KILLED = Path(__file__).parent / "finetune" / "training" / "killed_recipe.py"
SETTINGS = ["--no-pretrained", "--image-size", "16", "--epochs", "1", "--inmerge-epochs", "1", "--seeds", "0", "1"]
SETTINGS += ["--limit-train", "400", "--batch-size", "100", "--similarity-threshold", "q0.8"]
GRID = ["--datasets", "digits", "--models", "test_resnet", "test_byobnet", "dla46_c"]
CELLS = ["digits-test_byobnet", "digits-test_resnet"]


def run_zoo(zoo: Path, *arguments: str) -> None:
    run_recipe(*GRID, *SETTINGS, "--output", zoo, *arguments, recipe=model_zoo.main)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo run in two shards, the first of which SIGKILL ended while an arm trained."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("zoo") / "zoo"
    command = [sys.executable, KILLED, "model_zoo", "training.stage", "train_epoch", 3, 0.05, *GRID, *SETTINGS]
    killed = subprocess.run(
        [*map(str, command), "--output", str(folder), "--shard", "1/2"],
        env={"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{RECIPES}{os.pathsep}{RECIPES.parent}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (folder / "digits-test_resnet/seed_0/baseline/result.json").exists()
    assert not (folder / "digits-test_resnet/summary.json").exists()
    with pytest.raises(SystemExit, match="1"):
        run_zoo(folder, "--shard", "1/2")
    assert not (folder / "digits-test_byobnet").exists()
    run_zoo(folder, "--shard", "2/2")
    return folder


def table_of(zoo: Path) -> list[dict[str, str]]:
    with (zoo / "zoo.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_table_has_a_row_per_cell_with_the_figures_of_its_trial(zoo: Path) -> None:
    rows = table_of(zoo)
    assert [f"{row['dataset']}-{row['model']}" for row in rows] == CELLS
    for name, row in zip(CELLS, rows, strict=True):
        summary = json.loads((zoo / name / "summary.json").read_text())
        difference = summary["differences"]["inmerge"]["auroc"]
        assert float(row["difference"]) == difference["mean"]
        for key in ("low", "high", "t_low", "t_high", "bootstrap_low", "bootstrap_high", "p"):
            assert float(row[key]) == difference[key]
        assert (row["metric"], row["outcome"]) == ("auroc", summary["verdicts"][0]["outcome"])
        merges = summary["merges"]["inmerge"].values()
        assert int(row["merged"]) == sum(count["merged"] for count in merges)
        assert float(row["merge_rate"]) == int(row["merged"]) / sum(count["drawn"] for count in merges)
        # A quantile merges as many whatever the weights are.
        assert float(row["expected_merges"]) == pytest.approx(int(row["merged"]), rel=0.1)
        assert 0.2 < float(row["cost"]) < 5
    markdown = (zoo / "zoo.md").read_text()
    assert all(f"| digits | {row['model']} | inmerge |" in markdown for row in rows)
    assert (zoo / "zoo.png").read_bytes().startswith(b"\x89PNG")


def test_the_family_was_declared_and_one_data_set_is_not_pooled(zoo: Path) -> None:
    """The cell that failed counts as a comparison; what is added later would have no adjusted p."""
    family = json.loads((zoo / "family.json").read_text())
    assert family == [f"digits-{model}-inmerge" for model in ("test_resnet", "test_byobnet", "dla46_c")]
    found = {f"digits-{row['model']}-inmerge": row for row in table_of(zoo)}
    adjusted = holm({name: float(found[name]["p"]) if name in found else None for name in family})
    assert {name: float(row["p_adjusted"]) for name, row in found.items()} == {name: adjusted[name] for name in found}
    assert "- inmerge: not pooled, differences are pooled over 3 data sets at least" in (zoo / "zoo.md").read_text()
    assert json.loads((zoo / "pooled.json").read_text()) == {}


def cell_of(model: Path, zoo: Path, dataset: str) -> Path:
    """The cell of a model on digits, as that of another data set; without the checksum of its config.yaml."""
    cell = shutil.copytree(model, zoo / f"{dataset}-test_resnet")
    settings = (cell / "config.yaml").read_text().partition("\n")[2]
    (cell / "config.yaml").write_text(settings.replace("dataset: digits", f"dataset: {dataset}"))
    return cell


def test_several_data_sets_are_pooled(zoo: Path, tmp_path: Path) -> None:
    """Cells of four data sets, made from one by its name and its differences; the copies are in no family."""
    (model,) = (name for name in CELLS if "resnet" in name)
    for place, dataset in enumerate(("digits", "a", "b", "c")):
        cell = cell_of(zoo / model, tmp_path, dataset)
        summary = cell / "summary.json"
        content = json.loads(summary.read_text())
        content["differences"]["inmerge"]["auroc"] |= {"mean": 0.01 * place, "standard_error": 0.01}
        summary.write_text(json.dumps(content))
    shutil.copy(zoo / "family.json", tmp_path)
    text = write_zoo(tmp_path)
    expected = pool([0.0, 0.01, 0.02, 0.03], [0.01] * 4, list("dabc"))
    assert json.loads((tmp_path / "pooled.json").read_text()) == {"inmerge": pytest.approx(asdict(expected))}
    assert "over 4 data sets" in text
    assert [row["dataset"] for row in table_of(tmp_path) if row["p_adjusted"]] == ["digits"]


def test_an_arm_that_diverged_has_a_row_and_is_not_pooled(zoo: Path, tmp_path: Path) -> None:
    """A cell of a binary task whose inmerge diverged in all seeds; the positive class is named."""
    for dataset in ("digits", "a", "b", "c"):
        cell = cell_of(zoo / "digits-test_resnet", tmp_path, dataset)
    summary = json.loads((cell / "summary.json").read_text())
    summary["verdicts"][0]["outcome"] = "diverged"
    summary["positive"] = "malignant"
    for part in ("arms", "differences", "merges"):
        del summary[part]["inmerge"]
    (cell / "summary.json").write_text(json.dumps(summary))
    shutil.copy(zoo / "family.json", tmp_path)
    text = write_zoo(tmp_path)
    row = next(row for row in table_of(tmp_path) if row["dataset"] == "c")
    assert (row["outcome"], row["positive"], row["difference"], row["value"]) == ("diverged", "malignant", "", "")
    assert "| c (positive: malignant) | test_resnet | inmerge |" in text
    assert "- inmerge: not pooled, training diverged in c-test_resnet, so that what is left is no fair sample" in text


def test_a_failed_cell_is_told_of_with_its_error(zoo: Path) -> None:
    failed = json.loads((zoo / "digits-dla46_c.error.json").read_text())
    assert failed["error"].startswith("--image-size 16 does not fit dla46_c")
    assert "Traceback" in failed["traceback"]
    assert f"- digits-dla46_c: failed, {failed['error']}" in (zoo / "zoo.md").read_text()


def test_a_killed_cell_ends_as_the_recipe_for_one_model_does(zoo: Path, tmp_path: Path) -> None:
    alone = content_of(run_digits(tmp_path / "run", *SETTINGS))
    cell = content_of(zoo / "digits-test_resnet")
    names = [name for name in alone if name.startswith("seed_")]
    assert len(names) > 20
    assert [name for name in names if cell[name] != alone[name]] == []


def test_a_finished_cell_is_not_run_again(
    zoo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(finetune.training.stage, "train_epoch", None)
    before = {name: content_of(zoo / name) for name in CELLS}
    (zoo / "zoo.csv").unlink()
    with pytest.raises(SystemExit, match="1"):  # for dla46_c, which fails again
        run_zoo(zoo)
    assert {name: content_of(zoo / name) for name in CELLS} == before
    assert [row["model"] for row in table_of(zoo)] == ["test_byobnet", "test_resnet"]
    assert "digits-dla46_c: failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shard", "3/2"], "--shard 3/2 must be i/n with i from 1 to n"),
        (["--models", "resnet81"], "--model resnet81 is unknown to timm: did you mean resnet"),
        (["--models", "test_vit", "test_vit"], "--models test_vit test_vit names one twice"),
        (["--datasets", "pneumonia"], "--dataset pneumonia is no 2D set of MedMNIST"),
        (["--models", "test_vit"], "test_vit can't be merged with these options"),
        (["--lr", "0.3"], "was begun with --lr 0.01, not 0.3"),
        (["--pretrained", "--checkpoint", "x.pth"], "--checkpoint x.pth holds the weights of one model"),
    ],
)
def test_bad_input_is_one_sentence(
    zoo: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_zoo(zoo, *arguments)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_papers_numbers_of_skipped_layers_are_the_default() -> None:
    required = ["--datasets", "digits", "--models", "vgg19", "resnet34", "resnet18"]
    for arguments, expected in (([], [10, 30, 0.6]), (["--skip-layers", "4"], [4, 4, 4])):
        options = model_zoo.parse_options(model_zoo.ZooOptions, [*required, *arguments])
        assert [cell.skip_layers for cell in model_zoo._cells(options)] == expected
