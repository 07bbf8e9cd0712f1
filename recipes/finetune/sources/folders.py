"""Class folders: a folder per class, with or without folders of the splits above."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..data.catalogue import ImageFiles
from ..data.opening import is_dicom
from ..errors import InputError
from .listing import Listing, counted, part_of

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".dcm", ".dicom"}
_LEFT_BY_SYSTEMS = {"thumbs.db", "desktop.ini", "__macosx"}


@dataclass(frozen=True)
class FoundFile:
    """A file of an image.

    Attributes:
        case: its path within the folder, in parts joined by /.
        path: where it lies.
        key: what tells it from any other, and from itself before a change.
    """

    case: str
    path: str
    key: str


def read_class_folders(folder: Path) -> Listing:
    """Find the images of class folders. What lies deeper in a class's folder is of that class."""
    top, notices = _top(folder), []
    found, skipped = find_image_files(top)
    if not found:
        raise InputError(f"--data-dir {folder} holds no image: expected a folder per class, or give a table with --csv")
    names = _folders(top)
    parts = {part_of(name) for name in names}
    split = bool(names) and None not in parts
    if not split and len(parts) > 2:
        others = [name for name in names if not part_of(name)]
        raise InputError(
            f"--data-dir {top} holds folders of splits and beside them {', '.join(others)}: expected either splits "
            "(train, val, test) or classes"
        )
    depth = 1 if split else 0
    inner = [file for file in found if file.case.count("/") > depth]
    if len(inner) < len(found):
        outside = next(file.case for file in found if file.case.count("/") <= depth)
        skipped += [
            f"{len(found) - len(inner):,} images lie in no class's folder and are left alone, such as {outside}"
        ]
    steps = [file.case.split("/") for file in inner]
    if top != folder:
        notices.append(f"The images lie in {top}")
    if split:
        notices.append(f"The splits are those of the folders {', '.join(names)}")
    empty = _empty_classes(top, names if split else [""], {tuple(step[: depth + 1]) for step in steps})
    return Listing(
        cases=[file.case for file in inner],
        images=ImageFiles([file.path for file in inner], [file.key for file in inner]),
        labels=[(step[depth],) for step in steps],
        parts=[part_of(step[0]) for step in steps] if split else None,  # type: ignore[misc]
        description={"folder": str(top)},
        notices=[*notices, *empty, *skipped],
    )


def _top(folder: Path) -> Path:
    """The folder below those that hold nothing but one folder, as archives leave them."""
    if not folder.is_dir():
        raise InputError(f"--data-dir {folder} is no folder: give the folder that holds the images")
    while len(names := _folders(folder)) == 1 and _folders(folder / names[0]) and not _images_in(folder):
        folder /= names[0]
    return folder


def _images_in(folder: Path) -> bool:
    return any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.iterdir())


def _folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not _is_left_by_system(path.name))


def _empty_classes(top: Path, above: list[str], held: set[tuple[str, ...]]) -> list[str]:
    """The folders of classes that hold no image."""
    empty = [
        "/".join(filter(None, (part, name)))
        for part in above
        for name in _folders(top / part)
        if tuple(filter(None, (part, name))) not in held
    ]
    return [f"The folder {name} holds no image" for name in empty]


def patients_of(cases: list[str], pattern: re.Pattern[str]) -> list[str]:
    """The first group of the pattern in each case."""
    found = [pattern.search(case) for case in cases]
    lacking = [case for case, match in zip(cases, found, strict=True) if not (match and match[1])]
    if lacking:
        raise InputError(
            f"--patient-regex {pattern.pattern} names no patient in {len(lacking):,} of {len(cases):,} images, such as "
            f"{lacking[0]}: expected its first group to be found in every path"
        )
    return [match[1] for match in found if match]


def find_image_files(folder: Path) -> tuple[list[FoundFile], list[str]]:
    """All files of images below a folder, in the order of their paths, and sentences on what is left alone.

    A file is an image's by its suffix, or, where it has none, when it is DICOM.
    """
    found: list[FoundFile] = []
    other: list[str] = []
    sentences: list[str] = []
    for entry, case in _walk(folder, "", [os.path.realpath(folder)], sentences):
        suffix = Path(entry.name).suffix.lower()
        if _is_left_by_system(entry.name):
            other.append(entry.name)
        elif suffix in IMAGE_SUFFIXES or (not suffix and _holds_dicom(entry)):
            found.append(FoundFile(_text(case), entry.path, f"{_text(case)} {stamp_of(entry.path)}"))
        else:
            other.append(suffix or "without suffix")
    if other:
        sentences.append(f"{len(other):,} files are no images by their names and are left alone: {counted(other)}")
    return found, sentences


def _walk(
    folder: str | Path, above: str, ancestors: list[str], sentences: list[str]
) -> Iterator[tuple[os.DirEntry[str], str]]:
    """Every file below a folder with its path within the first one; links are followed, but never in a circle."""
    try:
        with os.scandir(folder) as entries:
            ordered = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"the folder {folder} can't be read ({error.strerror}): mend the access") from error
    for entry in ordered:
        case = f"{above}{entry.name}"
        if not _is_folder(entry):
            yield entry, case
        elif _is_left_by_system(entry.name):
            sentences.append(f"the folder {_text(case)} is one that systems leave, and is not looked into")
        elif (real := os.path.realpath(entry.path)) in ancestors:
            sentences.append(f"{_text(case)} is a link to a folder that holds it, and is not followed")
        else:
            yield from _walk(entry.path, f"{case}/", [*ancestors, real], sentences)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _is_left_by_system(name: str) -> bool:
    return name.startswith(".") or name.lower() in _LEFT_BY_SYSTEMS


def _holds_dicom(entry: os.DirEntry[str]) -> bool:
    try:
        if not entry.is_file():
            return False
        with open(entry.path, "rb") as file:
            return is_dicom(file.read(132))
    except OSError:
        return False


def stamp_of(path: str) -> str:
    """What changes with a file."""
    try:
        status = os.stat(path)
    except OSError:  # a link that leads nowhere
        return "missing"
    return f"{status.st_size} {status.st_mtime_ns}"


def _text(path: str) -> str:
    """A path as text that can be written, whatever bytes it is made of."""
    return os.fsencode(path).decode("utf-8", errors="backslashreplace")
