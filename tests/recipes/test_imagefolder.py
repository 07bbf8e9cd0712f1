"""The recipe for one's own images from its command line to its run folder."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import datasets
import imagefolder
import numpy as np
import pytest
import torch
from datasets.table import embed_table_storage
from finetune.data.tasks import Task
from finetune.errors import InputError
from finetune.files import write_csv
from finetune.judging.temperature import fit_temperatures
from finetune.options import parse_options
from finetune.prediction import kept_model, predict_files
from finetune.reports.look import look_at
from finetune.runs import folds
from finetune.runs.finished import FinishedRun
from finetune.runs.results import read_predictions
from finetune.runs.sections import read_sections
from finetune.sources.imagefolder import OwnImagesOptions, find_own_images, load_own_images
from finetune.sources.nih_labels import LABELS
from finetune.training import stage
from PIL import Image, ImageFilter, ImageOps
from sklearn.metrics import roc_auc_score
from small_folders import class_folders, pixels, write_images, write_table
from small_runs import Killed, content_of, kill_at, run_recipe

QUICK = ["--model", "test_resnet", "--no-pretrained", "--image-size", "16", "--epochs", "1", "--inmerge-epochs", "1"]
QUICK += ["--batch-size", "16", "--prepare-workers", "0"]
XRAYS = 200
NO_FINDING = "No Finding"

Run = Callable[..., Path]


def run_in(folder: Path, *arguments: object, name: str = "run", report: bool = False) -> Path:
    """Run the recipe with these arguments; the run folder, which lies in the given one."""
    folders = ["--prepared-dir", folder / "prepared", "--output", folder / name]
    run_recipe(*folders, *QUICK, *arguments, recipe=imagefolder.main, report=report)
    return folder / name


def parsed(folder: Path, *arguments: object) -> OwnImagesOptions:
    """The options that the recipe makes of these arguments."""
    arguments = ("--image-size", 16, "--prepare-workers", 0, "--prepared-dir", folder / "prepared", *arguments)
    return parse_options(OwnImagesOptions, [str(argument) for argument in arguments])


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return partial(run_in, tmp_path)


@pytest.fixture
def refused(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the recipe with arguments that it refuses, and see that it writes nothing; its sentence."""

    def refused(*arguments: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run(*arguments)
        assert ended.value.code == 2
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().err.splitlines()[-1]

    return refused


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def as_folders(source: Path, xrays: list[dict[str, str]], folder: Path) -> list[object]:
    """A folder of those with a finding and one of those without."""
    for xray in xrays:
        kind = "none" if xray["Finding Labels"] == NO_FINDING else "finding"
        (folder / kind).mkdir(parents=True, exist_ok=True)
        os.link(_found(source, xray), folder / kind / xray["Image Index"])
    return ["--data-dir", folder, "--patient-regex", r"(\d+)_\d+\.png"]


def as_table(source: Path, xrays: list[dict[str, str]], folder: Path) -> list[object]:
    """NIH's columns of image, patient and view, and one of 0 and 1 for each label."""
    folder.mkdir()
    rows = []
    for xray in xrays:
        found = xray["Finding Labels"].split("|")
        rows.append(
            [
                *(xray[name] for name in ("Image Index", "Patient ID", "View Position")),
                *(int(label in found) for label in LABELS),
            ]
        )
    path = write_table(folder / "labels.csv", ["Image Index", "Patient ID", "View Position", *LABELS], rows)
    return ["--csv", path, "--data-dir", source, "--label-columns", *LABELS]


def as_parquet(source: Path, xrays: list[dict[str, str]], folder: Path) -> list[object]:
    """A list of labels, with the images in the file."""
    columns = {
        "image": [str(_found(source, xray)) for xray in xrays],
        "labels": [[name for name in xray["Finding Labels"].split("|") if name != NO_FINDING] for xray in xrays],
        "patient": [int(xray["Patient ID"]) for xray in xrays],
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "labels": datasets.List(datasets.ClassLabel(names=list(LABELS))),
            "patient": datasets.Value("int64"),
        }
    )
    folder.mkdir()
    rows = datasets.Dataset.from_dict(columns, features).with_format("arrow")
    rows.map(embed_table_storage, batched=True).to_parquet(folder / "xrays.parquet")
    return ["--hub", folder]


def _found(source: Path, xray: dict[str, str]) -> Path:
    return next(source.glob(f"images_*/images/{xray['Image Index']}"))


@pytest.mark.parametrize("source", [as_folders, as_table, as_parquet])
def test_chest_xrays_from_each_source(
    source: Callable[..., list[object]],
    shared_file: Callable[[str], Path],
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same labels and patients, nobody in two splits, and a trial on them."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    nih = shared_file("data/nih-mini")
    table = rows_of(nih / "Data_Entry_2017_v2020.csv")
    there = {path.name for path in nih.glob("images_*/images/*.png")}
    xrays = [row for row in table if row["Image Index"] in there][:XRAYS]
    folder = run(*source(nih, xrays, tmp_path / "made"))
    split = {row["case"].rpartition("/")[2]: row for row in rows_of(folder / "split.csv")}
    assert sorted(split) == sorted(row["Image Index"] for row in xrays)
    for xray in xrays:
        found = split[xray["Image Index"]]
        labels = {name for name in xray["Finding Labels"].split("|") if name != NO_FINDING}
        if source is as_folders:
            assert found["labels"] == ("finding" if labels else "none")
        else:
            assert set(found["labels"].split("|")) - {"", "none"} == labels
        assert int(found["patient"]) == int(xray["Patient ID"])
    patients = {part: {row["patient"] for row in split.values() if row["split"] == part} for part in ("train", "test")}
    assert not patients["train"] & patients["test"]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["unit"] == "patients"
    assert summary["task"] == ("binary" if source is as_folders else "multi-label")
    for arm in ("baseline", "inmerge"):
        assert 0 < summary["arms"][arm]["auroc"]["mean"] < 1
        cases = [case.rpartition("/")[2] for case in read_predictions(folder / f"seed_0/{arm}", "test").cases]
        assert sorted(cases) == sorted(case for case, row in split.items() if row["split"] == "test")
    titles = [section.title for section in read_sections(folder)]
    assert titles == ["The images", *(["Subgroups"] if source is as_table else [])]


def animals_in(folder: Path) -> list[object]:
    """Two images of each of 40 patients, of two classes."""
    return ["--data-dir", class_folders(folder / "animals", images=40), "--patient-regex", r"(p\d+[a-z]+)_"]


@pytest.fixture
def animals(tmp_path: Path) -> list[object]:
    return animals_in(tmp_path)


FOLDED = ["--folds", 3, "--seeds", 0, 1, "--inmerge-epochs", 2, "--similarity-threshold", -0.5]


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cross-validated run with its report."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("folded")
    return run_in(folder, *animals_in(folder), *FOLDED, report=True)


def test_cross_validation_scores_every_case_in_every_seed(folded: Path) -> None:
    fold_of = {row["case"]: row["fold"] for row in rows_of(folded / "split.csv")}
    patients = {(row["patient"], row["fold"]) for row in rows_of(folded / "split.csv")}
    assert len(fold_of) == 80
    assert len(patients) == 40
    summary = json.loads((folded / "summary.json").read_text())
    orders = set()
    for place, seed in enumerate((0, 1)):
        for arm in ("baseline", "inmerge"):
            together, stages = folded / f"seed_{seed}/{arm}", [folded / f"seed_{seed}/fold_{k}/{arm}" for k in range(3)]
            found, parts = read_predictions(together, "test"), [read_predictions(folder, "test") for folder in stages]
            orders.add(tuple(found.cases))
            np.testing.assert_array_equal(found.probabilities, np.concatenate([part.probabilities for part in parts]))
            for fold, folder in enumerate(stages):
                assert {fold_of[case] for case in parts[fold].cases} == {str(fold)}
                assert {fold_of[case] for case in read_predictions(folder, "val").cases} == {str((fold + 1) % 3)}
                assert (folder / "model.safetensors").is_file()
            for figures, part in ((summary, "test"), (summary["last"], "last_test")):
                scored = read_predictions(together, part)
                expected = roc_auc_score(scored.labels, scored.probabilities[:, 1])
                assert figures["arms"][arm]["auroc"]["values"][place] == pytest.approx(expected, abs=1e-12)
            curves = [rows_of(folder / "metrics.csv") for folder in stages]
            mean = [np.mean([float(rows[k]["train_loss"]) for rows in curves]) for k in range(2)]
            assert [float(row["train_loss"]) for row in rows_of(together / "metrics.csv")] == pytest.approx(mean)
        val = read_predictions(folded / f"seed_{seed}/inmerge", "val")
        temperature = summary["temperatures"]["inmerge"]["all classes"]["values"][place]
        task = Task("binary", ("cat", "dog"))
        assert [temperature] == fit_temperatures(task, val.labels, val.probabilities).tolist()
        merged = [rows_of(folded / f"seed_{seed}/fold_{k}/inmerge/merges.csv") for k in range(3)]
        of_folds = [[float(row["displacement"]) for row in rows] for rows in merged]
        for layer, figures in summary["kernels"]["inmerge"].items():
            own = [float(row["displacement"]) for rows in merged for row in rows if row["layer"] == layer]
            assert figures["displacement"]["values"][place] == pytest.approx(np.mean(own))
        joined = [float(row["displacement"]) for row in rows_of(folded / f"seed_{seed}/inmerge/merges.csv")]
        assert joined == pytest.approx(np.mean(of_folds, axis=0))
        total = sum(int(row["merged"]) for rows in merged for row in rows)
        assert total == sum(int(row["merged"]) for row in rows_of(folded / f"seed_{seed}/inmerge/merges.csv")) > 0
    assert len(orders) == 1
    assert sorted(orders.pop()) == sorted(fold_of)
    assert [len(kept) for kept in summary["epochs"]["inmerge"]] == [3, 3]
    assert "The folds are the same for every seed" in (folded / "report.md").read_text()
    card = (folded / "seed_0/inmerge/README.md").read_text()
    assert 'checkpoint_path="../fold_0/inmerge/model.safetensors"' in card
    assert "Each of the 3 folds has a model of its own" in card


@pytest.mark.slow
def test_a_cross_validated_run_that_was_killed_goes_on(folded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the stages of a fold, and then while those of a seed are joined: it ends with the same files."""
    again = partial(run_in, folded.parent, *animals_in(folded.parent), *FOLDED, "--resume", name="killed")
    for module, call in ((stage, 5), (folds, 2)):
        with monkeypatch.context() as patch:
            kill_at(patch, module, "write_result", call)
            with pytest.raises(Killed):
                again()
    found = content_of(again())
    assert "seed_1/fold_2/inmerge/model.safetensors" in found
    assert found.items() <= content_of(folded).items()


def test_the_models_of_all_folds_predict_new_images_together(folded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as it did in its test, and then their mean."""
    kept = kept_model(FinishedRun(folded), 1, "inmerge")
    images, tested = folded.parent / "animals", read_predictions(folded / "seed_1/inmerge", "test").cases
    paths = [images / case for case in tested]
    together, _ = predict_files(kept, paths)
    each = []
    for fold, weights in enumerate(kept.run.weights(1, "inmerge")):
        monkeypatch.setattr(FinishedRun, "weights", lambda *_, weights=weights: [weights])
        each.append(predict_files(kept, paths)[0])
        own = read_predictions(weights.parent, "test")
        found = np.stack([each[fold][images / case] for case in own.cases])
        np.testing.assert_allclose(found, own.probabilities, atol=1e-6)
    for path in paths:
        np.testing.assert_allclose(together[path], np.mean([found[path] for found in each], axis=0))


def test_arms_are_paired_in_every_fold_under_augmentation(run: Run, animals: list[object]) -> None:
    augmented = ["--aug", "flips", "quarter-turns", "rotations", "crops", "brightness", "contrast"]
    folder = run(*animals, *augmented, "--folds", 3, "--merge-prob", 0, "--epochs", 0)
    assert FinishedRun(folder).identical == {("baseline", "inmerge"), ("inmerge", "baseline")}


def test_a_split_can_be_given_back(animals: list[object], tmp_path: Path) -> None:
    options = parsed(tmp_path, *animals)
    first = find_own_images(options, allow_missing=False)
    path = tmp_path / "split.csv"
    write_csv(path, *first.data(16).tables["split.csv"])
    for given, same in ((path, True), (None, False)):
        again = find_own_images(replace(options, split_file=given, split_seed=5), allow_missing=False)
        assert np.array_equal(again.catalogue.split, first.catalogue.split) == same
    path.write_text(path.read_text().replace(",test", ",holdout"))
    with pytest.raises(InputError, match=r"split\.csv has the split 'holdout': expected train, val, test"):
        find_own_images(replace(options, split_file=path), allow_missing=False)


def test_folds_can_be_given_back(animals: list[object], tmp_path: Path) -> None:
    options = parsed(tmp_path, *animals, "--folds", 4)
    first = find_own_images(options, allow_missing=False)
    path = tmp_path / "split.csv"
    write_csv(path, *first.data(16).tables["split.csv"])
    again = find_own_images(replace(options, split_file=path, split_seed=5), allow_missing=False)
    np.testing.assert_array_equal(again.folds, first.folds)
    assert (find_own_images(replace(options, split_seed=5), allow_missing=False).folds != first.folds).any()
    told = look_at(first, 16)
    assert "fold 0    fold 1    fold 2    fold 3" in told
    assert "No image, and none that looks alike, lies in two splits." in told
    header, *lines = path.read_text().splitlines()
    path.write_text("\n".join([header, *(line[:-1] + str(k % 4) for k, line in enumerate(lines))]))
    with pytest.raises(InputError, match=r"40 patients of animals lie in several splits .*: put each into one fold"):
        load_own_images(replace(options, split_file=path))
    with pytest.raises(InputError, match=r"split.csv has the fold '3': expected 0 to 2, as --folds 3 says"):
        load_own_images(replace(options, split_file=path, folds=3))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--folds", 2], "--folds 2 must be at least 3, to train on, validate on and test on"),
        (["--folds", 5, "--test-fraction", 0.3], "--test-fraction has no effect with --folds"),
        (["--folds", 5, "--drop-twins"], "--drop-twins has no effect with --folds"),
        (["--folds", 60], "animals has 80 images of 40 patients or cases, too few to be parted in 60"),
    ],
)
def test_folds_that_cannot_be_are_refused(
    arguments: list[object], expected: str, refused: Callable[..., str], animals: list[object]
) -> None:
    assert refused(*animals, *arguments).startswith(f"error: {expected}")


def pictures(folder: Path, count: int = 40) -> dict[str, Image.Image]:
    """Blurred noise of two classes in folders of splits, of which no two look alike, by their cases."""
    found = {}
    for k in range(count):
        noise = Image.fromarray(pixels(1000 + k, 64)).filter(ImageFilter.GaussianBlur(4))
        case = f"{('train', 'val', 'test')[k * 3 // count]}/{('cat', 'dog')[k % 2]}/p{k:02d}_0.png"
        (folder / case).parent.mkdir(parents=True, exist_ok=True)
        found[case] = ImageOps.autocontrast(noise)
        found[case].save(folder / case)
    return found


@pytest.fixture
def leaky(tmp_path: Path) -> list[object]:
    """Planted in test: an exact twin, one under another class, a compressed one, a mirrored one, and a patient."""
    folder = tmp_path / "leaky"
    found = pictures(folder)
    trained = [found[case] for case in list(found)[:5]]
    test = folder / "test"
    trained[0].save(test / "cat/p70_0.tiff")
    trained[1].save(test / "cat/p71_0.bmp")
    trained[2].save(test / "cat/p72_0.jpg", quality=70)
    ImageOps.mirror(trained[3]).save(test / "dog/p73_0.png")
    ImageOps.autocontrast(Image.fromarray(pixels(2000, 64)).filter(ImageFilter.GaussianBlur(4))).save(
        test / "cat/p04_1.png"
    )
    return ["--data-dir", folder, "--patient-regex", r"(p\d+)_", "--batch-size", 8]


def test_planted_twins_and_a_patient_in_two_splits_are_named_and_refused(
    leaky: list[object], refused: Callable[..., str], run: Run
) -> None:
    assert refused(*leaky) == (
        "error: 2 images of leaky lie in several splits (2 in train and test, 1 of them with conflicting labels): "
        "train train/cat/p00_0.png = test test/cat/p70_0.tiff; train train/dog/p01_0.png = test test/cat/p71_0.bmp; "
        "and 1 patients of leaky lie in several splits (1 in train and test): p04: drop the copies outside test with "
        "--drop-twins, or go on with them by --allow-twins"
    )
    folder = run(*leaky, "--drop-twins")
    leaks = rows_of(folder / "leaks.csv")
    assert [row["kind"] for row in leaks] == ["image"] * 4 + ["patient"] * 2
    assert len({row["case"] for row in leaks}) == 6
    recorded = json.loads((folder / "data.json").read_text())
    assert "1 of them with conflicting labels" in recorded["leaks"][0]
    assert "pairs of images over the splits look alike" in recorded["near_twins"]
    trained = {part: found["images"] for part, found in recorded["splits"].items()}
    allowed = load_own_images(parsed(folder.parent, *leaky, "--allow-twins"))
    assert len(allowed.train) == trained["train"] + 3


def test_a_look_before_the_trial(leaky: list[object], run: Run, tmp_path: Path, capsys) -> None:
    """What was found is printed, and kept beside the prepared images; no run is begun."""
    folder = run(*leaky, "--prepare-only")
    assert not folder.exists()
    told, prepared = capsys.readouterr().out, tmp_path / "prepared/leaky-18px"
    for words in (
        "The splits are those of the folders test, train, val.",
        "45 images can be used, all grey, of 64 x 64 (45)",
        "2 images of leaky lie in several splits",
        "1 patients of leaky lie in several splits",
        "A trial refuses them in test without --drop-twins or --allow-twins; leaks.csv has all.",
        "pairs of images over the splits look alike",
    ):
        assert words in told
    near = [(row["case"], row["other_case"], row["mirrored"]) for row in rows_of(prepared / "near_twins.csv")]
    assert sorted(near) == [
        ("train/cat/p02_0.png", "test/cat/p72_0.jpg", "False"),
        ("train/dog/p03_0.png", "test/dog/p73_0.png", "True"),
    ]
    assert len(rows_of(prepared / "split.csv")) == 45
    with Image.open(prepared / "samples.png") as sheet:
        assert sheet.width > 500


def test_a_tree_as_users_have_it(
    animals: list[object], refused: Callable[..., str], run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sentence on each thing that is no image; all others are trained on, whatever folders and names they have.

    No patients are named, and the report leaves them out.
    """
    top = tmp_path / "animals"
    write_images(top, ["dog/in here/p80dog_ü 猫.png", "dog/P81.JPG/p81dog_0.jpeg"], first=500)
    for junk in (".DS_Store", "cat/.DS_Store", "cat/Thumbs.db", "cat/notes.txt"):
        (top / junk).write_bytes(b"junk")
    (top / "cat/p90cat_0.png").write_bytes(b"")
    (top / "cat/p91cat_0.png").write_text("no image")
    Image.new("1", (30_000, 30_000)).save(top / "cat/p92cat_0.png")
    (top / "cat/p93cat_0.png").symlink_to(top / "cat/p93cat_0.png")
    (top / "cat/loop").symlink_to(top)
    reasons = {
        "cat/p90cat_0.png": "is empty",
        "cat/p91cat_0.png": "is no PNG, JPEG, TIFF, BMP, WEBP or DICOM file",
        "cat/p92cat_0.png": "has more than 89,478,485 pixels: make it smaller",
        "cat/p93cat_0.png": "is a link that leads to itself",
    }
    sentence = refused(*animals[:2])
    assert sentence.startswith("error: 4 of 86 images can't be used (")
    assert all(f"{case} {reason}" in sentence for case, reason in reasons.items())
    folder = run(*animals[:2], "--allow-missing", report=True)
    told = capsys.readouterr().out
    assert "cat/loop is a link to a folder that holds it, and is not followed." in told
    assert "4 files are no images by their names and are left alone: 2 .DS_Store, 1 Thumbs.db, 1 .txt." in told
    assert {row["case"]: row["reason"] for row in rows_of(folder / "left_out.csv")} == reasons
    split = rows_of(folder / "split.csv")
    assert {row["case"] for row in split if not row["split"]} == reasons.keys()
    counts = [sum(row["split"] == part for row in split) for part in ("train", "val", "test")]
    assert sum(counts) == 82
    text = (folder / "report.md").read_text()
    assert f"| images | {' | '.join(map(str, counts))} |" in text
    assert "| patients |" not in text
    assert f"- test: {counts[2]} images\n" in (folder / "seed_0/inmerge/README.md").read_text()


def test_dicom_names_patients_and_subgroups(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    from small_dicom import dicom_bytes, dicom_dataset

    for k in range(40):
        header = {"PatientID": f"P{k // 2}", "PatientSex": "FM"[k // 2 % 2], "PatientAge": f"0{20 + k}Y"}
        path = tmp_path / "scans" / ("sick", "well")[k % 2] / f"{k}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(dicom_bytes(dicom_dataset(pixels(k), "MONOCHROME1", **header)))
    folder = run("--data-dir", tmp_path / "scans")
    assert {row["case"]: row["patient"] for row in rows_of(folder / "split.csv")} == {
        f"{('sick', 'well')[k % 2]}/{k}.dcm": f"P{k // 2}" for k in range(40)
    }
    subgroups = read_sections(folder)[-1]
    assert {row[0] for row in subgroups.rows} <= {"sex: F", "sex: M", "age: 18-39", "age: 40-64"}
    assert len(subgroups.rows) >= 2
    assert "Not^To^Be^Read" not in "".join(path.read_text() for path in folder.glob("*.[cj]s*"))
