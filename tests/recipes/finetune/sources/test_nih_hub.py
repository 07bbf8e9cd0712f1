"""ChestX-ray14 as a parquet data set, here one that is made from a small tree."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
from finetune.data.prepared import prepared_data
from finetune.data.splits import hold_out
from finetune.data.squares import Form
from finetune.errors import InputError
from finetune.sources.nih_hub import read_nih_hub
from finetune.sources.nih_labels import LABELS
from finetune.sources.nih_tree import read_nih_tree
from small_trees import make_tree

TEXT = datasets.List(datasets.Value("string"))
NAMES = datasets.ClassLabel(names=["No Finding", *LABELS])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "tree")


def write_parquet(tree: Path, folder: Path, *, labels: datasets.features.List, paths: bool = True) -> Path:
    """The tree's images as train and test, with the columns of timm/nih-chest-xray-14."""
    xrays = read_nih_tree(tree, allow_missing=False)
    features = datasets.Features({"image": datasets.Image(), "patient_id": datasets.Value("int64"), "labels": labels})
    (folder / "data").mkdir(parents=True)
    for part, rows in (("train", xrays.rows("train")), ("test", xrays.rows("test"))):
        table = {
            "image": [{"bytes": xrays.images.read(row), "path": xrays.cases[row] if paths else None} for row in rows],
            "patient_id": [int(xrays.patients[row]) for row in rows],
            "labels": [[LABELS[k] for k in np.flatnonzero(xrays.labels[row])] or ["No Finding"] for row in rows],
        }
        data = datasets.Dataset.from_dict(table, features=features)
        data.to_parquet(str(folder / "data" / f"{part}-00000-of-00001.parquet"))
    return folder


@pytest.mark.parametrize("labels", [TEXT, datasets.List(NAMES)], ids=["text", "class"])
def test_the_same_data_as_from_the_tree(tree: Path, tmp_path: Path, labels: datasets.features.List) -> None:
    """Cases, patients, labels, splits and pixels."""
    folder = write_parquet(tree, tmp_path / "hub", labels=labels)
    settings = {"form": Form(16, grey=True), "image_size": 14, "workers": 0, "allow_missing": False}
    catalogues = (read_nih_tree(tree, allow_missing=False), read_nih_hub(str(folder), "main"))
    from_tree, from_hub = (
        prepared_data(hold_out(catalogue, "val", 0.125, seed=0), prepared_dir=tmp_path / name, **settings)
        for name, catalogue in zip(("of tree", "of hub"), catalogues, strict=True)
    )
    for part, split in from_hub.splits.items():
        expected = from_tree.splits[part]
        assert split.cases == expected.cases
        assert split.patients == expected.patients
        np.testing.assert_array_equal(split.labels, expected.labels)
        rows = list(range(len(split)))
        np.testing.assert_array_equal(split.images[rows], expected.images[rows])


def test_images_without_names_are_named_by_row(tree: Path, tmp_path: Path) -> None:
    folder = write_parquet(tree, tmp_path / "hub", labels=datasets.List(NAMES), paths=False)
    xrays = read_nih_hub(str(folder), "main")
    assert xrays.cases == [str(row) for row in range(60)]
    assert (xrays.split == "test").sum() == 20


def test_the_commit_is_loaded_and_recorded(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A branch stands for the commit that the hub names; a commit is loaded without asking the hub."""
    folder = write_parquet(tree, tmp_path / "hub", labels=datasets.List(NAMES))
    splits, asked, loaded = datasets.load_dataset(str(folder)), [], []

    class Hub:
        def dataset_info(self, name: str, revision: str) -> object:
            asked.append((name, revision))
            return type("Info", (), {"sha": "b" * 40})

    def load(name: str, revision: str) -> datasets.DatasetDict:
        loaded.append((name, revision))
        return splits

    monkeypatch.setattr("finetune.sources.hub.HfApi", Hub)
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_nih_hub("owner/name", "main").files == {"owner/name": "b" * 40}
    assert read_nih_hub("owner/name", "a" * 40).description == {"hub": "owner/name", "revision": "a" * 40}
    assert asked == [("owner/name", "main")]
    assert loaded == [("owner/name", "b" * 40), ("owner/name", "a" * 40)]


def test_bad_data_sets_are_told_in_one_sentence(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_parquet(tree, tmp_path / "hub", labels=TEXT)
    splits = datasets.load_dataset(str(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty holds no parquet file: give a folder of images by --data-dir"):
        read_nih_hub(str(tmp_path / "empty"), "main")

    def refusal(changed: datasets.DatasetDict) -> str:
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: changed)
        with pytest.raises(InputError) as error:
            read_nih_hub(str(folder), "main")
        return str(error.value)

    assert "has no column 'labels': expected image, patient_id, labels" in refusal(splits.remove_columns("labels"))
    assert "has the splits train: expected test and at least one" in refusal(
        datasets.DatasetDict(train=splits["train"])
    )
    wrong = splits["train"].map(lambda _: {"labels": ["Covid"]})
    assert "row 0 has the label 'Covid'" in refusal(datasets.DatasetDict(train=wrong, test=splits["test"]))
