"""Leaks between the splits: the same image, or the same patient, in more than one of them.

Exact twins have equal pixels, whatever their files are. Near twins look alike to imagehash's perceptual hash; they are
told and nothing follows from them, because images of one kind, such as chest X-rays, look alike without being twins.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import imagehash
import numpy as np
from PIL import Image, ImageOps

from ..errors import InputError
from .images import ImageData, Split, Table
from .squares import pixel_hash
from .tasks import labels_text

LEAK_FILE, NEAR_FILE = "leaks.csv", "near_twins.csv"
NEAR_BITS = 4  # of 64; nih-mini has 3 pairs in a million that are as near without being twins, see docs/own_images.md
_BITS = 64
_MOST_HASHED = 20_000  # images of a split whose near twins are looked for: half a minute for the largest sets
_MOST_TOLD = 1000
_CHUNK = 1024
_NAMED = 5

Place = tuple[str, int]  # a part, and a row of it


@dataclass(frozen=True)
class Leak:
    """What lies in more than one split.

    Attributes:
        kind: "image" or "patient".
        places: all of it, in the order of the splits.
        conflicting: of an image, whether its copies have different labels.
    """

    kind: str
    places: tuple[Place, ...]
    conflicting: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(part for part, _ in self.places))


def find_leaks(data: ImageData) -> list[Leak]:
    """The images that lie in more than one split by their pixels, and then the patients who do."""
    images = _shared({part: pixel_hashes(split) for part, split in data.splits.items()})
    leaks = [Leak("image", places, _conflict(data, places)) for places in images]
    if all(split.patients is not None for split in data.splits.values()):
        patients = _shared({part: split.patients or [] for part, split in data.splits.items()})
        leaks += [Leak("patient", places) for places in patients]
    return leaks


def pixel_hashes(split: Split) -> list[bytes]:
    """What exact twins share, per case."""
    if split.pixel_hashes is not None:
        return split.pixel_hashes
    return [pixel_hash(image) for images in _in_chunks(split) for image in images]


def _in_chunks(split: Split) -> Iterator[np.ndarray]:
    for start in range(0, len(split), _CHUNK):
        yield split.images[list(range(start, min(start + _CHUNK, len(split))))]


def _shared(keys: dict[str, list[Any]]) -> list[tuple[Place, ...]]:
    """The places of each key that is in more than one part."""
    places: dict[Any, list[Place]] = {}
    for part, found in keys.items():
        for row, key in enumerate(found):
            places.setdefault(key, []).append((part, row))
    return [tuple(found) for found in places.values() if found[0][0] != found[-1][0]]


def _conflict(data: ImageData, places: tuple[Place, ...]) -> bool:
    labels = [data.splits[part].labels[row] for part, row in places]
    return any(not np.array_equal(labels[0], label) for label in labels[1:])


def describe_leaks(data: ImageData, leaks: list[Leak]) -> list[str]:
    """A sentence per kind of leak, without its full stop: how many there are, and the first of them by name."""
    sentences = []
    for kind, words in (("image", "images"), ("patient", "patients")):
        found = [leak for leak in leaks if leak.kind == kind]
        if not found:
            continue
        counts = {parts: sum(leak.parts == parts for leak in found) for parts in dict.fromkeys(x.parts for x in found)}
        shared = ", ".join(f"{count:,} in {' and '.join(parts)}" for parts, count in counts.items())
        conflicting = sum(leak.conflicting for leak in found)
        conflict = f", {conflicting:,} of them with conflicting labels" if conflicting else ""
        more = f" and {len(found) - _NAMED:,} more" if len(found) > _NAMED else ""
        names = "; ".join(_name(data, leak) for leak in found[:_NAMED])
        sentences.append(
            f"{len(found):,} {words} of {data.name} lie in several splits ({shared}{conflict}): {names}{more}"
        )
    return sentences


def _name(data: ImageData, leak: Leak) -> str:
    if leak.kind == "patient":
        part, row = leak.places[0]
        return data.splits[part].patients[row]  # type: ignore[index]
    return " = ".join(f"{part} {data.splits[part].cases[row]}" for part, row in leak.places)


def refuse_leaks(data: ImageData, leaks: list[Leak]) -> None:
    """Refuse tests that share images or patients with what is trained on: their figures would be too good."""
    grave = [leak for leak in leaks if data.folds or "test" in leak.parts]
    if grave:
        mend = "put each into one fold" if data.folds else "drop the copies outside test with --drop-twins"
        raise InputError(f"{'; and '.join(describe_leaks(data, grave))}: {mend}, or go on with them by --allow-twins")


def drop_leaks(data: ImageData, leaks: list[Leak]) -> ImageData:
    """Leave each shared image or patient in the last of its splits, and take it out of those before."""
    drop = {(part, row) for leak in leaks for part, row in leak.places if part != leak.parts[-1]}
    kept: dict[str, Any] = {}
    for part, split in data.splits.items():
        rows = np.array([row for row in range(len(split)) if (part, row) not in drop], dtype=np.int64)
        if not len(rows):
            raise InputError(f"--drop-twins leaves no image in the {part} split of {data.name}: leave it out")
        kept[part] = split if len(rows) == len(split) else split.select(rows)
    return replace(data, **kept)


def settle_leaks(data: ImageData, drop: bool) -> tuple[ImageData, list[str]]:
    """Take twins out of all splits but the last that has them, where that is asked for.

    Returns:
        The data, with what was found in its description and as a table; and that in sentences.
    """
    leaks = find_leaks(data)
    sentences = [f"{text}{', dropped there but for the last' if drop else ''}" for text in describe_leaks(data, leaks)]
    settled = drop_leaks(data, leaks) if drop and leaks else data
    tables = {LEAK_FILE: leak_table(data, leaks)} if leaks else {}
    description = {**data.description, "leaks": sentences}
    return replace(settled, description=description, tables={**data.tables, **tables}), sentences


def leak_table(data: ImageData, leaks: list[Leak]) -> Table:
    """A row per place of each leak."""
    rows = [
        [number, leak.kind, part, split.cases[row], labels_text(data.task, split.labels[row]), leak.conflicting]
        for number, leak in enumerate(leaks, 1)
        for part, row in leak.places
        for split in (data.splits[part],)
    ]
    return ("number", "kind", "split", "case", "labels", "conflicting"), rows


@dataclass(frozen=True)
class NearTwins:
    """Two images in different splits that look alike.

    Attributes:
        bits: of 64 in which their hashes differ.
        mirrored: whether one looks like the other's mirror image.
    """

    first: Place
    second: Place
    bits: int
    mirrored: bool


@dataclass(frozen=True)
class NearSearch:
    """What looks alike over the splits.

    Attributes:
        nearest: the nearest pairs first, _MOST_TOLD of them at most.
        found: how many pairs there are.
        compared: of how many.
        drawn: per part how many of its images were looked at, where not all of them were.
    """

    nearest: list[NearTwins]
    found: int
    compared: int
    drawn: dict[str, int]


def find_near_twins(data: ImageData) -> NearSearch:
    """The pairs over the splits, exact twins left out, whose hashes differ in NEAR_BITS bits at most, mirrored or not.

    Of a split of more than _MOST_HASHED images so many are drawn at random, always the same: the time grows with the
    number of pairs.
    """
    rows = {part: _some_rows(len(split)) for part, split in data.splits.items()}
    looked_at = {part: split.select(rows[part]) for part, split in data.splits.items()}
    pairs = list(combinations(data.splits, 2))
    exact = {part: np.array(pixel_hashes(split)) for part, split in looked_at.items()}
    # The first part of a pair is taken as it is, and the second also mirrored.
    hashes = {part: _near_hashes(split, mirrored=part != pairs[0][0]) for part, split in looked_at.items()}
    nearest: list[NearTwins] = []
    found = 0
    for first, second in pairs:
        for start in range(0, len(rows[first]), _CHUNK):
            own = hashes[first][start : start + _CHUNK, 0]
            plain, turned = (own @ hashes[second][:, view].T for view in (0, 1))
            bits = (_BITS - np.maximum(plain, turned)) / 2
            i, j = np.nonzero(bits <= NEAR_BITS)
            apart = exact[first][start + i] != exact[second][j]
            i, j = i[apart], j[apart]
            found += len(i)
            order = np.argsort(bits[i, j], kind="stable")[:_MOST_TOLD]
            nearest += [
                NearTwins(
                    (first, int(rows[first][start + i[k]])),
                    (second, int(rows[second][j[k]])),
                    int(bits[i[k], j[k]]),
                    bool(turned[i[k], j[k]] > plain[i[k], j[k]]),
                )
                for k in order
            ]
    nearest.sort(key=lambda twins: twins.bits)
    compared = sum(len(rows[first]) * len(rows[second]) for first, second in pairs)
    drawn = {part: len(rows[part]) for part, split in data.splits.items() if len(rows[part]) < len(split)}
    return NearSearch(nearest[:_MOST_TOLD], found, compared, drawn)


def describe_near(search: NearSearch) -> str:
    """The search in a sentence, without its full stop."""
    alike = f"{NEAR_BITS} of the {_BITS} bits of imagehash's phash or fewer differ, mirrored or not"
    count = f"{search.found:,} of the {search.compared:,} pairs of images over the splits look alike ({alike})"
    drawn = "".join(f", of {part} {images:,} images drawn at random" for part, images in search.drawn.items())
    if not search.found:
        return count + drawn
    listed = f"lists the nearest {_MOST_TOLD:,}" if search.found > _MOST_TOLD else "lists them"
    return f"{count}{drawn}, which may mean nothing: {NEAR_FILE} {listed}"


def note_near_twins(data: ImageData) -> ImageData:
    """The data with what looks alike over the splits in their description, and as a table; nothing follows from it."""
    search = find_near_twins(data)
    tables = {NEAR_FILE: near_table(data, search.nearest)} if search.found else {}
    return replace(
        data,
        description={**data.description, "near_twins": describe_near(search)},
        tables={**data.tables, **tables},
    )


def _some_rows(count: int) -> np.ndarray:
    if count <= _MOST_HASHED:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, _MOST_HASHED, replace=False))


def _near_hashes(split: Split, mirrored: bool) -> np.ndarray:
    """Imagehash's phash of each image, and of its mirror image where asked, as -1 and 1, float32 (N, 1 or 2, _BITS)."""
    hashes = [
        [_phash(image), *([_phash(ImageOps.mirror(image))] if mirrored else [])] for image in _small_images(split)
    ]
    return np.where(hashes, np.float32(1), np.float32(-1))


def _small_images(split: Split) -> Iterator[Image.Image]:
    for images in _in_chunks(split):
        for image in images:
            square = Image.fromarray(image[0] if len(image) == 1 else np.moveaxis(image, 0, -1)).convert("L")
            yield square.reduce(max(1, square.width // 32))  # phash looks at 32 x 32


def _phash(image: Image.Image) -> np.ndarray:
    return imagehash.phash(image).hash.ravel()


def near_table(data: ImageData, twins: list[NearTwins]) -> Table:
    """A row per pair."""
    rows = []
    for pair in twins:
        (part, row), (other_part, other_row) = pair.first, pair.second
        first, second = data.splits[part].cases[row], data.splits[other_part].cases[other_row]
        rows.append([part, first, other_part, second, pair.bits, pair.mirrored])
    return ("split", "case", "other_split", "other_case", "bits", "mirrored"), rows
