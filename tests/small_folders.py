"""Small folders and tables of images, as users have them."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 24


def pixels(number: int, side: int = SIDE) -> np.ndarray:
    """Grey noise that differs by its number."""
    return np.random.default_rng(number).integers(0, 256, (side, side), dtype=np.uint8)


def write_images(folder: Path, cases: Iterable[str], first: int = 0) -> None:
    """An image per case, a path within the folder; none is like another."""
    for number, case in enumerate(cases, first):
        path = folder / case
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(number)).save(path)


def class_folders(folder: Path, classes: Sequence[str] = ("cat", "dog"), images: int = 20, parts: str = "") -> Path:
    """So many images of each class, named by their patient, two of each; with `parts`, in each of these folders."""
    cases = [
        f"{part + '/' if part else ''}{name}/{part}p{k // 2:02d}{name}_{k}.png"
        for part in (parts.split() or [""])
        for name in classes
        for k in range(images)
    ]
    write_images(folder, cases)
    return folder


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(header)
        writer.writerows(rows)
    return path
