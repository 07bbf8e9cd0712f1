"""What ``inmerge inspect`` has found, as a table, JSON or CSV, and how that reaches the screen or a file."""

from __future__ import annotations

import csv
import io
import json
import os
import stat
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inmerge_optim.tables import printable, to_lines

if TYPE_CHECKING:  # which imports torch, and the command line answers --help without it
    from inmerge_optim.similarity import LayerProfile

STANDARD_OUTPUT = Path("-")
_FORMULA = ("=", "+", "-", "@")  # what a spreadsheet computes
_COLUMNS = (
    "depth",
    "layer",
    "kernels",
    "length",
    "groups",
    "mean",
    "95 %",
    "highest",
    "above",
    "random",
    "dead",
    "merges",
    "remark",
)


@dataclass(frozen=True)
class Inspection:
    """The profiles of a model's layers, and what was asked.

    Attributes:
        title: says what the model is and where its weights are from.
        profiles: of similarity_profile.
        settings: its arguments by name; "similarity_threshold" among them.
        rate: the share of draws that ``threshold_for_rate`` is to merge; None if that was not asked.
        threshold_for_rate: None if it was not asked, or nothing is selected.
    """

    title: str
    profiles: Sequence[LayerProfile]
    settings: Mapping[str, Any]
    rate: float | None = None
    threshold_for_rate: float | None = None

    @property
    def expected_draws(self) -> float:
        """How many kernels a step draws on average."""
        return sum(profile.expected_draws for profile in self.profiles)

    @property
    def expected_merges(self) -> float:
        """How many of them it merges."""
        return sum(profile.expected_merges for profile in self.profiles)


def to_table(found: Inspection) -> str:
    """Return a line per layer, with what the columns mean and the totals below."""
    lines = to_lines(_COLUMNS, [_row(profile) for profile in found.profiles], left_aligned=("layer", "remark"))
    legend = (
        f"length: weights of a kernel; mean, 95 %, highest: of the cosines; above: share of pairs above "
        f"{found.settings['similarity_threshold']}; random: that share for random kernels; merges: expected per step."
    )
    return "\n".join([printable(found.title), "", *lines, "", legend, *_totals(found)]) + "\n"


def _totals(found: Inspection) -> list[str]:
    counted = sum(profile.depth is not None for profile in found.profiles)
    selected = sum(profile.selected for profile in found.profiles)
    draws, merges = found.expected_draws, found.expected_merges
    totals = [
        f"{len(found.profiles)} layers, {counted} counted, {selected} selected.",
        f"A step draws {draws:.1f} kernels and merges {merges:.2f} of them on average ({_percent(merges, draws)}).",
    ]
    if found.threshold_for_rate is not None:
        totals.append(
            f"A similarity threshold of {found.threshold_for_rate:.4f} would merge {found.rate:.1%} of the draws."
        )
    elif found.rate is not None:
        totals.append("No layer is selected, so no threshold merges anything.")
    return totals


def _row(profile: LayerProfile) -> tuple[str, ...]:
    if profile.mean is None or profile.quantiles is None:
        cosines = ["-"] * 5
    else:
        shares = (profile.share_above_threshold or 0.0, profile.random_share_above_threshold or 0.0)
        values = (profile.mean, profile.quantiles[0.95], max(pair.cosine for pair in profile.most_similar))
        cosines = [*(f"{round(value, 2) + 0:.2f}" for value in values), *(_percent(share, 1) for share in shares)]
    return (
        "-" if profile.depth is None else str(profile.depth),
        profile.name,
        str(profile.kernels),
        str(profile.row_length),
        str(profile.groups),
        *cosines,
        str(len(profile.dead_kernels) or "-"),
        f"{profile.expected_merges:.2f}" if profile.selected else "-",
        profile.reason,
    )


def _percent(part: float, whole: float) -> str:
    share = part / whole if whole else 0.0
    return "<0.01 %" if 0 < share < 1e-4 else f"{100 * share:.2f} %"


def to_json(found: Inspection) -> bytes:
    """Return everything about each layer, its most and least similar pairs among it."""
    layers = [
        {
            **_scalars(profile),
            "quantiles": profile.quantiles,
            "dead_kernels": profile.dead_kernels,
            "most_similar": [pair._asdict() for pair in profile.most_similar],
            "least_similar": [pair._asdict() for pair in profile.least_similar],
        }
        for profile in found.profiles
    ]
    content = {
        "model": found.title,
        "settings": found.settings,
        "expected_draws": found.expected_draws,
        "expected_merges": found.expected_merges,
        "rate": found.rate,
        "threshold_for_rate": found.threshold_for_rate,
        "layers": layers,
    }
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def to_csv(found: Inspection) -> bytes:
    """Return a row per layer, without the pairs; nothing if there is no layer."""
    from inmerge_optim.similarity import QUANTILES

    rows = []
    for profile in found.profiles:
        quantiles = {f"quantile_{share:g}": (profile.quantiles or {}).get(share) for share in QUANTILES}
        row = {**_scalars(profile), **quantiles, "dead_kernels": len(profile.dead_kernels)}
        rows.append({key: _csv_text(value) if isinstance(value, str) else value for key, value in row.items()})
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue().encode()


def _scalars(profile: LayerProfile) -> dict[str, Any]:
    return {
        "name": profile.name,
        "depth": profile.depth,
        "selected": profile.selected,
        "reason": profile.reason,
        "kernels": profile.kernels,
        "row_length": profile.row_length,
        "groups": profile.groups,
        "mean": profile.mean,
        "threshold": profile.threshold,
        "share_above_threshold": profile.share_above_threshold,
        "random_share_above_threshold": profile.random_share_above_threshold,
        "expected_draws": profile.expected_draws,
        "expected_merges": profile.expected_merges,
    }


def _csv_text(text: str) -> str:
    """Return a text that stays one in a spreadsheet, which would compute what begins like a formula."""
    return f"'{printable(text)}" if text.startswith(_FORMULA) else printable(text)


def is_standard_output(path: Path) -> bool:
    """Say whether a file's name stands for the standard output."""
    return path in (STANDARD_OUTPUT, Path("/dev/stdout"))


def obstacle(path: Path) -> str:
    """Return why a file can't be written at ``path``, or an empty text; nothing is written or opened to see it."""
    if is_standard_output(path):
        return ""
    try:
        if not path.parent.is_dir():
            return "lies in no folder that exists"
        if not os.access(path.parent, os.W_OK):
            return "lies in a folder that can't be written to"
        kind = stat.S_IFMT(path.lstat().st_mode)
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"is no possible place ({error.strerror})"
    kinds = {stat.S_IFREG: "", stat.S_IFDIR: "is a folder", stat.S_IFLNK: "is a symbolic link"}
    return kinds.get(kind, "is a device, a pipe or a socket")


def write(path: Path, content: bytes) -> None:
    """Write a file beside its place and rename it when it is whole, or write to the standard output.

    Raises:
        OSError: it can't be written; nothing is left then, and what stood there stays.
    """
    if is_standard_output(path):
        try:
            sys.stdout.flush()
            sys.stdout.buffer.write(content)
            sys.stdout.buffer.flush()
        except OSError:  # what is left in the buffer would be tried again, and fail again, when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise
        return
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)  # what a killed process left, or a link, which would be followed
    try:
        with partial.open("xb") as file:
            file.write(content)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
