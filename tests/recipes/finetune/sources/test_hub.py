"""Data sets of the datasets library: folders of parquet files, and what lies in the cache of the hub's client."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
from finetune.data.opening import Unreadable
from finetune.errors import InputError
from finetune.sources.columns import Columns
from finetune.sources.hub import HubImages, files_by_part, read_hub
from finetune.sources.listing import Listing
from PIL import Image
from small_folders import pixels, write_images

CLASSES = datasets.ClassLabel(names=["zebra", "ape", "none of both"])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def encoded(number: int) -> dict[str, object]:
    file = io.BytesIO()
    Image.fromarray(pixels(number)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{number}.png"}


def write(folder: Path, name: str, first: int = 0, count: int = 4, **columns: tuple[object, list[object]]) -> Path:
    """A parquet file of images with these columns, each a feature and its values."""
    folder.mkdir(exist_ok=True)
    features = {"image": datasets.Image(), **{column: feature for column, (feature, _) in columns.items()}}
    values = {"image": [encoded(first + k) for k in range(count)], **{k: found for k, (_, found) in columns.items()}}
    datasets.Dataset.from_dict(values, datasets.Features(features)).to_parquet(folder / name)
    return folder


def read(folder: Path, **columns: object) -> Listing:
    return read_hub(str(folder), "main", Columns(**columns))


def test_classes_are_in_the_order_of_their_feature(tmp_path: Path) -> None:
    """Without those that no image has."""
    listing = read(write(tmp_path / "d", "a.parquet", label=(CLASSES, [0, 1, 1, 0])))
    assert listing.cases == ["0.png", "1.png", "2.png", "3.png"]
    assert (listing.classes, listing.labels) == (("zebra", "ape"), [("zebra",), ("ape",), ("ape",), ("zebra",)])
    assert listing.parts is None
    with Image.open(io.BytesIO(listing.images.read(2))) as image:
        np.testing.assert_array_equal(np.asarray(image), pixels(2))


def test_lists_of_labels_and_patients(tmp_path: Path) -> None:
    labels = datasets.List(CLASSES), [[0, 1], [], [1], []]
    patients = datasets.Value("int64"), [7, 7, 8, 9]
    listing = read(write(tmp_path / "d", "a.parquet", labels=labels, patient=patients))
    assert listing.multi_label
    assert listing.labels == [("zebra", "ape"), (), ("ape",), ()]
    assert listing.patients == ["7", "7", "8", "9"]


@pytest.mark.parametrize("column", ["patient", "split", "age"])
def test_lists_of_anything_else_are_refused(tmp_path: Path, column: str) -> None:
    lists = datasets.List(datasets.Value("string")), [["train"], ["train"], ["test"], []]
    folder = write(tmp_path / "d", "a.parquet", label=(datasets.Value("string"), list("xyxy")), **{column: lists})
    with pytest.raises(InputError, match=f"row 0: the column {column} has a list, expected one text"):
        read(folder)


def test_the_splits_are_those_of_the_files(tmp_path: Path) -> None:
    for place, name in enumerate(("train", "validation", "test")):
        label = datasets.Value("string"), list("xyxy")
        write(tmp_path / "d", f"{name}-00000-of-00001.parquet", first=10 * place, label=label)
    listing = read(tmp_path / "d")
    assert listing.parts == ["train"] * 4 + ["val"] * 4 + ["test"] * 4
    assert listing.cases[4] == "10.png"


def test_several_columns_of_images_are_told(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "d",
        "a.parquet",
        mask=(datasets.Image(), [encoded(k) for k in range(4)]),
        label=(datasets.Value("string"), list("xyxy")),
    )
    with pytest.raises(InputError, match="of which image, mask hold images: name one of images by --image-column"):
        read(folder)
    assert len(read(folder, image="mask").cases) == 4


def test_files_are_read_from_the_cache_alone(tmp_path: Path, cache: Path) -> None:
    """A table from elsewhere may name any file of this machine."""
    write_images(cache, ["there.png"])
    write_images(tmp_path, ["secret.png"])
    (cache / "link.png").symlink_to(tmp_path / "secret.png")
    paths = [cache / "there.png", tmp_path / "secret.png", cache / "link.png", cache / "../secret.png"]
    rows = {"image": [{"bytes": None, "path": str(path)} for path in paths]}
    data = datasets.Dataset.from_dict(rows, datasets.Features({"image": datasets.Image(decode=False)}))
    images = HubImages(data, "image", "1")
    assert images.read(0) == (cache / "there.png").read_bytes()
    for row in (1, 2, 3):
        with pytest.raises(Unreadable, match="is a path in its parquet file, not an image"):
            images.read(row)


def test_folders_of_splits_in_another_case_are_loaded_as_such() -> None:
    files = ["README.md", "Training/cat/1.jpg", "Testing/dog/2.jpg", "Testing/cat/3.jpg"]
    assert files_by_part(files) == {"train": ["Training/**"], "test": ["Testing/**"]}
    assert files_by_part(["train/1.jpg", "test/2.jpg"]) is None
    assert files_by_part(["Data/1.jpg", "Other/2.jpg"]) is None
