"""The images of a data set before they are decoded: which there are, and what is known of them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ..errors import InputError
from .opening import read_file
from .tasks import Task

PARTS = ("train", "val", "test")
LEFT_OUT = ""  # in place of a part


class EncodedImages(Protocol):
    """Image files in a fixed order."""

    def __len__(self) -> int: ...

    def key(self, row: int) -> str:
        """What tells this image from any other, and from itself before a change."""
        ...

    def read(self, row: int) -> bytes | None:
        """The encoded file, or None when there is none.

        Raises Unreadable for what is no file of an image, and OSError for one that can't be read now.
        """
        ...


@dataclass(frozen=True)
class ImageFiles:
    """Image files on disk, each by its path, or None where there is none, and by what tells it from a changed one."""

    paths: Sequence[str | None]
    keys: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def key(self, row: int) -> str:
        return self.keys[row]

    def read(self, row: int) -> bytes | None:
        path = self.paths[row]
        return None if path is None else read_file(path)


@dataclass(frozen=True)
class Catalogue:
    """What a source knows of its images; none is decoded yet.

    Attributes:
        name: of the data set.
        task: what is learnt from it.
        cases: what names each image, unique.
        labels: class indices, int64 (N,), or 0 and 1, int64 (N, labels).
        split: which part each image belongs to, one of PARTS or LEFT_OUT, text (N,).
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


def check_complete(lacking: Sequence[str], total: int, state: str, allow_missing: bool) -> None:
    """Refuse images that are missing or can't be read, unless that is allowed."""
    if lacking and not allow_missing:
        more = f" and {len(lacking) - 5:,} more" if len(lacking) > 5 else ""
        raise InputError(
            f"{len(lacking):,} of {total:,} images {state} ({', '.join(lacking[:5])}{more}): get them again, or go on "
            "without them with --allow-missing"
        )
