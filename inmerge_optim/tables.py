"""Rows of text as a table for the screen."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def to_lines(columns: Sequence[str], rows: Sequence[Sequence[str]], left_aligned: Collection[str]) -> list[str]:
    """Return a line of headings and one per row, with the columns under each other.

    Args:
        columns: the headings.
        rows: a text per column each.
        left_aligned: the headings of the columns that hold words.
    """
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column in left_aligned else cell.rjust(width)
            for column, cell, width in zip(columns, row, widths, strict=True)
        ).rstrip()
        for row in (columns, *rows)
    ]
