"""The same image or patient in two splits is found, named, refused or dropped."""

from __future__ import annotations

import io

import numpy as np
import pytest
from finetune.data.images import ImageData, Split
from finetune.data.tasks import Task
from finetune.data.twins import (
    NEAR_BITS,
    describe_near,
    drop_leaks,
    find_leaks,
    find_near_twins,
    leak_table,
    near_table,
    note_near_twins,
    refuse_leaks,
    settle_leaks,
)
from finetune.errors import InputError
from PIL import Image, ImageFilter

SIDE = 64


def picture(number: int) -> np.ndarray:
    """Blurred noise, (1, SIDE, SIDE): no two are alike, and compression changes little."""
    noise = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
    blurred = np.asarray(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(4)), dtype=float)
    return ((blurred - blurred.min()) * 255 / np.ptp(blurred)).astype(np.uint8)[None]


def made(**pictures: list[np.ndarray]) -> ImageData:
    """Two classes in turns; each image is of a patient of its own."""
    splits = {
        part: Split(
            images=np.stack(images),
            labels=np.arange(len(images)) % 2,
            cases=[f"{part}{k}" for k in range(len(images))],
            patients=[f"{part} patient {k}" for k in range(len(images))],
        )
        for part, images in pictures.items()
    }
    return ImageData("made", Task("binary", ("no", "yes")), **splits)


@pytest.fixture
def leaky() -> ImageData:
    """Picture 1 in train (class 1) and test (class 0); picture 2 twice in train and in val, all of one class."""
    train = [picture(k) for k in (0, 1, 2, 3, 2)]
    return made(train=train, val=[picture(2), picture(4)], test=[picture(1), picture(5)])


def test_exact_twins_are_found_and_named(leaky: ImageData) -> None:
    first, second = find_leaks(leaky)
    assert (first.kind, first.places, first.conflicting) == ("image", (("train", 1), ("test", 0)), True)
    assert (second.places, second.conflicting) == ((("train", 2), ("train", 4), ("val", 0)), False)
    with pytest.raises(InputError) as error:
        refuse_leaks(leaky, [first, second])
    assert str(error.value) == (
        "1 images of made lie in several splits (1 in train and test, 1 of them with conflicting labels): train "
        "train1 = test test0: drop the copies outside test with --drop-twins, or go on with them by --allow-twins"
    )
    header, rows = leak_table(leaky, [first, second])
    assert dict(zip(header, rows[0], strict=True)) == {
        "number": 1,
        "kind": "image",
        "split": "train",
        "case": "train1",
        "labels": "yes",
        "conflicting": True,
    }
    assert len(rows) == 5


def test_twins_beside_test_are_told_and_not_refused(leaky: ImageData) -> None:
    _, second = find_leaks(leaky)
    refuse_leaks(leaky, [second])
    data, sentences = settle_leaks(leaky, drop=False)
    assert data.splits == leaky.splits
    assert len(sentences) == 1
    assert sentences[0].startswith(
        "2 images of made lie in several splits (1 in train and test, 1 in train and val, 1 of"
    )
    assert data.description["leaks"] == sentences
    assert "leaks.csv" in data.tables


def test_dropping_leaves_each_in_its_last_split(leaky: ImageData) -> None:
    data, sentences = settle_leaks(leaky, drop=True)
    assert sentences[0].endswith(", dropped there but for the last")
    assert data.train.cases == ["train0", "train3"]
    assert (data.val.cases, data.test.cases) == (leaky.val.cases, leaky.test.cases)
    np.testing.assert_array_equal(data.train.images[[1]], leaky.train.images[[3]])
    np.testing.assert_array_equal(data.train.labels, leaky.train.labels[[0, 3]])
    assert data.train.patients == ["train patient 0", "train patient 3"]
    assert not find_leaks(data)
    again, sentences = settle_leaks(data, drop=True)
    assert (again.splits, again.description["leaks"], sentences) == (data.splits, [], [])


def test_patients_in_two_splits_are_found(leaky: ImageData) -> None:
    clean, _ = settle_leaks(leaky, drop=True)
    clean.val.patients[1] = "train patient 3"
    (leak,) = find_leaks(clean)
    assert (leak.kind, leak.places) == ("patient", (("train", 1), ("val", 1)))
    clean.test.patients[0] = "train patient 3"
    with pytest.raises(
        InputError, match=r"1 patients of made lie in several splits \(1 in train and val and test\): train"
    ):
        refuse_leaks(clean, find_leaks(clean))
    assert drop_leaks(clean, find_leaks(clean)).train.cases == ["train0"]


def test_nothing_is_left_to_drop(leaky: ImageData) -> None:
    data = made(train=[picture(1)], val=[picture(2)], test=[picture(1)])
    with pytest.raises(InputError, match="--drop-twins leaves no image in the train split of made"):
        settle_leaks(data, drop=True)


def test_hashes_of_the_files_count_where_they_are_known() -> None:
    """Images that only became equal by being made small are no twins."""
    data = made(train=[picture(0), picture(1)], val=[picture(2)], test=[picture(1)])
    assert len(find_leaks(data)) == 1
    for number, split in enumerate(data.splits.values()):
        object.__setattr__(split, "pixel_hashes", [bytes([number, k]) for k in range(len(split))])
    assert not find_leaks(data)


def compressed(image: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image[0]).save(file, "JPEG", quality=60)
    return np.asarray(Image.open(file))[None]


def brighter(image: np.ndarray) -> np.ndarray:
    return (image * 0.8 + 40).astype(np.uint8)


def mirrored(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image[:, :, ::-1])


@pytest.fixture(scope="module")
def alike() -> ImageData:
    """Pictures 0 to 2 in train look like those in test, the last one mirrored; picture 3 is in both."""
    others = [picture(k) for k in range(10, 30)]
    test = [compressed(picture(0)), brighter(picture(1)), mirrored(picture(2)), picture(3), picture(4)]
    return made(train=[picture(k) for k in range(4)] + others, val=[picture(5)], test=test)


def test_near_twins_are_found_and_exact_ones_are_not_among_them(alike: ImageData) -> None:
    search = find_near_twins(alike)
    assert {(twins.first, twins.second, twins.mirrored) for twins in search.nearest} == {
        (("train", 0), ("test", 0), False),
        (("train", 1), ("test", 1), False),
        (("train", 2), ("test", 2), True),
    }
    assert (search.found, search.compared, search.drawn) == (3, 24 + 24 * 5 + 5, {})
    header, rows = near_table(alike, search.nearest)
    bits = [dict(zip(header, row, strict=True))["bits"] for row in rows]
    assert bits == sorted(bits)
    assert max(bits) <= NEAR_BITS


def test_near_twins_are_noted_and_nothing_follows(alike: ImageData) -> None:
    data = note_near_twins(alike)
    assert data.splits == alike.splits
    assert data.description["near_twins"] == (
        "3 of the 149 pairs of images over the splits look alike (4 of the 64 bits of imagehash's phash or fewer "
        "differ, mirrored or not), which may mean nothing: near_twins.csv lists them"
    )
    assert len(data.tables["near_twins.csv"][1]) == 3
    none = note_near_twins(made(train=[picture(0)], val=[picture(1)], test=[picture(2)]))
    assert none.description["near_twins"].startswith("0 of the 3 pairs of images over the splits look alike (")
    assert none.description["near_twins"].endswith("mirrored or not)")
    assert "near_twins.csv" not in none.tables


def test_of_a_large_split_some_images_are_drawn_and_the_nearest_pairs_are_told(
    alike: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are those of the whole split, whatever was drawn."""
    every = {(twins.first, twins.second): twins for twins in find_near_twins(alike).nearest}
    monkeypatch.setattr("finetune.data.twins._MOST_HASHED", 20)
    drawn = find_near_twins(alike)
    assert (drawn.drawn, drawn.compared) == ({"train": 20}, 20 + 20 * 5 + 5)
    assert drawn.found == len(drawn.nearest) > 0
    assert all(every[twins.first, twins.second] == twins for twins in drawn.nearest)
    assert ", of train 20 images drawn at random, which may mean nothing" in describe_near(drawn)
    monkeypatch.setattr("finetune.data.twins._MOST_HASHED", 30)
    monkeypatch.setattr("finetune.data.twins._MOST_TOLD", 1)
    monkeypatch.setattr("finetune.data.twins._CHUNK", 1)
    nearest = find_near_twins(alike)
    assert nearest.found == 3
    assert [twins.bits for twins in nearest.nearest] == [min(twins.bits for twins in every.values())]
    assert describe_near(nearest).endswith("near_twins.csv lists the nearest 1")


def test_colours_have_near_twins_too() -> None:
    def coloured(number: int) -> np.ndarray:
        return np.concatenate([picture(number), picture(number), picture(number) // 2])

    data = made(train=[coloured(0), coloured(1)], val=[coloured(2)], test=[brighter(coloured(1)), coloured(3)])
    assert [(twins.first, twins.second) for twins in find_near_twins(data).nearest] == [(("train", 1), ("test", 0))]
