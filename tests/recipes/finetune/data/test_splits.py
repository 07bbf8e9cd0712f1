"""A catalogue is split by patient, and once; what belongs together stays together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from finetune.data.catalogue import Catalogue, ImageFiles
from finetune.data.splits import (
    FOLD,
    SPLIT,
    check_classes,
    check_patients,
    fold_numbers,
    hold_out,
    hold_out_stratified,
    read_split,
    split_table,
    units_of,
)
from finetune.data.tasks import Task
from finetune.errors import InputError
from finetune.files import write_csv


def catalogue(patients: int = 20, per_patient: int = 3, known: bool = True) -> Catalogue:
    """So many images of each patient, of which the last quarter is the test part."""
    count = patients * per_patient
    return Catalogue(
        name="made",
        task=Task("binary", ("no", "yes")),
        cases=[f"{k:03d}.png" for k in range(count)],
        labels=np.arange(count) % 2,
        split=np.where(np.arange(count) < count * 3 // 4, "train", "test"),
        images=ImageFiles([None] * count, [str(k) for k in range(count)]),
        patients=[f"p{k // per_patient:02d}" for k in range(count)] if known else None,
    )


def test_patients_are_held_out_whole() -> None:
    whole = catalogue()
    held_out = hold_out(whole, "val", 0.2, seed=0)
    patients = {part: {held_out.patients[row] for row in held_out.rows(part)} for part in ("train", "val", "test")}
    assert [len(found) for found in patients.values()] == [12, 3, 5]
    assert len(held_out.rows("val")) == 9
    assert not patients["train"] & patients["val"]
    np.testing.assert_array_equal(held_out.rows("test"), whole.rows("test"))
    assert set(whole.split) == {"train", "test"}


def test_images_are_held_out_where_patients_are_not_known() -> None:
    first, again, other = (hold_out(catalogue(known=False), "val", 0.2, seed) for seed in (0, 0, 1))
    assert len(first.rows("val")) == 9
    np.testing.assert_array_equal(first.split, again.split)
    assert (first.split != other.split).any()


def test_missing_images_change_nobodys_part() -> None:
    whole = hold_out(catalogue(), "val", 0.2, seed=0)
    images = ImageFiles(["there.png", *[None] * 59], whole.images.keys)
    np.testing.assert_array_equal(hold_out(replace(catalogue(), images=images), "val", 0.2, seed=0).split, whole.split)


def test_a_patient_in_two_parts_is_refused() -> None:
    held_out = hold_out(catalogue(), "val", 0.2, seed=0)
    check_patients(held_out)
    split = held_out.split.copy()
    split[held_out.rows("val")[0]] = "train"
    patient = held_out.patients[held_out.rows("val")[0]]
    with pytest.raises(InputError, match=rf"the val split shares 1 patients with the others \({patient}\): expected"):
        check_patients(replace(held_out, split=split))


def test_too_few_patients_are_refused() -> None:
    with pytest.raises(InputError, match="made has 3 images to train on, of too few patients for some to be held out"):
        hold_out(catalogue(patients=1, per_patient=4), "val", 0.2, seed=0)


def distinct(whole: Catalogue) -> list[bytes]:
    """Pixel hashes of images none of which is another's twin."""
    return [f"hash {k}".encode() for k in range(len(whole.cases))]


def test_units_are_patients_and_twins_and_what_they_link() -> None:
    whole = catalogue(patients=4, per_patient=2)
    hashes = distinct(whole)
    assert len(set(units_of(whole, hashes))) == 4
    hashes[1] = hashes[2]  # of patients 0 and 1
    units = units_of(whole, hashes)
    assert units[0] == units[1] == units[2] == units[3]
    assert len(set(units)) == 3
    alone = replace(whole, patients=None)
    assert len(set(units_of(alone, hashes))) == 7
    assert len(set(units_of(alone, [None] * 8))) == 8


@pytest.mark.parametrize("known", [True, False])
def test_a_stratified_part_has_the_shares_of_the_classes(known: bool) -> None:
    whole = replace(catalogue(patients=100, known=known), labels=(np.arange(300) // 3 % 5 == 0).astype(np.int64))
    units = units_of(whole, distinct(whole))
    first, again, other = (hold_out_stratified(whole, "val", 0.2, seed, units) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.split, again.split)
    assert (first.split != other.split).any()
    train, val = first.rows("train"), first.rows("val")
    assert len(val) / (len(train) + len(val)) == pytest.approx(0.2, abs=0.02)
    assert first.labels[val].mean() == pytest.approx(first.labels[train].mean(), abs=0.03)
    assert not {units[row] for row in train} & {units[row] for row in val}


def test_the_rarest_label_is_in_every_part() -> None:
    labels = np.zeros((300, 3), dtype=np.int64)
    labels[:, 0] = 1
    labels[::2, 1] = 1
    labels[5:225:45, 2] = 1  # five images
    whole = replace(catalogue(patients=300, per_patient=1), labels=labels, task=Task("multi-label", ("a", "b", "c")))
    held_out = hold_out_stratified(whole, "val", 0.2, 0, units_of(whole, distinct(whole)))
    assert [held_out.labels[held_out.rows(part), 2].sum() for part in ("train", "val")] == [4, 1]


def test_folds_test_each_image_once_and_part_no_patient() -> None:
    whole = catalogue(patients=40)
    units = units_of(whole, distinct(whole))
    numbers = fold_numbers(whole, 4, 0, units)
    assert [np.count_nonzero(numbers == fold) for fold in range(-1, 4)] == [30, *[pytest.approx(22.5, abs=3)] * 4]
    assert all(len(set(numbers[(units == unit) & (whole.split == "train")])) <= 1 for unit in set(units))
    np.testing.assert_array_equal(numbers, fold_numbers(whole, 4, 0, units))


def test_too_few_to_be_parted_are_told() -> None:
    whole = catalogue(patients=4, per_patient=2)
    with pytest.raises(InputError, match="made has 6 images of 3 patients or cases, too few to be parted in 5"):
        hold_out_stratified(whole, "val", 0.2, 0, units_of(whole, distinct(whole)))


def test_classes_that_a_part_lacks_are_told_or_refused() -> None:
    whole = catalogue()
    held_out = hold_out(whole, "val", 0.2, seed=0)
    train, val, test = (np.bincount(held_out.labels[held_out.rows(part)]) for part in ("train", "val", "test"))
    assert check_classes(held_out) == [
        f"{name} has few images: {train[k]} in train, {val[k]} in val, {test[k]} in test"
        for k, name in enumerate(("no", "yes"))
    ]
    split = np.where(whole.labels == 1, "train", whole.split)
    split[:4] = "val"
    assert "yes has no image in test, where its figures are not defined" in check_classes(replace(whole, split=split))
    split = np.where(whole.labels == 1, "test", whole.split)
    with pytest.raises(InputError, match=r"the class yes of made has no image in train \(0 in val, 30 in test\)"):
        check_classes(replace(whole, split=split))


@pytest.mark.parametrize("column", [SPLIT, FOLD])
def test_a_split_can_be_given_back(tmp_path: Path, column: str) -> None:
    whole = hold_out(catalogue(), "val", 0.2, seed=0)
    whole.split[7] = ""
    values = whole.split if column == SPLIT else np.where(whole.split == "", "", "2")
    write_csv(tmp_path / "split.csv", *split_table(whole, column, values))
    np.testing.assert_array_equal(read_split(tmp_path / "split.csv", whole, column), values)
    part = replace(whole, cases=[*whole.cases[:-1], "new.png"])
    with pytest.raises(InputError, match=r"names 1 images that made doesn't have, such as 059\.png"):
        read_split(tmp_path / "split.csv", part, column)
    (tmp_path / "split.csv").write_text(f"case,{column}\n001.png,train\n")
    assert list(np.flatnonzero(read_split(tmp_path / "split.csv", part, column) != "")) == [1]


@pytest.mark.parametrize("content", ["case,set\na,train\n", "\xff", None])
def test_what_is_no_split_file_is_told(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "split.csv").write_text(content, encoding="latin-1")
    with pytest.raises(
        InputError, match=r"--split-file .* (has no column split|can't be read .*): give the split.csv of a"
    ):
        read_split(tmp_path / "split.csv", catalogue(), SPLIT)
