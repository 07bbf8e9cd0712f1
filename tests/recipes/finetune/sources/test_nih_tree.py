"""ChestX-ray14 as NIH distributes it: labels, lists, images and splits."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas
import pytest
from finetune.data.images import ImageData
from finetune.errors import InputError
from finetune.sources.ages import age_band
from finetune.sources.chestxray14 import ChestXrayOptions, load_chestxray14
from finetune.sources.nih_labels import LABELS
from finetune.sources.nih_tree import read_boxes, read_nih_tree
from small_trees import HEADER, case_names, image_path, make_tree, write_boxes, write_labels, write_lists


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "tree")


def load(tree: Path, prepared_dir: Path, allow_missing: bool = False, **options: float) -> ImageData:
    settings = {"prepare_size": 16, "image_size": 14, "prepare_workers": 0, **options}
    folders = {"data_dir": tree, "prepared_dir": prepared_dir}
    return load_chestxray14(ChestXrayOptions(**folders, allow_missing=allow_missing, **settings))


def cases_of(data: ImageData) -> dict[str, list[str]]:
    return {part: split.cases for part, split in data.splits.items()}


def test_labels_are_in_the_order_of_the_paper() -> None:
    first, second = "Atelectasis Cardiomegaly Effusion Infiltration Mass Nodule Pneumonia", "Pneumothorax Consolidation"
    assert " ".join(LABELS) == f"{first} {second} Edema Emphysema Fibrosis Pleural_Thickening Hernia"


def test_labels_agree_with_the_csv_for_every_image(shared_file) -> None:
    """Labels and patients of the real file, read here by pandas and matched as text."""
    folder = shared_file("data/nih-mini")
    xrays = read_nih_tree(folder, allow_missing=False)
    csv = pandas.read_csv(folder / "Data_Entry_2017_v2020.csv", index_col="Image Index").loc[xrays.cases]
    assert len(xrays.cases) == len(csv) == 1437
    for k, label in enumerate(LABELS):
        np.testing.assert_array_equal(xrays.labels[:, k], csv["Finding Labels"].str.contains(label).astype(int))
    np.testing.assert_array_equal(xrays.labels.sum(axis=1) == 0, csv["Finding Labels"] == "No Finding")
    np.testing.assert_array_equal(xrays.patients, csv["Patient ID"].astype(str))
    listed = (folder / "test_list.txt").read_text().split()
    assert {xrays.cases[row] for row in xrays.rows("test")} == set(listed)


def test_subgroups_agree_with_the_csv_for_every_image(shared_file) -> None:
    folder = shared_file("data/nih-mini")
    xrays = read_nih_tree(folder, allow_missing=False)
    csv = pandas.read_csv(folder / "Data_Entry_2017_v2020.csv", index_col="Image Index").loc[xrays.cases]
    bands = pandas.cut(csv["Patient Age"], [-1, 17, 39, 64, 100], labels=["0-17", "18-39", "40-64", "65-100"])
    assert xrays.subgroups["view"] == csv["View Position"].tolist()
    assert xrays.subgroups["sex"] == csv["Patient Gender"].tolist()
    assert xrays.subgroups["age"] == bands.tolist()
    assert csv["Patient Age"].max() == 92


def test_boxes_agree_with_the_csv_and_all_are_of_test_images(shared_file) -> None:
    folder = shared_file("data/nih-mini")
    csv = pandas.read_csv(folder / "BBox_List_2017.csv", skiprows=1, header=None, usecols=range(6))
    findings = read_boxes(folder)
    assert len(findings) == len(csv) == 984
    for finding, (_, (case, name, x, y, width, height)) in zip(findings, csv.iterrows(), strict=True):
        assert (finding.case, LABELS[finding.label]) == (case, name.replace("Infiltrate", "Infiltration"))
        np.testing.assert_allclose(finding.boxes * 1024, [[x, y, x + width, y + height]], atol=1e-9)
    xrays = read_nih_tree(folder, allow_missing=False)
    test = {case: row for row, case in enumerate(xrays.cases) if xrays.split[row] == "test"}
    there = [finding for finding in findings if finding.case in xrays.cases]
    assert len({finding.case for finding in there}) == 91
    assert all(xrays.labels[test[finding.case], finding.label] for finding in there)


def test_boxes_of_one_finding_stand_together_and_no_file_is_none(tree: Path) -> None:
    assert read_boxes(tree) is None
    write_boxes(tree, ["a.png,Mass,0,512,256,512,,,", "b.png,Mass,1,1,2,2", "a.png,Mass,0,0,1024,1024"])
    first, second = read_boxes(tree)
    assert (first.case, second.case, LABELS[first.label]) == ("a.png", "b.png", "Mass")
    assert first.boxes.tolist() == [[0, 0.5, 0.25, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("a.png,Mass,0,0,10", "line 2: expected an image, a disease, and x, y, width and height of its box"),
        ("a.png,Mass,0,0,10,x", "line 2: expected an image, a disease, and x, y, width and height of its box"),
        ("a.png,No Finding,0,0,10,10", "line 2: expected an image, a disease"),
        ("a.png,Fracture,0,0,10,10", "line 2 has the label 'Fracture'"),
        ("a.png,Mass,1000,0,50,10", "the box 1000, 0, 50, 10 is not in 1024 x 1024 pixels"),
        ("a.png,Mass,0,0,nan,10", "is not in 1024 x 1024 pixels"),
        ("a.png,Mass,0,0,0,10", "is not in 1024 x 1024 pixels"),
    ],
)
def test_boxes_that_cant_be_used(tree: Path, row: str, expected: str) -> None:
    write_boxes(tree, [row])
    with pytest.raises(InputError, match=re.escape(expected)):
        read_boxes(tree)
    (tree / "BBox_List_2017.csv").write_text("image,label\n")
    with pytest.raises(InputError, match="begins with 'image,label': expected NIH's list of boxes"):
        read_boxes(tree)


@pytest.mark.parametrize(
    ("age", "band"),
    [
        *(("0", "0-17"), ("017Y", "0-17"), ("018Y", "18-39"), ("39", "18-39"), ("40", "40-64"), ("065", "65-100")),
        *(("013M", "0-17"), ("005D", "0-17"), ("100", "65-100"), ("101", None), ("414", None), ("", None), ("?", None)),
    ],
)
def test_ages_in_all_forms_of_the_file(age: str, band: str | None) -> None:
    assert age_band(age) == band


def test_what_is_not_known_of_an_image_is_none(tree: Path) -> None:
    """A newer name of a column, an age that nobody has, and no view; the splits keep images and values together."""
    labels = tree / "Data_Entry_2017.csv"
    text = labels.read_text().replace("Patient Gender", "Patient Sex")
    labels.write_text(text.replace(",058,M,PA,", ",414,F,,", 1))
    data = load(tree, tree / "prepared")
    (part,) = (split for split in data.splits.values() if "00000001_000.png" in split.cases)
    row = part.cases.index("00000001_000.png")
    assert {name: values.pop(row) for name, values in part.subgroups.items()} == {"view": None, "sex": "F", "age": None}
    for name, value in {"view": "PA", "sex": "M", "age": "40-64"}.items():
        assert {value} == set().union(*(split.subgroups[name] for split in data.splits.values()))


def test_quirks_of_the_first_label_file(tree: Path) -> None:
    """Its header has commas within brackets and one at the end; a byte order mark does no harm either."""
    labels = tree / "Data_Entry_2017.csv"
    xrays = read_nih_tree(tree, allow_missing=False)
    labels.write_bytes(b"\xef\xbb\xbf" + labels.read_bytes().replace(b"\n", b"\r\n"))
    again = read_nih_tree(tree, allow_missing=False)
    assert xrays.cases == again.cases == case_names(30)
    assert xrays.patients[:3] == again.patients[:3] == ["1", "1", "2"]
    np.testing.assert_array_equal(xrays.labels, again.labels)
    names = [{LABELS[k] for k in np.flatnonzero(row)} for row in xrays.labels[:4]]
    assert names == [set(), {"Mass"}, {"Hernia", "Pleural_Thickening"}, {"Atelectasis", "Effusion", "Mass"}]


def test_the_corrected_labels_come_first(tree: Path) -> None:
    assert read_nih_tree(tree, allow_missing=False).description["label_file"] == "Data_Entry_2017.csv"
    write_labels(tree, case_names(30)[::-1], "Data_Entry_2017_v2020.csv")
    xrays = read_nih_tree(tree, allow_missing=False)
    assert xrays.description["label_file"] == "Data_Entry_2017_v2020.csv"
    assert xrays.description["sha256"] == xrays.files["Data_Entry_2017_v2020.csv"]
    assert "Data_Entry_2017.csv" not in xrays.files
    assert xrays.labels[59].sum() == 0


def test_images_may_lie_flat(tree: Path, tmp_path: Path) -> None:
    nested = load(tree, tmp_path / "prepared")
    (tree / "images").mkdir()
    for path in list(tree.glob("images_*/images/*")):
        path.rename(tree / "images" / path.name)
    flat = load(tree, tmp_path / "other")
    assert cases_of(flat) == cases_of(nested)
    rows = list(range(len(flat.train)))
    np.testing.assert_array_equal(flat.train.images[rows], nested.train.images[rows])


def test_splits_are_the_official_lists_and_share_no_patient(tree: Path, tmp_path: Path) -> None:
    data = load(tree, tmp_path)
    cases, patients = cases_of(data), {part: set(split.patients) for part, split in data.splits.items()}
    assert set(cases["test"]) == set((tree / "test_list.txt").read_text().split())
    assert {*cases["train"], *cases["val"]} == set((tree / "train_val_list.txt").read_text().split())
    assert len(patients["val"]) == 3
    assert len(set.union(*patients.values())) == sum(map(len, patients.values())) == 30
    for split in data.splits.values():
        assert [int(case[:8]) for case in split.cases] == list(map(int, split.patients))


def test_validation_depends_on_the_split_seed_alone(tree: Path, tmp_path: Path) -> None:
    first = cases_of(load(tree, tmp_path))
    write_labels(tree, case_names(30)[::-1])
    assert cases_of(load(tree, tmp_path)) == first
    assert cases_of(load(tree, tmp_path, split_seed=1))["val"] != first["val"]
    assert len(cases_of(load(tree, tmp_path, val_fraction=0.5))["val"]) == 20


def test_the_run_folder_learns_the_counts(tree: Path, tmp_path: Path) -> None:
    data = load(tree, tmp_path)
    for part, split in data.splits.items():
        counts = data.counts[part]
        assert counts["images"] == len(split)
        assert counts["patients"] == len(split) // 2
        assert counts["labels"]["Mass"] == split.labels[:, LABELS.index("Mass")].sum()
        assert counts["labels"]["none"] == (split.labels.sum(axis=1) == 0).sum()


def test_missing_and_unreadable_images_are_named_or_left_out(tree: Path, tmp_path: Path) -> None:
    """How many and the first five; without them every other case keeps its split, its labels and its pixels."""
    whole = load(tree, tmp_path)
    gone, bad = case_names(30)[4:11], ["00000009_001.png", "00000027_000.png"]
    for case in gone:
        image_path(tree, case).unlink()
    with pytest.raises(InputError, match=r"^7 of 60 images .*images_\*/images.*\(00000003_000.png.* and 2 more\)"):
        load(tree, tmp_path)
    for case in bad:
        image_path(tree, case).write_bytes(image_path(tree, case).read_bytes()[:60])
    part = load(tree, tmp_path, allow_missing=True)
    left_out = part.description["left_out"]
    assert list(left_out) == [*gone, *bad]
    assert {left_out[case] for case in gone} == {"is not there"}
    assert all(left_out[case].startswith("is damaged: ") for case in bad)
    for name, split in part.splits.items():
        before = whole.splits[name]
        rows = [row for row, case in enumerate(before.cases) if case not in {*gone, *bad}]
        assert split.cases == [before.cases[row] for row in rows]
        np.testing.assert_array_equal(split.labels, before.labels[rows])
        np.testing.assert_array_equal(split.images[list(range(len(rows)))], before.images[rows])
    assert part.files != whole.files
    whole_lists = [case for case in case_names(30) if case not in gone]
    write_lists(tree, whole_lists[:-8], whole_lists[-8:])
    refused = r"^2 of 53 images can't be used \(00000009_001.png is damaged: .*, 00000027_000"
    with pytest.raises(InputError, match=refused):
        load(tree, tmp_path)


def break_header(tree: Path) -> None:
    labels = tree / "Data_Entry_2017.csv"
    labels.write_text(labels.read_text().replace("Finding Labels", "Findings"))


def break_label(tree: Path) -> None:
    labels = tree / "Data_Entry_2017.csv"
    labels.write_text(labels.read_text().replace("Hernia|", "Hernai|", 1))


def cut_line(tree: Path) -> None:
    (tree / "Data_Entry_2017.csv").write_text(f"{HEADER}\n00000001_000.png,Mass\n")


def repeat_line(tree: Path) -> None:
    write_labels(tree, [*case_names(30), "00000001_000.png"])


def binary_labels(tree: Path) -> None:
    (tree / "Data_Entry_2017.csv").write_bytes(b"\x89PNG\xff\xfe")


def remove_images(tree: Path) -> None:
    for path in tree.glob("images_*/images/*"):
        path.unlink()


def remove_everything(tree: Path) -> None:
    remove_images(tree)
    for path in tree.glob("*.*"):
        path.unlink()


def lists(train_val: slice, test: slice) -> Callable[[Path], None]:
    return lambda tree: write_lists(tree, case_names(40)[train_val], case_names(40)[test])


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (remove_everything, "holds no label file: expected Data_Entry_2017_v2020.csv or Data_Entry_2017.csv"),
        (remove_images, "^60 of 60 images are neither files in"),
        (lambda tree: (tree / "Data_Entry_2017.csv").unlink(), "holds no label file"),
        (lambda tree: (tree / "test_list.txt").unlink(), r"test_list.txt is no file: expected NIH's official list"),
        (break_header, "has no column 'Finding Labels'"),
        (break_label, "line 4, 00000002_000.png has the label 'Hernai': expected 'No Finding' or any of Atelectasis"),
        (cut_line, "line 2, 00000001_000.png: expected an image, its labels and its patient"),
        (repeat_line, "line 62, 00000001_000.png stands there twice"),
        (binary_labels, "Data_Entry_2017.csv can't be read as CSV"),
        (lists(slice(0, 40), slice(40, 62)), "names 2 images that Data_Entry_2017.csv doesn't, such as 00000031_000"),
        (lists(slice(0, 41), slice(40, 60)), "share 1 images, such as 00000021_000.png"),
        (lists(slice(0, 41), slice(41, 60)), r"the test split shares 1 patients with the others \(21\)"),
        (
            lists(slice(0, 60), slice(0)),
            "chestxray14 has no image in its test split: all of train, val, test are needed",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_bad_trees_are_told_in_one_sentence(
    tree: Path, tmp_path: Path, spoil: Callable[[Path], None], expected: str
) -> None:
    spoil(tree)
    with pytest.raises(InputError, match=expected) as error:
        load(tree, tmp_path / "prepared")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "prepared").exists()
