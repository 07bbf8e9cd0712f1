"""Images and labels of a data set, whatever their source."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from PIL import Image

from .corruptions import GENERAL
from .squares import RESAMPLING, Form
from .tasks import Task, label_counts

Table = tuple[Sequence[str], Sequence[Sequence[Any]]]


class Images(Protocol):
    """uint8 images of shape (N, 1 or 3, side, side): an array, or what reads them when they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: list[int]) -> np.ndarray: ...


@dataclass(frozen=True)
class SomeImages:
    """Some rows of other images, read when they are asked for."""

    images: Images
    rows: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.rows), *self.images.shape[1:]

    def __getitem__(self, rows: list[int]) -> np.ndarray:
        return self.images[self.rows[rows].tolist()]


@dataclass(frozen=True)
class Split:
    """One split.

    Attributes:
        images: uint8, shape (N, 1 or 3, side, side).
        labels: class indices, int64 (N,), or 0 and 1, int64 (N, labels).
        cases: what names each image in the predictions, unique within the split.
        patients: whose image each case is, where that is known.
        subgroups: per property of the cases, such as sex, the value that each has, None where that is not known.
        pixel_hashes: what exact twins share, of the images as they were decoded; None: of `images`.
    """

    images: Images
    labels: np.ndarray
    cases: list[str]
    patients: list[str] | None = None
    subgroups: dict[str, list[str | None]] = field(default_factory=dict)
    pixel_hashes: list[bytes] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: np.ndarray) -> "Split":
        """Some of the cases, in the order of `rows`, int64 (n,)."""

        def of(column: list[Any]) -> list[Any]:
            return [column[row] for row in rows]

        return Split(
            images=SomeImages(self.images, rows),
            labels=self.labels[rows],
            cases=of(self.cases),
            patients=self.patients and of(self.patients),
            subgroups={name: of(values) for name, values in self.subgroups.items()},
            pixel_hashes=self.pixel_hashes and of(self.pixel_hashes),
        )

    def limited(self, cases: int, seed: int) -> "Split":
        """So many of the cases, drawn at random, in their order, with their images in memory."""
        chosen = self.select(np.sort(np.random.default_rng(seed).choice(len(self), cases, replace=False)))
        return replace(chosen, images=chosen.images[list(range(cases))])


@dataclass(frozen=True)
class BoxedFinding:
    """A label of an image, and where it is seen.

    Attributes:
        case: the image.
        label: its place among the task's classes.
        boxes: (B, 4): left, top, right and bottom as shares of the image's side, 0 to 1.
    """

    case: str
    label: int
    boxes: np.ndarray


@dataclass(frozen=True)
class ImageData:
    """A data set, split and at its final size.

    Attributes:
        image_size: side of the square that the model sees of each image, cut out at random in training and from the
            middle elsewhere; None: all of it.
        files: checksum per source file; a resumed run must find the same.
        description: what the run folder records of the data beside the checksums.
        tables: CSV files that the run folder keeps of the data: per name a header and rows.
        own_scores: the data set's own figures, by name, from probabilities on test; they are shown beside ours.
        folds: of cross-validation, the data of each fold; train, val and test of the whole then hold all cases, in the
            order in which the folds test them.
        form: how an image file becomes what the splits hold; None: it is squashed into their square.
        suite: which of SUITES in corruptions.py fits it.
    """

    name: str
    task: Task
    train: Split
    val: Split
    test: Split
    image_size: int | None = None
    files: dict[str, str] = field(default_factory=dict)
    description: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    own_scores: Callable[[np.ndarray], dict[str, float | None]] | None = None
    folds: tuple["ImageData", ...] = ()
    form: Form | None = None
    suite: str = GENERAL

    @property
    def splits(self) -> dict[str, Split]:
        """By their names; none is to share an image or a patient with another. Of cross-validation what folds test."""
        if self.folds:
            return {f"fold {number}": fold.test for number, fold in enumerate(self.folds)}
        return {"train": self.train, "val": self.val, "test": self.test}

    @property
    def channels(self) -> int:
        return self.train.images.shape[1]

    @property
    def size(self) -> int:
        """Side of what the model sees."""
        return self.image_size or self.train.images.shape[-1]

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How an image file becomes what the model sees, as the run folder records it; see squares.form_of."""
        form = self.form or Form(self.train.images.shape[-1])
        return {**form.recorded(), "image_size": self.size, "grey": self.channels == 1}

    @property
    def counts(self) -> dict[str, dict[str, Any]]:
        """Per split its images, its patients where they are known, and its cases per class or label, and of none."""
        return {part: _counts(self.task, split) for part, split in self.splits.items()}


def _counts(task: Task, split: Split) -> dict[str, Any]:
    patients = None if split.patients is None else len(set(split.patients))
    return {"images": len(split), "patients": patients, "labels": label_counts(task, split.labels)}


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """Square uint8 images (N, C, H, H) at `size`, by PIL's resize, which is the same on any processor; made once."""
    if images.shape[-2:] == (size, size):
        return images
    resized = np.empty((*images.shape[:2], size, size), dtype=np.uint8)
    for before, after in zip(images, resized, strict=True):
        square = Image.fromarray(before[0] if len(before) == 1 else np.moveaxis(before, 0, -1))
        after[:] = np.moveaxis(np.atleast_3d(np.asarray(square.resize((size, size), RESAMPLING))), -1, 0)
    return resized
