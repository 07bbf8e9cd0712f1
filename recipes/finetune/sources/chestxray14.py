"""ChestX-ray14 as a data set of the trial, from whichever source: labels, splits, and prepared images."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.model_selection import GroupShuffleSplit

from ..data.images import ImageData, Split
from ..data.prepared import ImageSource, prepare
from ..data.tasks import Task
from ..errors import InputError

NAME = "chestxray14"
# In the order of the paper's table, spelt as in NIH's label file.
LABELS = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
)
NO_FINDING = "No Finding"
_SPELLINGS = {"Pleural Thickening": "Pleural_Thickening", "Infiltrate": "Infiltration"}


@dataclass(frozen=True)
class ChestXrays:
    """The images of both official lists.

    Attributes:
        cases: file names, unique.
        patients: whose image each is.
        labels: 0 and 1, int64 (N, 14).
        test: which belong to the official test set, bool (N,).
        images: the encoded images, in the same order.
        subgroups: per property, such as sex, the value of each image, None where it is not known.
        files: checksum per source file.
        description: where the labels come from, for the run folder.
    """

    cases: list[str]
    patients: list[str]
    labels: np.ndarray
    test: np.ndarray
    images: ImageSource
    files: dict[str, str]
    description: dict[str, Any]
    subgroups: dict[str, list[str | None]] = field(default_factory=dict)


def label_row(names: Iterable[str], where: str) -> list[int]:
    """0 and 1 per label of LABELS, for the names that an image has; "No Finding" is none of them."""
    found = {_SPELLINGS.get(name, name) for name in names} - {NO_FINDING}
    unknown = found.difference(LABELS)
    if unknown:
        raise InputError(
            f"{where} has the label {sorted(unknown)[0]!r}: expected {NO_FINDING!r} or any of {', '.join(LABELS)}"
        )
    return [int(label in found) for label in LABELS]


def chestxray_data(
    xrays: ChestXrays,
    *,
    prepared_dir: Path,
    prepare_size: int,
    image_size: int,
    workers: int,
    val_fraction: float,
    split_seed: int,
    allow_missing: bool,
) -> ImageData:
    """Prepare the images, or find them prepared, and split them.

    Args:
        prepared_dir: the folder of all prepared images.
        prepare_size: side of the prepared squares.
        image_size: side of what the model sees of them.
        val_fraction: share of the patients of the training list that are held out for validation.
        allow_missing: go on without images that are missing or can't be read.
    """
    splits = _split_rows(xrays, val_fraction, split_seed)
    images = prepare(xrays.images, prepare_size, prepared_dir / f"{NAME}-{prepare_size}px", workers)
    absent = images.absent()
    left_out = [xrays.cases[row] for row in np.flatnonzero(absent)]
    check_complete(left_out, len(xrays.cases), "can't be read as 8-bit images", allow_missing)

    def split(rows: np.ndarray) -> Split:
        return Split(
            images.select(rows),
            xrays.labels[rows],
            [xrays.cases[row] for row in rows],
            [xrays.patients[row] for row in rows],
            {name: [values[row] for row in rows] for name, values in xrays.subgroups.items()},
        )

    parts = {}
    for part, rows in splits.items():
        parts[part] = split(rows[~absent[rows]])
        if not len(parts[part]):
            raise InputError(f"no image is left in the {part} split of {NAME}: more images are needed")
    used = "\n".join(case for split in parts.values() for case in split.cases)
    files = {**xrays.files, "cases": hashlib.sha256(used.encode()).hexdigest()}
    description = {
        **xrays.description,
        "prepare_size": prepare_size,
        "image_size": image_size,
        "left_out": left_out,
        "splits": {part: _counts(parts[part]) for part in parts},
    }
    return ImageData(
        NAME, Task("multi-label", LABELS), **parts, image_size=image_size, files=files, description=description
    )


def check_complete(lacking: Sequence[str], total: int, state: str, allow_missing: bool) -> None:
    """Refuse images that are missing or can't be read, unless that is allowed."""
    if lacking and not allow_missing:
        more = f" and {len(lacking) - 5:,} more" if len(lacking) > 5 else ""
        raise InputError(
            f"{len(lacking):,} of {total:,} images {state} ({', '.join(lacking[:5])}{more}): get them again, or go on "
            "without them with --allow-missing"
        )


def _split_rows(xrays: ChestXrays, val_fraction: float, split_seed: int) -> dict[str, np.ndarray]:
    """The official test list, and the other one split by patient; missing images change nobody's split."""
    patients = np.array(xrays.patients)
    test, rest = np.flatnonzero(xrays.test), np.flatnonzero(~xrays.test)
    shared = np.intersect1d(patients[test], patients[rest])
    if len(shared):
        raise InputError(
            f"the test split shares {len(shared):,} patients with the others ({', '.join(shared[:5])}): expected the "
            "official lists, which share none"
        )
    if not len(test) or len(np.unique(patients[rest])) < 2:
        raise InputError(f"{NAME} has {len(rest)} images to train on and {len(test)} to test on: both are needed")
    shuffle = GroupShuffleSplit(n_splits=1, test_size=val_fraction, random_state=split_seed)
    train, val = next(shuffle.split(rest, groups=patients[rest]))
    return {"train": rest[train], "val": rest[val], "test": test}


def _counts(split: Split) -> dict[str, Any]:
    positive = split.labels.sum(axis=0).tolist()
    return {
        "images": len(split),
        "patients": len(set(split.patients)),
        "labels": dict(zip(LABELS, positive, strict=True)) | {NO_FINDING: int((split.labels.sum(axis=1) == 0).sum())},
    }
