"""Sections of a report beyond the trial's own figures, which a recipe may add; they are kept in the run folder."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import InputError
from ..files import read_json, regular_file, write_json
from .layout import SECTIONS


@dataclass(frozen=True)
class Section:
    """A heading with a paragraph, a table and pictures, each of which may be left out.

    Attributes:
        text: plain text, in sentences; an empty line parts paragraphs.
        header: of the table's columns.
        rows: the table's cells, as they are to be read; None for what is not defined.
        figures: pictures, by their paths in the run folder, with the words that stand for them.
    """

    title: str
    text: str = ""
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str | None]] = ()
    figures: Sequence[tuple[str, str]] = ()


def write_sections(run: Path, sections: Sequence[Section], part: str = "") -> None:
    """Keep the sections of the recipe, or those of a part of the run folder."""
    write_json(run / part / SECTIONS, [asdict(section) for section in sections])


def read_sections(run: Path, part: str = "") -> list[Section]:
    """The sections that were kept there, none of them where there are none."""
    file = run / part / SECTIONS
    if not file.exists():
        return []
    sections = [Section(**content) for content in read_json(file, list)]
    for path, _ in (figure for section in sections for figure in section.figures):
        if not Path(os.path.realpath(run / path)).is_relative_to(run.resolve()) or not regular_file(run / path):
            raise InputError(f"{file} names the picture {path}, which is not in the run folder")
    return sections
