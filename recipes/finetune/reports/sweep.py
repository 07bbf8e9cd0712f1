"""What a trial says whose arms are the points of a sweep: the panels of the paper's Fig. 2, and a table of the points.

The points are read from the arms' names, so that any trial with such arms has this section.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..judging.metrics import METRICS, score, title_of
from ..judging.summary import total_merges
from ..options import BASELINE
from ..runs.finished import FinishedRun
from ..runs.layout import PLOTS
from ..runs.sections import Section
from ..training.arms import SETTINGS, arm_of, merge_settings, reduction_of
from ..training.points import DISSIMILAR, THRESHOLD
from .style import GREY, interval_text, legend, line_look, mean_text, new_figure, share_text, write_figure

_SYMBOLS = {"skip_layers": "L_s", THRESHOLD: "tau", "merge_weight": "alpha", "merge_prob": "p"}
# As in the paper's Fig. 2; a panel may have several settings beside each other.
_PANELS = {"a": ("skip_layers",), "b": (THRESHOLD,), "c": ("merge_weight", "merge_prob")}
_TEXT = """\
{points} points share one error: each verdict, and each interval here, is at the level that holds for all of them. In \
the pictures: the baseline's mean over seeds (line) and its standard deviation (band), each point's seeds (dots), \
their mean, and the interval of its difference to the baseline, set on the baseline's mean (per class: the one at \
95 %, for that class alone); grey bars, on the right: the share of drawn pairs that merged. Where that is near 0 \
nothing was merged, and what differs there is noise.

A maximum picked from a sweep is not a result: the best of {points} points lies above the baseline by chance alone. On \
validation the best one is {best}. Whether it holds is told by fresh seeds: --confirm-seeds runs it and the baseline \
anew, as a trial of one comparison."""


@dataclass(frozen=True)
class Point:
    """An arm, and the values of the settings that it merges with."""

    arm: str
    values: Mapping[str, Any]


Line = list[Point]
Columns = dict[str, dict[str, Line]]  # by setting, and by what tells the lines of a panel apart


@dataclass(frozen=True)
class Figures:
    """What a panel shows of each arm.

    Attributes:
        of: its figure, with mean, std and values over seeds.
        difference: to the baseline, with low and high.
    """

    of: Callable[[str], dict[str, Any]]
    difference: Callable[[str], dict[str, Any]]


def sweep_section(run: FinishedRun) -> Section | None:
    """The panels and the table; None for a trial whose arms are no points of a sweep."""
    points = _points(run) if BASELINE in run.arms else []
    varied = [name for name in SETTINGS if len({str(point.values[name]) for point in points}) > 1]
    if len(points) < 2 or not varied or not any("@" in point.arm for point in points):
        return None
    metric = run.summary["rule"]["metric"]
    verdicts = {found["arm"]: found for found in run.summary["verdicts"] if found["reference"] == BASELINE}
    rows = []
    for point in points:
        verdict, layers = verdicts[point.arm], run.summary["merges"].get(point.arm, {})
        count = total_merges(layers)
        rows.append(
            [
                *(str(point.values[name]) for name in varied),
                mean_text(run.summary["arms"][point.arm][metric]),
                interval_text(verdict["mean"], (verdict["low"], verdict["high"])),
                share_text(count),
                f"{count['merged']:,}",
                verdict["outcome"],
            ]
        )
    header = (*varied, f"{title_of(metric)} on test", f"minus {BASELINE}", "merge rate", "merged", "verdict")
    text = _TEXT.format(points=len(points), best=best_on_validation(run))
    return Section("Sensitivity", text, header, rows, _pictures(run, points, varied))


def best_on_validation(run: FinishedRun) -> str:
    """The arm beside the baseline, but for smaller models, of the best mean on validation; the first on ties."""
    metric = run.summary["rule"]["metric"]
    sign = -1 if METRICS[metric].lower_is_better else 1
    arms = [arm for arm in run.summary["differences"] if not reduction_of(arm)]
    return max(arms, key=lambda arm: sign * mean_on_validation(run, arm))


def mean_on_validation(run: FinishedRun, arm: str) -> float:
    """The primary metric of an arm on validation, mean over the seeds that it finished."""
    values = []
    for found, chosen in zip(run.validation[arm], run.chosen[arm], strict=True):
        scores = score(run.task, found.labels, found.probabilities, chosen)
        values.append(scores[run.summary["rule"]["metric"]] or 0.0)
    return sum(values) / len(values)


def _points(run: FinishedRun) -> list[Point]:
    """Of the arms that merge by similarity, and by nothing else, as far as they and the baseline came to an end."""
    options = SimpleNamespace(**run.options)
    points = []
    for name in run.summary["differences"]:
        arm = arm_of(name)
        if arm.criterion in ("similar", DISSIMILAR) and not arm.rounds and not arm.control:
            values = merge_settings(arm, options)
            if arm.criterion == DISSIMILAR:
                own = THRESHOLD in arm.settings
                values[THRESHOLD] = f"{DISSIMILAR} {values[THRESHOLD]}" if own else DISSIMILAR
            points.append(Point(name, values))
    return points


def _pictures(run: FinishedRun, points: list[Point], varied: list[str]) -> list[tuple[str, str]]:
    drawn: list[tuple[str, str]] = []
    metric = run.summary["rule"]["metric"]
    if run.summary["arms"][BASELINE][metric]["mean"] is None:
        return drawn
    classes = [name for name, found in run.summary["per_class"][BASELINE].items() if found["auroc"]["mean"] is not None]
    for letter, settings in _PANELS.items():
        columns = {name: _lines(points, name) for name in settings if name in varied}
        columns = {name: lines for name, lines in columns.items() if lines}
        if not columns:
            continue
        words = " and ".join(map(_title, columns))
        figures = {"": (_average(run, letter, columns, metric), f"Test {title_of(metric)} over {words}")}
        if len(classes) > 1:
            figures["_per_class"] = (_per_class(run, letter, columns, classes), f"Test AUROC per class over {words}")
        for suffix, (figure, description) in figures.items():
            path = f"{PLOTS}/sweep_{letter}{suffix}.png"
            write_figure(run.folder / path, figure)
            drawn.append((path, description))
    return drawn


def _lines(points: list[Point], setting: str) -> dict[str, Line]:
    """The points that differ in this setting alone, in its order; by the other settings where lines are several."""
    groups: dict[tuple[tuple[str, str], ...], Line] = {}
    for point in points:
        others = tuple((name, str(point.values[name])) for name in SETTINGS if name != setting)
        groups.setdefault(others, []).append(point)
    groups = {others: sorted(line, key=lambda p: _order(p.values[setting])) for others, line in groups.items()}
    groups = {others: line for others, line in groups.items() if len(line) > 1}
    several = {name for name, _ in next(iter(groups), ()) if len({dict(others)[name] for others in groups}) > 1}
    return {
        ", ".join(f"{_SYMBOLS[name]} {value}" for name, value in others if name in several): line
        for others, line in groups.items()
    }


def _order(value: Any) -> tuple[int, float, str]:
    """Dissimilar pairs first, then numbers, then thresholds that are texts."""
    if isinstance(value, int | float):
        return 1, float(value), ""
    return (0 if value.startswith(DISSIMILAR) else 2), 0.0, value


def _average(run: FinishedRun, letter: str, columns: Columns, metric: str) -> Figure:
    verdicts = {found["arm"]: found for found in run.summary["verdicts"] if found["reference"] == BASELINE}
    figures = Figures(lambda arm: run.summary["arms"][arm][metric], lambda arm: verdicts[arm])
    figure, panels = new_figure(3.4, 1, len(columns), squeeze=False)
    limits = _limits(columns, figures, room_below=0.6)
    for axes, (setting, lines) in zip(panels[0], columns.items(), strict=True):
        _panel(axes, setting, lines, figures, limits)
        _merge_rates(axes, run, setting, lines)
        axes.set_xlabel(_title(setting))
    panels[0][0].set_ylabel(f"test {title_of(metric)}")
    figure.suptitle(f"({letter}) {run.name}", fontsize="medium")
    if len(next(iter(columns.values()))) > 1:
        legend(figure, panels[0][0])
    return figure


def _per_class(run: FinishedRun, letter: str, columns: Columns, classes: list[str]) -> Figure:
    """A row per class where two settings stand beside each other, else two classes in a row."""
    cells = [(name, setting) for name in classes for setting in columns]
    rows = -(-len(cells) // 2)
    figure, panels = new_figure(1.6 * rows + 0.4, rows, 2, squeeze=False)
    for axes in panels.flat[len(cells) :]:
        axes.set_visible(False)
    for axes, (name, setting) in zip(panels.flat, cells, strict=False):
        of_arm = partial(_auroc, run, name)
        figures = Figures(of_arm, lambda arm, of_arm=of_arm: of_arm(arm)["difference"])  # type: ignore[misc]
        _panel(axes, setting, columns[setting], figures, _limits(columns, figures))
        axes.set_title(f"{name}, {_SYMBOLS[setting]}", fontsize="small", loc="left")
    figure.suptitle(f"({letter}) test AUROC per class", fontsize="medium")
    return figure


def _auroc(run: FinishedRun, name: str, arm: str) -> dict[str, Any]:
    return run.summary["per_class"][arm][name]["auroc"]


def _limits(columns: Columns, figures: Figures, room_below: float = 0.15) -> tuple[float, float]:
    """From the lowest to the highest of what the seeds gave; intervals may be cut off, as those over two seeds are."""
    baseline = figures.of(BASELINE)
    arms = {point.arm for lines in columns.values() for line in lines.values() for point in line}
    seen = [value for arm in arms for value in figures.of(arm)["values"] if value is not None]
    seen += [baseline["mean"] + sign * (baseline["std"] or 0.0) for sign in (-1, 1)]
    height = max(max(seen) - min(seen), 1e-3)
    return min(seen) - room_below * height, max(seen) + 0.15 * height


def _panel(axes: Axes, setting: str, lines: dict[str, Line], figures: Figures, limits: tuple[float, float]) -> None:
    """Lines over the values of a setting; these stand at equal distances, as not all are numbers."""
    places = _places(setting, lines)
    baseline = figures.of(BASELINE)
    level, spread = baseline["mean"], baseline["std"] or 0.0
    axes.axhspan(level - spread, level + spread, color=GREY, alpha=0.18, linewidth=0)
    axes.axhline(level, color=GREY, linewidth=1.2, linestyle="--")
    for number, (label, line) in enumerate(lines.items()):
        look, shift = line_look(number, marker=True), _shift(number, lines)
        xs = [places[str(point.values[setting])] + shift for point in line]
        axes.plot(xs, [figures.of(point.arm)["mean"] for point in line], label=label, markersize=5, **look)
        for x, point in zip(xs, line, strict=True):
            values = [value for value in figures.of(point.arm)["values"] if value is not None]
            difference = figures.difference(point.arm)
            axes.plot([x] * len(values), values, ".", color=look["color"], alpha=0.6, markersize=5)
            if difference["low"] is not None:
                ends = level + difference["low"], level + difference["high"]
                axes.plot([x, x], ends, color=look["color"], linewidth=1, alpha=0.8)
    axes.set_ylim(*limits)
    axes.set_xlim(-0.6, len(places) - 0.4)
    axes.set_xticks(range(len(places)), list(places), rotation=30 if max(map(len, places)) > 6 else 0)
    axes.tick_params(labelsize="small")
    axes.grid(axis="y", alpha=0.3)


def _merge_rates(axes: Axes, run: FinishedRun, setting: str, lines: dict[str, Line]) -> None:
    """Bars behind the lines, in the lower third, on an axis of their own on the right."""
    places, behind = _places(setting, lines), axes.twinx()
    highest = 0.0
    for number, line in enumerate(lines.values()):
        for point in line:
            count = total_merges(run.summary["merges"].get(point.arm, {}))
            rate = count["merged"] / count["drawn"] if count["drawn"] else 0.0
            x = places[str(point.values[setting])] + _shift(number, lines)
            behind.bar(x, rate, width=0.6 / len(lines), color=GREY, alpha=0.35)
            if len(lines) == 1:
                behind.text(x, rate, f"{rate:.2g}", ha="center", va="bottom", fontsize="x-small", color=GREY)
            highest = max(highest, rate)
    behind.set_ylim(0, 3.5 * highest or 1)
    behind.set_yticks([0, highest] if highest else [0], ["0", f"{highest:.2g}"] if highest else ["0"])
    behind.set_ylabel("merge rate", fontsize="small", color=GREY)
    behind.tick_params(labelsize="x-small", colors=GREY)
    axes.set_zorder(behind.get_zorder() + 1)
    axes.patch.set_visible(False)


def _places(setting: str, lines: dict[str, Line]) -> dict[str, int]:
    """Where each value of a setting stands on the x axis."""
    values = sorted({point.values[setting] for line in lines.values() for point in line}, key=_order)
    return {str(value): place for place, value in enumerate(values)}


def _shift(number: int, lines: dict[str, Line]) -> float:
    """Of one line beside the others, so that their points don't cover each other."""
    return (number - (len(lines) - 1) / 2) * 0.6 / len(lines)


def _title(setting: str) -> str:
    return f"{_SYMBOLS[setting]} ({setting})"
