"""The recipe for ChestX-ray14 from its command line to its run folder."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import chestxray
import numpy as np
import pytest
from finetune.options import parse_options
from finetune.runs.results import read_predictions
from finetune.runs.sections import read_sections
from finetune.sources.chestxray14 import load_chestxray14
from finetune.sources.nih_labels import LABELS
from sklearn.metrics import roc_auc_score
from small_runs import run_recipe
from small_trees import case_names, image_path, make_tree, write_boxes

QUICK = ["--model", "test_resnet", "--no-pretrained", "--image-size", "16", "--epochs", "1", "--inmerge-epochs", "1"]
CONFIGS = Path(chestxray.__file__).parent / "configs"


def run(*arguments: object) -> None:
    run_recipe(*arguments, recipe=chestxray.main)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "tree")


@pytest.fixture
def quick(tree: Path, tmp_path: Path) -> list[object]:
    folders = ["--data-dir", tree, "--prepared-dir", tmp_path / "prepared", "--output", tmp_path / "run"]
    return [*folders, *QUICK, "--batch-size", "16", "--prepare-workers", "0"]


def columns(path: Path) -> dict[str, list[str]]:
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    return dict(zip(header, zip(*rows, strict=True), strict=True))


def check_aurocs(folder: Path, part: str, auroc: float | None) -> None:
    """The mean AUROC of the labels that some cases have and others not, from the predictions file."""
    found = read_predictions(folder, part)
    labels, probabilities = found.labels, found.probabilities
    scored = [k for k in range(len(LABELS)) if len(set(labels[:, k])) == 2]
    expected = np.mean([roc_auc_score(labels[:, k], probabilities[:, k]) for k in scored])
    assert auroc == pytest.approx(expected, abs=1e-12)


def test_a_trial_names_patients_and_records_its_data(quick: list[object], tmp_path: Path) -> None:
    run(*quick)
    folder = tmp_path / "run"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["task"] == "multi-label"
    for arm in ("baseline", "inmerge"):
        predictions = columns(folder / f"seed_0/{arm}/predictions_test.csv")
        assert list(predictions) == [
            *("case", "patient"),
            *(f"{kind}_{label}" for kind in ("label", "prob") for label in LABELS),
        ]
        assert list(predictions["case"]) == case_names(30)[40:]
        assert [int(case[:8]) for case in predictions["case"]] == list(map(int, predictions["patient"]))
        check_aurocs(folder / f"seed_0/{arm}", "test", summary["arms"][arm]["auroc"]["values"][0])
    data = json.loads((folder / "data.json").read_text())
    assert data["label_file"] == "Data_Entry_2017.csv"
    assert data["leaks"] == []
    assert "pairs of images over the splits look alike" in data["near_twins"]
    assert (data["prepare_size"], data["image_size"], data["left_out"]) == (18, 16, {})
    assert {part: counts["images"] for part, counts in data["splits"].items()} == {"train": 34, "val": 6, "test": 20}
    assert json.loads((folder / "versions.json").read_text())["data"]["Data_Entry_2017.csv"] == data["sha256"]
    localisation = read_sections(folder)[-1]
    assert (localisation.title, list(localisation.rows)) == ("Localisation", [])
    assert localisation.text.startswith("Not done: there is no BBox_List_2017.csv in --data-dir")


def test_sections_stand_beside_the_trial(quick: list[object], tree: Path, tmp_path: Path) -> None:
    """The paper's table with this run's figures, the subgroups that there are, and boxes of two test images."""
    cases = case_names(30)[40:]
    write_boxes(tree, [f"{cases[3]},Infiltrate,0,0,256,1024", f"{cases[0]},Mass,0,0,1024,1024"])
    folder = tmp_path / "run"
    run(*quick, "--arms", "inmerge", "baseline")
    paper, subgroups, localisation = read_sections(folder)
    assert [paper.title, subgroups.title, localisation.title] == ["Beside the paper", "Subgroups", "Localisation"]

    summary = json.loads((folder / "summary.json").read_text())
    rows = {row[0]: dict(zip(paper.header, row, strict=True)) for row in paper.rows}
    assert list(rows)[:15] == [*(label.replace("_", " ") for label in LABELS), "Mean"]
    for arm in ("baseline", "inmerge"):
        mass = summary["per_class"][arm]["Mass"]
        low, high = mass["auroc"]["bootstrap_low"], mass["auroc"]["bootstrap_high"]
        assert rows["Mass"][f"AUROC, {arm}"] == f"{mass['auroc']['mean']:.3f} [{low:.3f}, {high:.3f}]"
        assert rows["Mass"][f"AUPRC, {arm}"] == f"{mass['auprc']['mean']:.3f}"
        assert rows["Mean"][f"AUROC, {arm}"].startswith(f"{summary['arms'][arm]['auroc']['mean']:.3f} [")
        assert rows["Edema"][f"AUROC, {arm}"] is rows["Edema"][f"AUPRC, {arm}"] is None
    printed = [rows[name]["AUROC, paper's Table 1"] for name in rows]
    assert printed[:2] + printed[13:16] == [".805", ".895", ".903", ".830", ".745"]
    assert sum(float(value) for value in printed[:14]) / 14 == pytest.approx(0.830, abs=0.001)

    assert [row[:3] for row in subgroups.rows] == [[name, "20", "10"] for name in ("view: PA", "sex: M", "age: 40-64")]
    assert [row[:3] for row in localisation.rows] == [
        ["Infiltration", "1", "0.188"],  # 4.5 of 18 columns, of which the first is cut off: the centres of 3 in 16
        ["Mass", "1", "1.000"],
        ["all", "2", "0.594"],
    ]
    for path, _ in localisation.figures:
        assert (folder / path).is_file()


def test_boxes_are_checked_before_anything_is_trained(
    quick: list[object], tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_boxes(tree, ["00000021_000.png,Mass,0,0,10"])
    with pytest.raises(SystemExit):
        run(*quick)
    assert "BBox_List_2017.csv, line 2: expected an image, a disease" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_crops_and_flips_are_the_same_for_both_arms_and_when_repeated(quick: list[object], tmp_path: Path) -> None:
    """With merge_prob 0 the arms are equal to the bit; resized without crop, they learn something else."""
    weights = []
    for name, options in (("run", []), ("again", []), ("uncropped", ["--prepare-size", "16"])):
        run(*quick, "--merge-prob", "0", "--output", tmp_path / name, *options)
        baseline, inmerge = (
            (tmp_path / name / "seed_0" / arm / "model.safetensors").read_bytes() for arm in ("baseline", "inmerge")
        )
        assert baseline == inmerge
        weights.append(baseline)
    assert weights[0] == weights[1] != weights[2]


def test_prepare_only_prepares_and_stops(
    quick: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(*quick, "--prepare-only")
    assert not (tmp_path / "run").exists()
    assert "34 in train, 6 in val, 20 in test" in capsys.readouterr().out
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "prepared").rglob("*.arrow"))
    run(*quick)
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "prepared").rglob("*.arrow")) == before


def test_resuming_on_other_images_is_refused(
    quick: list[object], tree: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run(*quick, "--seeds", "0")
    (tmp_path / "run/summary.json").unlink()
    image_path(tree, case_names(30)[7]).unlink()
    with pytest.raises(SystemExit):
        run(*quick, "--resume", "--allow-missing")
    assert "was begun with the files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data-dir", "absent"], "--data-dir absent is no folder"),
        ([], "give either --data-dir, the folder of NIH's files, or --hub"),
        (["--data-dir", ".", "--hub", "owner/name"], "give either --data-dir"),
        (["--data-dir", ".", "--hub-revision", "v2"], "--hub-revision has no effect without --hub"),
        (["--data-dir", ".", "--prepare-size", "200"], "--prepare-size 200 is less than --image-size 224"),
        (["--data-dir", ".", "--prepare-workers", "-1"], "--prepare-workers must be at least 0"),
        (["--data-dir", ".", "--val-fraction", "1"], "--val-fraction must be between 0 and 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    with pytest.raises(SystemExit) as exit_:
        run("--model", "test_resnet", "--no-pretrained", "--output", output, *arguments)
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert expected in message
    assert message.count("\n") == 1
    assert not output.exists()


def test_the_papers_settings_are_read() -> None:
    arguments = ["--config", str(CONFIGS / "paper_chestxray14.yaml"), "--data-dir", "."]
    options = parse_options(chestxray.ChestXrayOptions, arguments)
    assert (options.model, options.batch_size, options.epochs, options.inmerge_epochs) == ("vgg19", 324, 30, 10)
    assert (options.image_size, options.prepare_size, options.hflip, options.skip_layers) == (224, 224, 0.5, 10)


def test_the_published_codes_settings_are_read() -> None:
    arguments = ["--config", str(CONFIGS / "published_chestxray14.yaml"), "--data-dir", "."]
    options = parse_options(chestxray.ChestXrayOptions, arguments)
    assert (options.lr, options.sched, options.patience_epochs) == (0.1, "plateau", 8)
    assert (options.keep_by, options.start_from, options.arms[-1]) == ("loss", "kept", "validation-rounds")


@pytest.mark.parametrize("columns", [("Image Index", "fold"), ("case", "split")])
def test_a_split_of_ones_own_takes_the_place_of_the_official_lists(
    quick: list[object], tmp_path: Path, columns: tuple[str, str]
) -> None:
    """Five patients, one of whom the official lists test on; whomever it leaves out is in no part."""
    cases, parts = case_names(30), {0: "train", 1: "train", 2: "val", 3: "test", 29: "train"}
    rows = [f"{case},{parts[k // 2]}" for k, case in enumerate(cases) if k // 2 in parts]
    (tmp_path / "folds.csv").write_text("\n".join([",".join(columns), *rows]))
    arguments = [*map(str, quick), "--split-file", str(tmp_path / "folds.csv")]
    data = load_chestxray14(parse_options(chestxray.ChestXrayOptions, arguments))
    found = {part: split.cases for part, split in data.splits.items()}
    assert found == {"train": [*cases[:4], *cases[58:]], "val": cases[4:6], "test": cases[6:8]}
    assert "folds.csv" in data.files


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["Image Index,fold", "absent.png,train"], "names 1 images that chestxray14 doesn't have, such as absent.png"),
        (["Image Index,part", "00000001_000.png,train"], "has no column case"),
        (["Image Index,fold", "00000001_000.png,trian"], "has the split 'trian': expected train, val, test"),
        (["Image Index,fold", "00000001_000.png,train"], "leaves val empty: expected images in every part"),
        (
            [
                *("Image Index,fold", "00000001_000.png,train", "00000001_001.png,test"),
                *("00000002_000.png,val", "00000003_000.png,test"),
            ],
            "the test split shares 1 patients with the others",
        ),
        (None, "folds.csv is no file: give a CSV of images and their splits"),
    ],
)
def test_a_split_that_can_not_be_used_is_told(
    quick: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[str] | None, message: str
) -> None:
    if rows is not None:
        (tmp_path / "folds.csv").write_text("\n".join(rows))
    with pytest.raises(SystemExit, match="2"):
        run(*quick, "--split-file", tmp_path / "folds.csv")
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_real_images_with_given_weights(shared_file, tmp_path: Path) -> None:
    """A part of the real data, official lists, trained for a few epochs; every AUROC follows from its file."""
    data, weights = shared_file("data/nih-mini"), shared_file("weights/efficientnet_lite0.safetensors")
    arguments = ["--data-dir", data, "--prepared-dir", tmp_path / "prepared", "--image-size", "64"]
    arguments += ["--model", "efficientnet_lite0", "--checkpoint", weights, "--batch-size", "64"]
    run(*arguments, "--epochs", "2", "--inmerge-epochs", "2", "--output", tmp_path / "run")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    for arm in ("baseline", "inmerge"):
        predictions = columns(tmp_path / f"run/seed_0/{arm}/predictions_test.csv")
        assert set(predictions["case"]) == set((data / "test_list.txt").read_text().split())
        check_aurocs(tmp_path / f"run/seed_0/{arm}", "test", summary["arms"][arm]["auroc"]["values"][0])
    assert sum(layer["merged"] for layer in summary["merges"]["inmerge"].values()) > 0
    paper, subgroups, localisation = read_sections(tmp_path / "run")
    assert None not in paper.rows[0]
    parts = [row[0] for row in subgroups.rows if not row[0].startswith("gap of ")]
    assert parts[:4] == ["view: AP", "view: PA", "sex: F", "sex: M"]
    assert "Of 984 findings with boxes, 116 are of images in this test set." in localisation.text
    assert localisation.rows[-1][:2] == ["all", "116"]
    assert len(localisation.figures) == 8
