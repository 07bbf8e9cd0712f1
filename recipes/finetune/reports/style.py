"""How reports look: pictures and their colours, and numbers as the cells of tables.

Arms differ by colour (Okabe and Ito's palette, which colour-blind readers tell apart), line style and marker, so that
they can be told apart in grey print as well. Figures are narrow, for phones.
"""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib import rcParams
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ..errors import printable
from ..files import GENERATOR, write_bytes
from ..judging.formatting import bounds, number, percent, with_bounds
from ..judging.intervals import LEVEL
from ..runs.finished import FinishedRun

rcParams["text.parse_math"] = False  # a $ in the name of an image or a class is a $

SIGNED = "{:+.4f}"
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P")
GREY = "#595959"
WIDTH = 5.2
_LETTERS = 80  # small ones, in that width
# Of arms that share no seed which both finished.
NO_DIFFERENCE: dict[str, Any] = {"values": []}
NO_DIFFERENCE |= dict.fromkeys(("mean", "low", "high", "t_low", "t_high", "bootstrap_low", "bootstrap_high"))


def number_text(value: float | None, form: str = "{:.4f}") -> str | None:
    """A cell with a figure."""
    return None if value is None else number(value, form)


def range_text(low: float | None, high: float | None) -> str | None:
    """A cell with an interval, to two significant digits of its half-width."""
    return None if low is None or high is None else bounds(low, high)


def interval_text(value: float | None, interval: tuple[float | None, float | None]) -> str | None:
    """A cell with a difference and its interval, as far as they are defined."""
    low, high = interval
    if value is None or low is None or high is None:
        return number_text(value, SIGNED)
    return with_bounds(value, low, high)


def mean_text(figure: dict[str, Any]) -> str | None:
    """A cell with the mean of a figure over seeds, and its standard deviation where there are several."""
    if figure["mean"] is None:
        return None
    return number(figure["mean"], "{:.4f}") + ("" if figure["std"] is None else f" ± {figure['std']:.4f}")


def in_lines(name: str, letters: int = 26) -> str:
    """An arm's name in lines of so many letters, as far as its settings can be told apart."""
    lines = [""]
    for part in re.split(r"(?<=[@,])", name):
        if lines[-1] and len(lines[-1] + part) > letters:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def arm_title(axes: Axes, arm: str, letters: int = 26, **settings: Any) -> None:
    """Set an arm's name above a panel, with its settings in lines of so many letters."""
    axes.set_title(in_lines(arm, letters), fontsize="small" if "@" in arm else "medium", **settings)


def contrast_name(arm: str, reference: str) -> str:
    """Two arms that are compared, with the settings that both have told once."""
    (base, _, settings), (other, _, others) = arm.partition("@"), reference.partition("@")
    return f"{base} - {other}@{settings}" if settings and settings == others else f"{arm} - {reference}"


def share_text(count: dict[str, int]) -> str | None:
    """A cell with the share of drawn pairs that merged."""
    return percent(count["merged"] / count["drawn"], 2) if count["drawn"] else None


def plain_text(value: Any) -> str:
    """Text of Markdown that is no HTML, no picture from elsewhere, and nothing that moves a terminal's cursor."""
    lines = str(value).replace("<", "\\<").replace("![", "!\\[").split("\n")
    return "\n".join(map(printable, lines))


def new_figure(height: float, *grid: int, **settings: Any) -> tuple[Figure, Any]:
    """A figure of the common width, with its panels; height in inches."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(*grid, **settings)


def write_figure(path: Path, figure: Figure) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150, metadata={"Software": GENERATOR})
    write_bytes(path, content.getvalue())


def difference_rows(axes: Axes, rows: list[tuple[str, dict[str, Any]]], margin: float | None = None) -> None:
    """A row per difference of summary.json: a dot per seed; thick: its interval, thin: over seeds and over cases.

    Args:
        margin: shades what is too small to matter.
    """
    if margin is not None:
        axes.axvspan(-margin, margin, color="#DDE7EE", zorder=0)
    for place, (_, difference) in enumerate(rows):
        height = -place
        values = [value for value in difference["values"] if value is not None]
        for kind, shift, colour in (("t", 0.12, _COLOURS[2]), ("bootstrap", 0.24, _COLOURS[1])):
            if difference[f"{kind}_low"] is not None:
                ends = difference[f"{kind}_low"], difference[f"{kind}_high"]
                axes.plot(ends, (height - shift,) * 2, color=colour, linewidth=1.2, marker="|", markersize=7)
        if difference["low"] is not None:
            axes.plot((difference["low"], difference["high"]), (height,) * 2, color=_COLOURS[0], linewidth=3.5)
        axes.plot(values, [height + 0.18] * len(values), "o", color=GREY, markersize=4, alpha=0.8)
        if difference["mean"] is not None:
            axes.plot(difference["mean"], height, "D", color=_COLOURS[0], markeredgecolor="white", markersize=8)
    axes.axvline(0, color=GREY, linewidth=0.8)
    labels = [in_lines(label) for label, _ in rows]
    size = "x-small" if any("\n" in label for label in labels) else "medium"
    axes.set_yticks([-place for place in range(len(rows))], labels, fontsize=size)
    axes.set_ylim(-len(rows) + 0.5, 0.5)
    axes.locator_params(axis="x", nbins=5)
    axes.grid(axis="x", alpha=0.3)


def difference_legend(figure: Figure, judged: float = LEVEL, margin: bool = False) -> None:
    """What difference_rows draws; `judged` is the level of the thick interval."""
    level, judged_level = percent(LEVEL), number(100 * judged, "{:.4g} %")
    handles: list[Artist] = [
        Line2D([], [], color=GREY, marker="o", linestyle="", markersize=4, label="one seed"),
        Line2D(
            [],
            [],
            color=_COLOURS[0],
            marker="D",
            linewidth=3.5,
            label=f"mean, {judged_level} interval",
        ),
        Line2D([], [], color=_COLOURS[2], marker="|", linewidth=1.2, label=f"{level}, over seeds alone"),
        Line2D([], [], color=_COLOURS[1], marker="|", linewidth=1.2, label=f"{level}, over the test set alone"),
    ]
    if margin:
        handles.append(Patch(color="#DDE7EE", label="within the margin"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize="small", frameon=False)


def looks(run: FinishedRun, marker: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """How each arm's lines look; of more than six arms those that share a colour differ by style and marker."""
    for place, arm in enumerate(run.arms):
        yield arm, line_look(place, marker)


def line_look(place: int, marker: bool = False) -> dict[str, Any]:
    """How the line of that number looks."""
    colour, other = place % len(_COLOURS), (place + place // len(_COLOURS)) % len(_STYLES)
    look: dict[str, Any] = {"color": _COLOURS[colour], "linestyle": _STYLES[other], "linewidth": 1.8}
    return look | ({"marker": _MARKERS[other]} if marker else {})


def text_colour(share: float) -> str:
    """Readable on cividis, which is dark at 0."""
    return "black" if share > 0.55 else "white"


def legend(figure: Figure, axes: Axes) -> None:
    """Above the panels, in as many columns as have room for the longest label."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = max(1, min(3, _LETTERS // (max(map(len, labels)) + 6)))
        figure.legend(handles, labels, loc="outside upper center", ncols=columns, fontsize="small", frameon=False)
