"""A table of images on disk: CSV, TSV or parquet."""

import os
import warnings
from pathlib import Path

import pandas as pd

from ..data.catalogue import ImageFiles
from ..errors import InputError, first_line
from ..files import regular_file, sha256_of
from .columns import Columns, Table, filled_cells, understand
from .folders import FoundFile, find_image_files, stamp_of
from .listing import Listing

_DELIMITERS = ",;\t"
_MOST_COLUMNS = 10_000  # which take seconds to read


def read_table(path: Path, folder: Path, columns: Columns, allow_outside: bool) -> Listing:
    """Read a table, and find its images.

    An image is looked for at its path in the folder, and where it is not there, by its name alone, with or without its
    suffix, in all of the folder.

    Args:
        folder: where the paths start from.
        allow_outside: read images that don't lie in the folder.
    """
    table = Table(f"--csv {path}", _read(path), first_row=2)
    understood = understand(table, columns)
    cases = filled_cells(table, understood.image)
    _check_unique(table, cases)
    return Listing(
        cases=cases,
        images=_find(table, cases, folder, allow_outside),
        labels=understood.labels,
        multi_label=understood.multi_label,
        classes=understood.classes,
        parts=understood.parts,
        patients=understood.patients,
        subgroups=understood.subgroups,
        files={path.name: sha256_of(path)},
        description={"table": str(path), "folder": str(folder)},
        notices=understood.notices,
    )


def _read(path: Path) -> dict[str, list[str]]:
    """The columns as text, empty cells as empty text."""
    try:
        if not regular_file(path):
            raise ValueError("it is no file, or not there")
        if path.suffix.lower() == ".parquet":
            table = pd.read_parquet(path)
            lists = [name for name in table.columns if table[name].map(pd.api.types.is_list_like).any()]
            if lists:
                raise ValueError(f"its column {lists[0]} has lists; --hub reads those")
            table = table.astype(object).where(table.notna(), "").astype(str)
        else:
            with path.open(encoding="utf-8-sig") as file:
                header = file.readline()
            delimiter = max(_DELIMITERS, key=header.count)
            if header.count(delimiter) >= _MOST_COLUMNS:
                raise ValueError(f"it has {header.count(delimiter) + 1:,} columns, more than {_MOST_COLUMNS:,}")
            with warnings.catch_warnings():
                warnings.simplefilter("error", pd.errors.ParserWarning)  # of rows longer than the header, cut short
                table = pd.read_csv(
                    path, sep=delimiter, dtype=str, keep_default_na=False, index_col=False, encoding="utf-8-sig"
                )
    except (OSError, ValueError, pd.errors.ParserError, pd.errors.ParserWarning) as error:
        raise InputError(
            f"--csv {path} can't be read as a table ({first_line(error)}): give a CSV or TSV file in UTF-8 "
            "with a header, or parquet"
        ) from error
    if table.empty:
        raise InputError(f"--csv {path} has no row: expected one per image")
    return {str(name): table[name].str.strip().tolist() for name in table.columns}


def _check_unique(table: Table, cases: list[str]) -> None:
    first: dict[str, int] = {}
    for row, case in enumerate(cases):
        if case in first:
            raise InputError(
                f"{table.place(row)}: {case} stands in row {first[case] + table.first_row} already, expected one row "
                "per image"
            )
        first[case] = row


def _find(table: Table, cases: list[str], folder: Path, allow_outside: bool) -> ImageFiles:
    if not folder.is_dir():
        raise InputError(f"--data-dir {folder} is no folder: give the folder that the paths of {table.name} start from")
    named = [os.path.join(folder, case.replace("\\", "/")) for case in cases]
    at_their_paths = list(map(os.path.lexists, named))
    paths: list[str | None] = [*named]
    if not all(at_their_paths):
        by_name = _by_name(folder)
        paths = [
            path if there else _only(table, case, by_name)
            for path, case, there in zip(named, cases, at_their_paths, strict=True)
        ]
    if not allow_outside:
        inside = os.path.join(os.path.realpath(folder), "")
        outside = [
            case
            for case, path in zip(cases, paths, strict=True)
            if path is not None and not os.path.realpath(path).startswith(inside)
        ]
        if outside:
            raise InputError(
                f"{len(outside):,} paths of {table.name} lead out of the folder {folder}, such as {outside[0]}: give "
                "the folder that holds them as --data-dir, or read them with --allow-outside"
            )
    keys = [f"{case} {'missing' if path is None else stamp_of(path)}" for case, path in zip(cases, paths, strict=True)]
    return ImageFiles(paths, keys)


def _by_name(folder: Path) -> dict[str, list[FoundFile]]:
    """The images of a folder by their names, with and without their suffixes."""
    found: dict[str, list[FoundFile]] = {}
    for file in find_image_files(folder)[0]:
        name = os.path.basename(file.path)
        for key in {name, os.path.splitext(name)[0]}:
            found.setdefault(key, []).append(file)
    return found


def _only(table: Table, case: str, by_name: dict[str, list[FoundFile]]) -> str | None:
    """Where the only image of that name lies; None where there is none."""
    found = by_name.get(os.path.basename(case), [])
    if len(found) > 1:
        raise InputError(
            f"{table.name} names {case}, and there are {found[0].case} and {found[1].case}: expected paths that "
            "tell them apart"
        )
    return found[0].path if found else None
