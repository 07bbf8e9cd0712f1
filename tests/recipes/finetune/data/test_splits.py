"""A catalogue is split by patient, and once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from finetune.data.catalogue import Catalogue, ImageFiles
from finetune.data.splits import check_patients, hold_out
from finetune.data.tasks import Task
from finetune.errors import InputError


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
