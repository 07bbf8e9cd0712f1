"""Text for the screen: tables, and names that may hold any characters."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def to_lines(columns: Sequence[str], rows: Sequence[Sequence[str]], left_aligned: Collection[str]) -> list[str]:
    """Return a line of headings and one per row, printable, with the columns under each other.

    Args:
        columns: the headings.
        rows: a text per column each.
        left_aligned: the headings of the columns that hold words.
    """
    lines = [columns, *([printable(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column in left_aligned else cell.rjust(width)
            for column, cell, width in zip(columns, line, widths, strict=True)
        ).rstrip()
        for line in lines
    ]


def printable(text: str) -> str:
    r"""Return a text without characters that could steer a terminal, each as its escape sequence.

    Example:
        >>> print(printable("a\x1b[31mred\nline"))
        a\x1b[31mred\nline
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
