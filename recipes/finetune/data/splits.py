"""Which images are trained on, validated on and tested on; what belongs together, as a patient does, is not parted."""

import csv
import warnings
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import GroupShuffleSplit, StratifiedGroupKFold, StratifiedKFold

from ..errors import InputError, first_line
from ..files import no_formula, regular_file
from .catalogue import LEFT_OUT, PARTS, Catalogue
from .images import Table
from .tasks import label_counts, labels_text

SPLIT_FILE, SPLIT, FOLD = "split.csv", "split", "fold"
FEW = 10  # of a class in a part, below which it is told
_LARGEST_DENOMINATOR = 10


def hold_out(catalogue: Catalogue, part: str, fraction: float, seed: int) -> Catalogue:
    """Move a share of the training patients, or images where patients are not known, to another part.

    The draw depends on the images that the catalogue names, so that missing ones change nobody's part.
    """
    train = catalogue.rows("train")
    units = _units(catalogue)[train]
    if len(np.unique(units)) < 2:
        raise InputError(
            f"{catalogue.name} has {len(train)} images to train on, of too few patients for some to be held out as "
            f"{part}: more images are needed"
        )
    shuffle = GroupShuffleSplit(n_splits=1, test_size=fraction, random_state=seed)
    _, held_out = next(shuffle.split(train, groups=units))
    split = catalogue.split.copy()
    split[train[held_out]] = part
    return replace(catalogue, split=split)


def check_patients(catalogue: Catalogue) -> None:
    """Refuse a patient who has images in more than one part: the model would be tested on whom it was trained on."""
    units = _units(catalogue)
    for k, part in enumerate(PARTS):
        others = np.isin(catalogue.split, PARTS[:k])
        shared = np.intersect1d(units[catalogue.split == part], units[others])
        if len(shared):
            raise InputError(
                f"the {part} split shares {len(shared):,} patients with the others ({', '.join(shared[:5])}): expected "
                "splits that share none"
            )


def hold_out_stratified(catalogue: Catalogue, part: str, fraction: float, seed: int, units: np.ndarray) -> Catalogue:
    """Move a share of the training units to another part, with about that share of each class, or of each label.

    The share is rounded to a fraction with a denominator of 10 at most, so that a class with as many units as that is
    held out as well as trained on.

    Args:
        units: from units_of, (N,).
    """
    share = Fraction(fraction).limit_denominator(_LARGEST_DENOMINATOR)
    train = catalogue.rows("train")
    folds = _stratified_folds(catalogue, train, units[train], share.denominator, seed)
    split = catalogue.split.copy()
    split[train[folds < share.numerator]] = part
    return replace(catalogue, split=split)


def fold_numbers(catalogue: Catalogue, folds: int, seed: int, units: np.ndarray) -> np.ndarray:
    """The fold, from 0, in which each training image is tested, int64 (N,); -1 for what is not trained on."""
    train = catalogue.rows("train")
    numbers = np.full(len(catalogue.cases), -1)
    numbers[train] = _stratified_folds(catalogue, train, units[train], folds, seed)
    return numbers


def _stratified_folds(catalogue: Catalogue, rows: np.ndarray, units: np.ndarray, folds: int, seed: int) -> np.ndarray:
    found, strata = len(np.unique(units)), _strata(catalogue, rows)
    if found < folds or np.unique(strata, return_counts=True)[1].max() < folds:
        raise InputError(
            f"{catalogue.name} has {len(rows)} images of {found} patients or cases, too few to be parted in {folds}: "
            "more are needed"
        )
    kind = StratifiedKFold if found == len(rows) else StratifiedGroupKFold  # which takes long for many groups
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class with fewer cases than folds, which the source has told
        splitter = kind(folds, shuffle=True, random_state=seed).split(rows, strata, units)
        numbers = np.empty(len(rows), dtype=np.int64)
        for number, (_, held_out) in enumerate(splitter):
            numbers[held_out] = number
    return numbers


def _strata(catalogue: Catalogue, rows: np.ndarray) -> np.ndarray:
    """The class of each image; of several labels the rarest one that it has, or else none."""
    labels = catalogue.labels[rows]
    if not catalogue.task.multi_label:
        return labels
    from_rarest = np.argsort(labels.sum(axis=0), kind="stable")
    ordered = labels[:, from_rarest]
    return np.where(ordered.any(axis=1), ordered.argmax(axis=1), labels.shape[1])


def units_of(catalogue: Catalogue, pixel_hashes: Sequence[bytes | None]) -> np.ndarray:
    """What must not be parted, a number per image, int64 (N,): a patient's images, exact twins, and what they link."""
    images = np.arange(len(catalogue.cases))
    links = [np.array([hash_ or str(row).encode() for row, hash_ in enumerate(pixel_hashes)])]
    links += [] if catalogue.patients is None else [np.array(catalogue.patients)]
    numbers = [np.unique(link, return_inverse=True)[1] for link in links]
    offsets = len(images) + np.cumsum([0, *(found.max() + 1 for found in numbers[:-1])])
    ends = np.concatenate([found + offset for found, offset in zip(numbers, offsets, strict=True)])
    starts = np.tile(images, len(numbers))
    size = ends.max() + 1
    graph = coo_array((np.ones(len(starts)), (starts, ends)), shape=(size, size))
    return connected_components(graph, directed=False)[1][: len(images)]


def _units(catalogue: Catalogue) -> np.ndarray:
    """What must not be torn apart by a split: the patient of each image, or else the image itself."""
    return np.array(catalogue.cases if catalogue.patients is None else catalogue.patients)


def check_classes(catalogue: Catalogue) -> list[str]:
    """Refuse a class that is not trained on; sentences on those that a part lacks, or that have few images."""
    sentences = []
    counts = {part: label_counts(catalogue.task, catalogue.labels[catalogue.rows(part)]) for part in PARTS}
    for name in catalogue.task.classes:
        train, val, test = (counts[part][name] for part in PARTS)
        if not train and not catalogue.task.multi_label:
            raise InputError(
                f"the class {name} of {catalogue.name} has no image in train ({val} in val, {test} in test): take "
                "it out of the images, add some of it, or give a split in which it is trained on"
            )
        lacking = [part for part in PARTS if not counts[part][name]]
        if lacking:
            sentences.append(f"{name} has no image in {' and '.join(lacking)}, where its figures are not defined")
        elif min(train, val, test) < FEW:
            sentences.append(f"{name} has few images: {train:,} in train, {val:,} in val, {test:,} in test")
    return sentences


def split_table(catalogue: Catalogue, column: str, values: Sequence[Any]) -> Table:
    """A row per image with its labels and where it belongs, as read_split reads it.

    Args:
        column: SPLIT or FOLD.
        values: where each image belongs, empty text for what is left out.
    """
    patients: Sequence[str | None] = catalogue.patients or [None] * len(catalogue.cases)
    rows = [
        [case, patient, labels_text(catalogue.task, label), value]
        for case, patient, label, value in zip(catalogue.cases, patients, catalogue.labels, values, strict=True)
    ]
    return ("case", "patient", "labels", column), rows


def read_split(path: Path, catalogue: Catalogue, column: str, case: str = "case") -> np.ndarray:
    """Where a split file says that each image belongs, text (N,), empty for what it leaves out or doesn't name.

    Args:
        column, case: its columns of parts or folds, and of the images' names.
    """
    try:
        if not regular_file(path):
            raise OSError("it is no file, or not there")
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            lacking = {case, column}.difference(reader.fieldnames or ())
            if lacking:
                raise InputError(f"--split-file {path} has no column {min(lacking)}: give the {SPLIT_FILE} of a run")
            given = {row[case]: row[column] for row in reader}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"--split-file {path} can't be read ({first_line(error)}): give the {SPLIT_FILE} of a run"
        ) from error
    in_file = {case: case if case in given else no_formula(case) for case in catalogue.cases}
    unknown = given.keys() - set(in_file.values())
    if unknown:
        raise InputError(
            f"--split-file {path} names {len(unknown):,} images that {catalogue.name} doesn't have, such as "
            f"{min(unknown)}: give the split of these images"
        )
    return np.array([given.get(in_file[case]) or LEFT_OUT for case in catalogue.cases])


def given_split(path: Path, catalogue: Catalogue, column: str = SPLIT, case: str = "case") -> Catalogue:
    """The catalogue in the split of a file; what that leaves out belongs to no part."""
    split = read_split(path, catalogue, column, case)
    unknown = set(split.tolist()) - {*PARTS, LEFT_OUT}
    if unknown:
        raise InputError(f"--split-file {path} has the split {str(min(unknown))!r}: expected {', '.join(PARTS)}")
    return replace(catalogue, split=split)
