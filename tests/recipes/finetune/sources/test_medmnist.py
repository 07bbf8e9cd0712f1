"""The files of MedMNIST."""

from __future__ import annotations

import tracemalloc

import medmnist
import numpy as np
import pytest
from finetune.data.twins import find_leaks, settle_leaks
from finetune.sources.medmnist import KINDS, NAMES, POSITIVE, load_medmnist


def test_medmnist_files_are_read_as_the_package_reads_them(shared_file) -> None:
    path = shared_file("data/medmnist/breastmnist.npz")
    data = load_medmnist("breastmnist", 28, None, path.parent, allow_modified=False)
    for name in ("train", "val", "test"):
        theirs = medmnist.BreastMNIST(name, root=str(path.parent))
        ours = getattr(data, name)
        np.testing.assert_array_equal(ours.images[:, 0], theirs.imgs)
        np.testing.assert_array_equal(ours.labels, theirs.labels[:, 0])
    assert data.task.classes == ("malignant", "normal, benign")
    assert data.files == {"breastmnist.npz": medmnist.INFO["breastmnist"]["MD5"]}


def test_colour_images_are_read_channels_first(made_medmnist) -> None:
    folder = made_medmnist("pathmnist", colour=True, classes=9, size=64, cases=8)
    data = load_medmnist("pathmnist", 64, None, folder, allow_modified=True)
    with np.load(folder / "pathmnist_64.npz") as arrays:
        np.testing.assert_array_equal(data.val.images.transpose(0, 2, 3, 1), arrays["val_images"])


def test_missing_file_is_downloaded_by_the_package(made_medmnist, tmp_path, monkeypatch) -> None:
    """It arrives beside its place and is renamed; what it says is then read as a local file is."""
    source = made_medmnist("octmnist", colour=False, classes=4, cases=8) / "octmnist.npz"
    asked = []

    def fetched(url: str, root: str, filename: str, md5: str) -> None:
        asked.append((url, md5))
        (tmp_path / root / filename).write_bytes(source.read_bytes())

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fetched)
    (tmp_path / "data").mkdir()
    load_medmnist("octmnist", 28, None, tmp_path / "data", allow_modified=True)
    assert asked == [(medmnist.INFO["octmnist"]["url"], medmnist.INFO["octmnist"]["MD5"])]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["octmnist.npz"]


def test_the_positive_class_of_each_binary_set_is_the_diseased() -> None:
    binary = [name for name in NAMES if KINDS[medmnist.INFO[name]["task"]] == "binary"]
    named = {name: medmnist.INFO[name]["label"][str(POSITIVE[name])] for name in binary}
    assert named == {"pneumoniamnist": "pneumonia", "breastmnist": "malignant"}
    assert set(POSITIVE) == set(binary)


@pytest.mark.parametrize(
    ("name", "told"),
    [("breastmnist", "1 of them with conflicting labels"), ("pneumoniamnist", "in train and val")],
)
def test_twins_are_named_and_their_training_copies_dropped(shared_file, name: str, told: str) -> None:
    path = shared_file(f"data/medmnist/{name}.npz")
    data = load_medmnist(name, 28, None, path.parent, allow_modified=False)
    twins = [leak for leak in find_leaks(data) if "train" in leak.parts]
    clean, (sentence,) = settle_leaks(data, drop=True)
    assert told in sentence
    assert f"train {data.train.cases[twins[0].places[0][1]]} = " in sentence
    copies = {data.train.cases[row] for leak in twins for part, row in leak.places if part == "train"}
    assert copies
    assert set(data.train.cases) - set(clean.train.cases) == copies
    assert clean.test.cases == data.test.cases


@pytest.mark.parametrize(("name", "colour"), [("pathmnist", True), ("octmnist", False)])
def test_large_images_are_read_by_memory_map(made_medmnist, tmp_path, monkeypatch, name: str, colour: bool) -> None:
    """Never all of them at once: neither when they are prepared, nor when they are read."""
    monkeypatch.setattr("finetune.data.prepared._BATCH", 8)
    folder = made_medmnist(name, colour=colour, classes=4, size=224, cases=70)
    whole = 70 * 224 * 224 * (3 if colour else 1)
    tracemalloc.start()
    data = load_medmnist(name, 224, 56, folder, True, tmp_path / "prepared")
    data = load_medmnist(name, 224, None, folder, True, tmp_path / "prepared")
    for start in range(0, 70, 10):
        data.train.images[list(range(start, start + 10))]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < whole / 2 + 3e6  # beside the images
    with np.load(folder / f"{name}_224.npz") as arrays:
        for part, split in data.splits.items():
            images = split.images[list(range(70))]
            expected = arrays[f"{part}_images"]
            np.testing.assert_array_equal(images.transpose(0, 2, 3, 1) if colour else images[:, 0], expected)
            np.testing.assert_array_equal(split.labels, arrays[f"{part}_labels"][:, 0])
    assert data.size == 224
    assert not find_leaks(data)


def test_prepared_images_are_resized_as_those_in_memory(made_medmnist, tmp_path, monkeypatch) -> None:
    folder = made_medmnist("pathmnist", colour=True, classes=4, size=128, cases=5)
    prepared = load_medmnist("pathmnist", 128, 28, folder, True, tmp_path)
    monkeypatch.setattr("finetune.sources.medmnist._LARGEST_IN_MEMORY", 224)
    in_memory = load_medmnist("pathmnist", 128, 28, folder, True)
    np.testing.assert_array_equal(prepared.test.images[list(range(5))], in_memory.test.images)
