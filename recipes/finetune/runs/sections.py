"""Sections of a report beyond the trial's own figures, which a recipe may add; they are kept in the run folder."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..files import write_json
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


def write_sections(run: Path, sections: Sequence[Section]) -> None:
    write_json(run / SECTIONS, [asdict(section) for section in sections])


def read_sections(run: Path) -> list[Section]:
    """The sections that a recipe added, none of them where it added none."""
    path = run / SECTIONS
    return [Section(**content) for content in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []
