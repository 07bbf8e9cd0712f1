"""What a source of one's own images has found, before their labels are numbered."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..data.catalogue import Catalogue, EncodedImages
from ..data.tasks import Kind, Task
from ..errors import InputError, near_names

_PART_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
# What says that nothing is found: class 0 of a binary task, and no label among several.
_NOTHING = (
    "no finding",
    "no findings",
    "none",
    "normal",
    "negative",
    "healthy",
    "benign",
    "control",
    "no",
    "false",
    "0",
)


@dataclass(frozen=True)
class Listing:
    """Images with their labels as they are spelt.

    Attributes:
        cases: what names each image, unique.
        images: the encoded images, in the same order.
        labels: of each image, one class, or of a multi-label task any number of labels.
        multi_label: which of both.
        classes: in their order, where the source says so; None: those that images have, in alphabetical order.
        parts: of each image, one of PARTS; None: the images come without a split.
        patients, subgroups, files, description: as a Catalogue has them.
        notices: what the user is told of how the source was understood, in sentences.
    """

    cases: list[str]
    images: EncodedImages
    labels: list[tuple[str, ...]]
    multi_label: bool = False
    classes: tuple[str, ...] | None = None
    parts: list[str] | None = None
    patients: list[str] | None = None
    subgroups: dict[str, list[str | None]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    description: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def part_of(name: str) -> str | None:
    """The part that a folder or a table calls so, in whatever case, or None."""
    folded = name.strip().casefold()
    return next((part for part, names in _PART_NAMES.items() if folded in names), None)


def says_nothing(name: str) -> bool:
    """Whether a class or label says that nothing is found."""
    return name.strip().casefold().replace("_", " ") in _NOTHING


def catalogue_of(listing: Listing, name: str, positive_class: str | None) -> Catalogue:
    """Number the classes of a listing; what has no split is all to be trained on, until it is split.

    Args:
        name: of the data set.
        positive_class: class 1 of a binary task; None: the one that doesn't say that nothing is found, or else the
            second in alphabetical order.
    """
    listing = _with_one_spelling(listing)
    found = {label for labels in listing.labels for label in labels}
    classes = sorted(found) if listing.classes is None else list(listing.classes)
    if (len(classes) < 2 and not listing.multi_label) or not classes:
        raise InputError(
            f"{name} has {'the one class ' + repr(classes[0]) if classes else 'no label'}: expected two classes "
            "or more, or several labels"
        )
    binary = len(classes) == 2 and not listing.multi_label
    if binary:
        classes = _positive_last(classes, positive_class, name)
    elif positive_class is not None:
        raise InputError(f"--positive-class has no effect on the {len(classes)} classes of {name}: leave it out")
    kind: Kind = "multi-label" if listing.multi_label else "binary" if binary else "multi-class"
    numbers = {label: number for number, label in enumerate(classes)}
    if listing.multi_label:
        labels = np.zeros((len(listing.cases), len(classes)), dtype=np.int64)
        for row, names in zip(labels, listing.labels, strict=True):
            row[[numbers[label] for label in names]] = 1
    else:
        labels = np.array([numbers[label] for (label,) in listing.labels], dtype=np.int64)
    notices = [*listing.notices, *([f"The positive class is {classes[1]}, against {classes[0]}"] if binary else [])]
    return Catalogue(
        name=name,
        task=Task(kind, tuple(classes)),
        cases=listing.cases,
        labels=labels,
        split=np.array(listing.parts or ["train"] * len(listing.cases)),
        images=listing.images,
        patients=listing.patients,
        subgroups=listing.subgroups,
        files=listing.files,
        description={**listing.description, "notices": notices},
    )


def _with_one_spelling(listing: Listing) -> Listing:
    """Labels that differ in case, spaces around them or Unicode's normal form alone are one: the most frequent."""
    counts = Counter(name for labels in listing.labels for name in labels)
    spellings: dict[str, list[str]] = {}
    for name in [*(listing.classes or ()), *sorted(counts)]:
        folded = unicodedata.normalize("NFC", name).strip().casefold()
        if name not in (found := spellings.setdefault(folded, [])):
            found.append(name)
    chosen = {name: max(names, key=lambda x: counts[x]) for names in spellings.values() for name in names}
    notices = [
        f"{' and '.join(map(repr, names))} are taken for one, {chosen[names[0]]!r}"
        for names in spellings.values()
        if len(names) > 1
    ]
    return replace(
        listing,
        labels=[tuple(dict.fromkeys(chosen[name] for name in labels)) for labels in listing.labels],
        classes=listing.classes and tuple(dict.fromkeys(chosen[name] for name in listing.classes)),
        notices=[*listing.notices, *notices],
    )


def _positive_last(classes: Sequence[str], positive_class: str | None, name: str) -> list[str]:
    if positive_class is not None:
        if positive_class not in classes:
            hint = near_names(positive_class, classes) or f": choose from {', '.join(classes)}"
            raise InputError(f"--positive-class {positive_class} is no class of {name}{hint}")
        return sorted(classes, key=lambda found: found == positive_class)
    return sorted(classes, key=lambda found: not says_nothing(found)) if any(map(says_nothing, classes)) else [*classes]


def counted(names: Iterable[str]) -> str:
    """`3 .txt, 1 .csv` for the names that something has, most frequent first."""
    return ", ".join(f"{count:,} {name}" for name, count in Counter(names).most_common())
