"""The images of a data set before they are decoded: which there are, and what is known of them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from sklearn.model_selection import GroupShuffleSplit

from ..errors import InputError
from .tasks import Task

PARTS = ("train", "val", "test")


class EncodedImages(Protocol):
    """Image files in a fixed order."""

    def __len__(self) -> int: ...

    def key(self, row: int) -> str:
        """What tells this image from any other, and from itself before a change."""
        ...

    def read(self, row: int) -> bytes | None:
        """The encoded file, or None when there is none; an OSError says that it can't be read now."""
        ...


@dataclass(frozen=True)
class ImageFiles:
    """Image files on disk, each by its path, or None where there is none, and by what tells it from a changed one."""

    paths: list[str | None]
    keys: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def key(self, row: int) -> str:
        return self.keys[row]

    def read(self, row: int) -> bytes | None:
        path = self.paths[row]
        return None if path is None else Path(path).read_bytes()


@dataclass(frozen=True)
class Catalogue:
    """What a source knows of its images; none is decoded yet.

    Attributes:
        name: of the data set.
        task: what is learnt from it.
        cases: what names each image, unique.
        labels: class indices, int64 (N,), or 0 and 1, int64 (N, labels).
        split: which part each image belongs to, one of PARTS, text (N,).
        images: the encoded images, in the same order.
        patients: whose image each is, where that is known.
        subgroups: per property, such as sex, the value of each image, None where it is not known.
        files: checksum per source file.
        description: where the images come from, for the run folder.
    """

    name: str
    task: Task
    cases: list[str]
    labels: np.ndarray
    split: np.ndarray
    images: EncodedImages
    patients: list[str] | None = None
    subgroups: dict[str, list[str | None]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    description: dict[str, Any] = field(default_factory=dict)

    def rows(self, part: str) -> np.ndarray:
        """The rows of a part, int64 (n,)."""
        return np.flatnonzero(self.split == part)

    def checksum(self, rows: Sequence[int]) -> str:
        """Of the names of these images, in their order."""
        return hashlib.sha256("\n".join(self.cases[row] for row in rows).encode()).hexdigest()


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


def check_complete(lacking: Sequence[str], total: int, state: str, allow_missing: bool) -> None:
    """Refuse images that are missing or can't be read, unless that is allowed."""
    if lacking and not allow_missing:
        more = f" and {len(lacking) - 5:,} more" if len(lacking) > 5 else ""
        raise InputError(
            f"{len(lacking):,} of {total:,} images {state} ({', '.join(lacking[:5])}{more}): get them again, or go on "
            "without them with --allow-missing"
        )


def _units(catalogue: Catalogue) -> np.ndarray:
    """What must not be torn apart by a split: the patient of each image, or else the image itself."""
    return np.array(catalogue.cases if catalogue.patients is None else catalogue.patients)
