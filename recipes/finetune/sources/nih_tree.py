"""ChestX-ray14 in the folders and files that NIH distributes."""

import csv
import os
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data.catalogue import Catalogue, ImageFiles, check_complete
from ..data.images import BoxedFinding
from ..errors import InputError
from ..files import regular_file, sha256_of
from .ages import age_band
from .nih_labels import NAME, TASK, label_row

# NIH's corrected labels come first: of two files that one is read.
LABEL_FILES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
TRAIN_LIST, TEST_LIST = "train_val_list.txt", "test_list.txt"
BOX_FILE = "BBox_List_2017.csv"
_NAME, _LABELS, _PATIENT = "Image Index", "Finding Labels", "Patient ID"
_BOX_SIDE = 1024


def read_nih_tree(folder: Path, allow_missing: bool) -> Catalogue:
    """Read labels and official lists, and find the images, in images_001/images ... images_012/images or images/.

    Of Data_Entry_2017.csv and Data_Entry_2017_v2020.csv the latter is read where both are there. Images that are in
    neither list are left alone.
    """
    if not folder.is_dir():
        raise InputError(f"--data-dir {folder} is no folder: give the folder that holds NIH's files")
    label_file = next((folder / name for name in LABEL_FILES if (folder / name).is_file()), None)
    if label_file is None:
        raise InputError(f"--data-dir {folder} holds no label file: expected {' or '.join(LABEL_FILES)}")
    entries = _read_entries(label_file)
    listed = {name: _read_list(folder / name, entries, label_file) for name in (TRAIN_LIST, TEST_LIST)}
    twice = sorted(listed[TRAIN_LIST] & listed[TEST_LIST])
    if twice:
        raise InputError(
            f"{TRAIN_LIST} and {TEST_LIST} in {folder} share {len(twice):,} images, such as {twice[0]}: expected NIH's "
            "lists, which share none"
        )
    cases = sorted(listed[TRAIN_LIST] | listed[TEST_LIST])
    images = _find_images(folder, cases)
    missing = [case for case, path in zip(cases, images.paths, strict=True) if path is None]
    check_complete(
        missing,
        len(cases),
        f"are neither files in {folder}/images_*/images nor in {folder}/images",
        allow_missing,
    )
    files = {path.name: sha256_of(path) for path in (label_file, folder / TRAIN_LIST, folder / TEST_LIST)}
    return Catalogue(
        name=NAME,
        task=TASK,
        cases=cases,
        patients=[entries[case].patient for case in cases],
        labels=np.array([entries[case].labels for case in cases], dtype=np.int64),
        split=np.array(["test" if case in listed[TEST_LIST] else "train" for case in cases]),
        images=images,
        files=files,
        description={"label_file": label_file.name, "sha256": files[label_file.name]},
        subgroups={name: [entries[case].subgroups[name] for case in cases] for name in ("view", "sex", "age")},
    )


def read_boxes(folder: Path) -> list[BoxedFinding] | None:
    """The boxes that radiologists drew for eight of the diseases, by image and disease; None without that file.

    Its header splits `Bbox [x,y,w,h]` over columns and ends with empty ones; Infiltration is called Infiltrate there.
    x, y, width and height are in pixels of the images as NIH distributes them, 1024 x 1024.
    """
    path = folder / BOX_FILE
    if not path.is_file():
        return None
    boxes: dict[tuple[str, int], list[tuple[float, ...]]] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            if header[:3] != ["Image Index", "Finding Label", "Bbox [x"]:
                raise InputError(f"{path} begins with {','.join(header)!r}: expected NIH's list of boxes")
            for row in reader:
                case, label, box = _box(row, f"{path}, line {reader.line_num}")
                boxes.setdefault((case, label), []).append(box)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} can't be read as CSV ({error}): get it again from NIH, or take it away") from error
    return [BoxedFinding(case, label, np.array(found)) for (case, label), found in boxes.items()]


def _box(row: list[str], where: str) -> tuple[str, int, tuple[float, ...]]:
    """Image, label and the box's left, top, right and bottom as shares of the side."""
    try:
        case, name, *numbers = row[:6]
        x, y, width, height = map(float, numbers)
        label = label_row([name], where).index(1)
    except ValueError:
        raise InputError(f"{where}: expected an image, a disease, and x, y, width and height of its box") from None
    if not 0 <= x < x + width <= _BOX_SIDE or not 0 <= y < y + height <= _BOX_SIDE:
        raise InputError(
            f"{where}: the box {x:g}, {y:g}, {width:g}, {height:g} is not in {_BOX_SIDE} x {_BOX_SIDE} pixels"
        )
    return case, label, tuple(edge / _BOX_SIDE for edge in (x, y, x + width, y + height))


@dataclass(frozen=True)
class _Entry:
    """What the label file says of an image."""

    patient: str
    labels: list[int]
    subgroups: dict[str, str | None]


def _read_entries(path: Path) -> dict[str, _Entry]:
    """The entry of each image; the columns are found by name, because the header has others that split."""
    entries: dict[str, _Entry] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            lacking = [name for name in (_NAME, _LABELS, _PATIENT) if name not in (reader.fieldnames or ())]
            if lacking:
                raise InputError(f"{path} has no column {lacking[0]!r}: expected NIH's label file as it is distributed")
            for row in reader:
                case = row[_NAME]
                where = f"{path}, line {reader.line_num}, {case}"
                if not (case and row[_LABELS] and row[_PATIENT]):
                    raise InputError(f"{where}: expected an image, its labels and its patient")
                if case in entries:
                    raise InputError(f"{where} stands there twice: expected one line per image")
                entries[case] = _Entry(row[_PATIENT], label_row(row[_LABELS].split("|"), where), _subgroups(row))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} can't be read as CSV ({error}): get it again from NIH") from error
    return entries


def _subgroups(row: dict[str, str]) -> dict[str, str | None]:
    """View, sex and age band of an image, None for what is left out or is none of those that NIH names."""
    view, sex = row.get("View Position"), row.get("Patient Gender") or row.get("Patient Sex")
    return {
        "view": view if view in ("PA", "AP") else None,
        "sex": sex if sex in ("F", "M") else None,
        "age": age_band(row.get("Patient Age") or ""),
    }


def _read_list(path: Path, entries: Container[str], label_file: Path) -> set[str]:
    """The images of an official list."""
    if not regular_file(path):
        raise InputError(f"{path} is no file: expected NIH's official list of images")
    try:
        cases = path.read_text(encoding="utf-8-sig").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} can't be read ({error}): expected NIH's official list of images") from error
    unknown = [case for case in cases if case not in entries]
    if unknown:
        raise InputError(
            f"{path} names {len(unknown):,} images that {label_file.name} doesn't, such as {unknown[0]}: expected the "
            "lists and the labels of one distribution"
        )
    return set(cases)


def _find_images(folder: Path, cases: list[str]) -> ImageFiles:
    wanted = set(cases)
    found: dict[str, tuple[str, str]] = {}
    for images in [*sorted(folder.glob("images_*/images")), folder / "images"]:
        if images.is_dir():
            with os.scandir(images) as files:
                for file in files:
                    if file.name in wanted and (status := regular_file(Path(file.path))):
                        found[file.name] = (file.path, f"{file.name} {status.st_size} {status.st_mtime_ns}")
    return ImageFiles(
        paths=[found[case][0] if case in found else None for case in cases],
        keys=[found[case][1] if case in found else f"{case} missing" for case in cases],
    )
