"""The report of a finished run, made from its folder alone: report.html, which stands by itself, and report.md.

A report is a list of sections; the templates know nothing of what is in them.
"""

import base64
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..files import GENERATOR, check_written_here, write_text
from ..judging.summary import metric_in_words, total_merges
from ..options import BASELINE
from ..runs.finished import FinishedRun
from ..runs.layout import PLOTS, REPORT
from ..runs.sections import Section
from .cards import write_cards
from .checklist import checklist_section
from .rendering import template
from .style import (
    NO_DIFFERENCE,
    difference_legend,
    difference_rows,
    interval_text,
    mean_text,
    new_figure,
    range_text,
    share_text,
    write_figure,
)
from .trial import SECTIONS, settings_of, settings_section
from .verdicts import judged_difference


def write_report(run: FinishedRun) -> Path:
    """Write plots/, report.html, report.md and a model card per arm; the path of report.html."""
    added = run.sections  # read first: a stranger's may name what it should not
    found = [section(run) for section in SECTIONS]
    sections = [*(section for section in found if section), *added, settings_section(run), checklist_section(run)]
    _write(run.folder / REPORT, f"{run.name}: does merging help here?", sections)
    write_cards(run)
    return run.folder / REPORT


def check_side_by_side(path: Path) -> None:
    """Refuse a place where files of others are."""
    for written in (path, path.with_suffix(".md"), path.parent / _picture(path)):
        check_written_here(written)


def write_side_by_side(runs: Sequence[FinishedRun], path: Path) -> None:
    """Write one HTML file, and the same as Markdown, that sets several finished runs side by side."""
    picture = _picture(path)
    figure = _differences_of_runs(runs)
    write_figure(path.parent / picture, figure)
    sections = [
        Section(
            "Differences to the baseline on test",
            "Each run is a trial of its own: no test is made over them, and the more runs stand here, the likelier one "
            "of them differs by chance.",
            ("run", "arm", "metric", "baseline", "difference", "over seeds", "over the test set", "merged", "verdict"),
            [row for run in runs for row in _difference_rows_of(run)],
            [(picture, "Difference on test of every run and arm, with its intervals")],
        ),
        Section("Where the settings differ", "", ("setting", *_labels(runs)), _differing_settings(runs)),
    ]
    _write(path, "Runs side by side", sections)


def _picture(path: Path) -> str:
    return f"{PLOTS}/{path.stem}.png"


def _difference_rows_of(run: FinishedRun) -> list[list[str | None]]:
    rows = []
    for found in _to_baseline(run):
        difference = judged_difference(run.summary, found) or NO_DIFFERENCE
        layers = run.summary["merges"].get(found["arm"])
        baseline = run.summary["arms"].get(BASELINE)
        rows.append(
            [
                run.name,
                found["arm"],
                metric_in_words(run.summary),
                baseline and mean_text(baseline[found["metric"]]),
                interval_text(difference["mean"], (difference["low"], difference["high"])),
                range_text(difference["t_low"], difference["t_high"]),
                range_text(difference["bootstrap_low"], difference["bootstrap_high"]),
                share_text(total_merges(layers)) if layers else None,
                found["outcome"],
            ]
        )
    return rows


def _to_baseline(run: FinishedRun) -> list[dict[str, Any]]:
    return [found for found in run.summary["verdicts"] if found["reference"] == BASELINE]


def _differences_of_runs(runs: Sequence[FinishedRun]) -> Figure:
    rows = [
        (f"{label}\n{found['arm']}", judged_difference(run.summary, found) or NO_DIFFERENCE)
        for label, run in zip(_labels(runs), runs, strict=True)
        for found in _to_baseline(run)
    ]
    figure, axes = new_figure(1.0 + 0.6 * len(rows))
    difference_rows(axes, rows)
    axes.set_xlabel("difference on test, arm minus baseline")
    difference_legend(figure)
    return figure


def _labels(runs: Sequence[FinishedRun]) -> list[str]:
    """The runs' names, with their folders where names are shared."""
    names = [run.name for run in runs]
    return [
        name if names.count(name) == 1 else f"{name} ({run.folder.name})" for name, run in zip(names, runs, strict=True)
    ]


def _differing_settings(runs: Sequence[FinishedRun]) -> list[list[str]]:
    settings = [settings_of(run) for run in runs]
    rows = [
        [name, *(found.get(name, "-") for found in settings)] for name in dict.fromkeys(k for s in settings for k in s)
    ]
    return [row for row in rows if any(left != right for left, right in pairwise(row[1:]))]


def _write(path: Path, title: str, sections: Sequence[Section]) -> None:
    """The same sections as HTML, with the pictures inside, and as Markdown, which refers to them."""

    def embedded(picture: str) -> str:
        return base64.b64encode((path.parent / picture).read_bytes()).decode("ascii")

    content = {"generator": GENERATOR, "title": title, "sections": sections, "embedded": embedded}
    write_text(path, template("report.html.j2").render(content))
    write_text(path.with_suffix(".md"), template("report.md.j2").render(content))
