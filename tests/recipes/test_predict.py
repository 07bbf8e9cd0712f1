"""A kept model says of image files what it said of the run's own test images, and the model card's lines do as well."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path

import imagefolder
import numpy as np
import predict
import pytest
import torch
from finetune.data.squares import Form, make_square
from finetune.reports.cards import preparing_lines
from finetune.runs.finished import FinishedRun
from finetune.runs.results import read_predictions
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import roc_curve
from small_dicom import dicom_bytes, dicom_dataset
from small_folders import pixels
from small_runs import run_recipe

OWN = ["--model", "test_resnet", "--no-pretrained", "--image-size", "16", "--batch-size", "8", "--prepare-workers", "0"]


def write_own(folder: Path) -> Path:
    """Images of several shapes, grey and in colour, in two classes."""
    rng = np.random.default_rng(0)
    for k in range(40):
        shape = (24 + k % 5, 20) if k % 2 else (24, 24 + k % 7, 3)
        path = folder / ("healthy", "ill")[k // 20] / f"{k:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run on own images of two classes, with its model cards, and the images."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("own")
    images, run = write_own(folder / "images"), folder / "run"
    arguments = ["--data-dir", images, *OWN, "--prepared-dir", folder / "prepared", "--output", run]
    run_recipe(
        *arguments, "--epochs", "1", "--inmerge-epochs", "1", "--seeds", "3", recipe=imagefolder.main, report=True
    )
    return run, images


def predicted(output: Path, *arguments: object) -> list[dict[str, str]]:
    predict.main([str(argument) for argument in (*arguments, "--output", output)])
    with output.open(newline="") as file:
        return list(csv.DictReader(file))


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as exit_:
        predict.main([str(argument) for argument in arguments])
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_own_test_images_get_their_predictions_to_the_bit(own: tuple[Path, Path], tmp_path: Path) -> None:
    """Padded, cropped to the middle, grey and coloured: all as the source recorded it."""
    run, images = own
    test = read_predictions(run / "seed_3/inmerge", "test")
    rows = predicted(tmp_path / "p.csv", run, *(images / case for case in test.cases))
    assert [row["image"] for row in rows] == [str(images / case) for case in test.cases]
    found = np.array([[float(row["prob_0"]), float(row["prob_1"])] for row in rows])
    assert np.array_equal(found, test.probabilities)
    assert [row["predicted"] for row in rows] == [("healthy", "ill")[k] for k in test.probabilities.argmax(axis=1)]


def test_threshold_is_the_best_of_validation(own: tuple[Path, Path], tmp_path: Path) -> None:
    run, images = own
    val = read_predictions(run / "seed_3/baseline", "val")
    false, true, cuts = roc_curve(val.labels == 1, val.probabilities[:, 1])
    cut = cuts[1:][np.argmax((true - false)[1:])]
    rows = predicted(tmp_path / "p.csv", run, images, "--seed", "3", "--arm", "baseline")
    assert len(rows) == 40
    assert [row["above_threshold"] for row in rows] == [str(int(float(row["prob_1"]) >= cut)) for row in rows]


def test_digits_as_png_get_their_predictions_to_the_bit(digits_run: Path, tmp_path: Path) -> None:
    digits = np.round(load_digits().images * (255 / 16)).astype(np.uint8)
    test = read_predictions(digits_run / "seed_0/inmerge", "test")
    for case in test.cases:
        Image.fromarray(digits[int(case)]).save(tmp_path / f"{case}.png")
    rows = predicted(tmp_path / "p.csv", digits_run, *(tmp_path / f"{case}.png" for case in test.cases))
    found = np.array([[float(row[f"prob_{k}"]) for k in range(10)] for row in rows])
    assert np.array_equal(found, test.probabilities)
    assert "above_threshold" not in rows[0]


def test_files_of_other_kinds(own: tuple[Path, Path], tmp_path: Path) -> None:
    """A JPEG, a PNG of another size and a DICOM file, each the same as the PNG of what is displayed."""
    run, _ = own
    large = np.repeat(np.repeat(pixels(1), 5, axis=0), 4, axis=1)
    Image.fromarray(large).save(tmp_path / "large.png")
    Image.fromarray(large).save(tmp_path / "photo.jpg", quality=90)
    Image.fromarray(np.asarray(Image.open(tmp_path / "photo.jpg"))).save(tmp_path / "photo.png")
    (tmp_path / "scan.dcm").write_bytes(dicom_bytes(dicom_dataset(large)))
    rows = predicted(
        tmp_path / "p.csv", run, *(tmp_path / f"{n}" for n in ("large.png", "photo.jpg", "photo.png", "scan.dcm"))
    )
    png, jpeg, as_png, dicom = (row["prob_1"] for row in rows)
    assert png == dicom
    assert jpeg == as_png != png


def test_what_is_missing_or_damaged_is_named(
    own: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, images = own
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n")
    output = tmp_path / "p.csv"
    arguments = (run, images / "ill/20.png", tmp_path / "gone.png", tmp_path / "torn.png", "--output", output)
    error = refused(capsys, *arguments)
    assert f"2 of 3 images can't be used ({tmp_path / 'gone.png'} is missing, {tmp_path / 'torn.png'} is" in error
    assert not output.exists()
    rows = predicted(output, *arguments[:-2], "--allow-missing")
    assert [row["image"] for row in rows] == [str(images / "ill/20.png")]
    assert f"Left out: {tmp_path / 'gone.png'} is missing." in capsys.readouterr().out


def test_what_is_no_choice_is_refused(
    own: tuple[Path, Path], digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, images = own
    image = images / "ill/20.png"
    assert "--seed 7 is none of the run's: choose from 3" in refused(capsys, run, image, "--seed", "7")
    assert "--arm ema is none of the run's: choose from baseline, inmerge" in refused(
        capsys, run, image, "--arm", "ema"
    )
    (tmp_path / "mine.csv").write_text("a,b\n")
    assert "mine.csv is there, and not by" in refused(capsys, run, image, "--output", tmp_path / "mine.csv")
    old = Path(shutil.copytree(digits_run, tmp_path / "old"))
    data = (old / "data.json").read_text()
    (old / "data.json").write_text(data.replace('"preprocessing"', '"other"'))
    assert "doesn't say how its images were prepared" in refused(capsys, old, image)


def code_of(card: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 14
    return code


def test_model_cards_lines_predict_the_same(
    own: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, images = own
    folder = run / "seed_3/inmerge"
    code = code_of((folder / "README.md").read_text())
    test = read_predictions(folder, "test")
    for case, expected in list(zip(test.cases, test.probabilities, strict=True))[:3]:
        shutil.copy(folder / "model.safetensors", tmp_path)
        shutil.copy(images / case, tmp_path / "image.png")
        monkeypatch.chdir(tmp_path)
        names: dict[str, object] = {}
        exec(code, names)
        assert np.allclose(names["probabilities"], expected, rtol=0, atol=1e-6)


def test_a_card_prepares_as_its_run_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way of fitting, on a wide image: the squares of the lines are those of make_square."""
    wide = np.random.default_rng(0).integers(0, 256, (20, 33, 3), dtype=np.uint8)
    Image.fromarray(wide).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    for fit in ("squash", "pad", "crop"):
        for grey in (False, True):
            form = Form(12, fit, grey=grey)
            recorded = {**form.recorded(), "image_size": 8}
            names: dict[str, object] = {}
            exec("\n".join(["from PIL import Image, ImageOps", *preparing_lines(recorded)]), names)
            square = np.frombuffer(make_square((tmp_path / "image.png").read_bytes(), form).image, dtype=np.uint8)
            middle = square.reshape(-1, 12, 12)[:, 2:10, 2:10]
            found = np.atleast_3d(np.asarray(names["image"])).transpose(2, 0, 1)
            assert np.array_equal(found, middle), (fit, grey)


def test_run_and_card_agree_on_what_is_kept(own: tuple[Path, Path]) -> None:
    run, _ = own
    assert FinishedRun(run).description["preprocessing"] == {
        "side": 18,
        "fit": "pad",
        "window": "file",
        "grey": False,
        "image_size": 16,
    }
