"""Cross-validation: each case is tested in one fold, validated on in the one before, and trained on in the others."""

import hashlib
from dataclasses import replace

import numpy as np

from ..errors import InputError
from .catalogue import LEFT_OUT, Catalogue
from .images import ImageData
from .prepared import PreparedImages, as_image_data, split_of
from .splits import FEW, check_classes
from .squares import Form
from .tasks import label_counts

FEWEST = 3  # one to test, one to validate on and one to train on


def in_fold(catalogue: Catalogue, numbers: np.ndarray, fold: int) -> Catalogue:
    """The catalogue as it is split in a fold.

    Args:
        numbers: the fold in which each image is tested, int64 (N,); -1 for what is left out.
    """
    split = np.full(len(numbers), "train", dtype=object)
    split[numbers == fold] = "test"
    split[numbers == (fold + 1) % (numbers.max() + 1)] = "val"
    split[numbers < 0] = LEFT_OUT
    return replace(catalogue, split=split.astype(str))


def cross_validated(
    catalogue: Catalogue, numbers: np.ndarray, images: PreparedImages, form: Form, image_size: int
) -> ImageData:
    """The data of all folds, and of each."""
    count = int(numbers.max()) + 1
    folds = [as_image_data(in_fold(catalogue, numbers, fold), images, form, image_size) for fold in range(count)]
    tested = [np.flatnonzero(numbers == fold) for fold in range(count)]
    everything = split_of(catalogue, images, np.concatenate(tested))
    cases = "\n".join(f"{fold} {catalogue.cases[row]}" for fold, rows in enumerate(tested) for row in rows)
    pixels = b"".join(everything.pixel_hashes or ())
    checksums = {"cases": hashlib.sha256(cases.encode()).hexdigest(), "pixels": hashlib.sha256(pixels).hexdigest()}
    return replace(
        folds[0],
        train=everything,
        val=everything,
        test=everything,
        files=folds[0].files | checksums,
        description={**folds[0].description, "folds": count},
        folds=tuple(folds),
    )


def check_fold_classes(catalogue: Catalogue, numbers: np.ndarray) -> list[str]:
    """Refuse a class that some fold doesn't train on; sentences on those that have few images in some fold."""
    count = int(numbers.max()) + 1
    for fold in range(count):
        check_classes(in_fold(catalogue, numbers, fold))
    counts = [label_counts(catalogue.task, catalogue.labels[numbers == fold]) for fold in range(count)]
    fewest = {name: min(found[name] for found in counts) for name in catalogue.task.classes}
    return [f"{name} has few images: {found:,} in a fold" for name, found in fewest.items() if found < FEW]


def check_fold_numbers(given: np.ndarray, folds: int, source: str) -> np.ndarray:
    """Folds as text, empty for what is left out, as numbers, int64 (N,).

    Args:
        source: who gives them, for the error.
    """
    names = {LEFT_OUT: -1} | {str(fold): fold for fold in range(folds)}
    unknown = sorted(set(given.tolist()) - names.keys())
    lacking = sorted(names.keys() - set(given.tolist()) - {LEFT_OUT})
    if unknown or lacking:
        found = f"the fold {unknown[0]!r}" if unknown else f"no image in the fold {lacking[0]}"
        raise InputError(f"{source} has {found}: expected 0 to {folds - 1}, as --folds {folds} says")
    return np.array([names[fold] for fold in given.tolist()])
