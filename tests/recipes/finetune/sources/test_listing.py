"""Classes are numbered: spellings, the positive class, and what can't be learnt."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from finetune.data.catalogue import ImageFiles
from finetune.errors import InputError
from finetune.sources.listing import Listing, catalogue_of, part_of


def listing(*labels: str | tuple[str, ...], **settings: object) -> Listing:
    names = [(label,) if isinstance(label, str) else label for label in labels]
    cases = [f"{k}.png" for k in range(len(names))]
    return Listing(cases, ImageFiles(list(cases), cases), names, **settings)


def test_classes_are_numbered_in_alphabetical_order() -> None:
    found = catalogue_of(listing("b", "c", "a", "b"), "made", None)
    assert (found.task.kind, found.task.classes) == ("multi-class", ("a", "b", "c"))
    np.testing.assert_array_equal(found.labels, [1, 2, 0, 1])
    assert set(found.split) == {"train"}


@pytest.mark.parametrize(
    ("names", "given", "positive"),
    [
        (("abnormal", "normal"), None, "abnormal"),
        (("PNEUMONIA", "NORMAL"), None, "PNEUMONIA"),
        (("no", "yes"), None, "yes"),
        (("No Finding", "Mass"), None, "Mass"),
        (("0", "1"), None, "1"),
        (("cat", "dog"), None, "dog"),
        (("cat", "dog"), "cat", "cat"),
        (("abnormal", "normal"), "normal", "normal"),
    ],
)
def test_the_positive_class_is_class_1(names: tuple[str, str], given: str | None, positive: str) -> None:
    found = catalogue_of(listing(*names), "made", given)
    assert found.task.kind == "binary"
    assert found.task.classes[1] == positive
    assert f"The positive class is {positive}, against {found.task.classes[0]}" in found.description["notices"]
    np.testing.assert_array_equal(found.labels, [found.task.classes.index(name) for name in names])


def test_a_positive_class_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match="--positive-class dgo is no class of made: did you mean dog"):
        catalogue_of(listing("cat", "dog"), "made", "dgo")
    with pytest.raises(InputError, match="--positive-class has no effect on the 3 classes of made"):
        catalogue_of(listing("a", "b", "c"), "made", "a")


def test_names_that_differ_in_case_spaces_or_normal_form_are_one() -> None:
    composed, decomposed = (unicodedata.normalize(form, "über") for form in ("NFC", "NFD"))
    found = catalogue_of(listing("Normal", "normal", "Normal ", "Normal", composed, decomposed, composed), "made", None)
    assert found.task.classes == ("Normal", composed)
    np.testing.assert_array_equal(found.labels, [0, 0, 0, 0, 1, 1, 1])
    assert "'Normal' and 'Normal ' and 'normal' are taken for one, 'Normal'" in found.description["notices"]


def test_labels_make_columns() -> None:
    found = catalogue_of(listing(("b", "a"), (), ("b",), multi_label=True), "made", None)
    assert (found.task.kind, found.task.classes) == ("multi-label", ("a", "b"))
    np.testing.assert_array_equal(found.labels, [[1, 1], [0, 0], [0, 1]])


def test_one_class_is_refused() -> None:
    with pytest.raises(InputError, match="made has the one class 'cat': expected two classes or more"):
        catalogue_of(listing("cat", "cat"), "made", None)
    with pytest.raises(InputError, match="made has no label"):
        catalogue_of(listing((), (), multi_label=True), "made", None)


def test_parts_by_their_names() -> None:
    assert [part_of(name) for name in ("Train", " TESTING", "valid", "dev", "cat")] == [
        "train",
        "test",
        "val",
        "val",
        None,
    ]
