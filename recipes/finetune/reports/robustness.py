"""What a report tells of a run's robustness: verdicts, curves over severity, tables, and the corruptions themselves."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..data.corruptions import GENERAL, SEVERITIES, Suite, corrupt
from ..data.images import ImageData
from ..judging.formatting import number, percent
from ..judging.intervals import LEVEL
from ..judging.medmnistc import BASELINE_SIZE, SMALLEST_GROWTH
from ..judging.metrics import title_of
from ..judging.robustness import ENDPOINT, ENDPOINTS, FIGURES
from ..judging.shift import shifts
from ..options import BASELINE
from ..runs.finished import FinishedRun
from ..runs.layout import ROBUSTNESS
from ..runs.sections import Section
from .style import SIGNED, interval_text, legend, looks, mean_text, new_figure, number_text, write_figure
from .terminal import aligned

_TITLES = {name: "balanced error" if name == "balanced_error" else title_of(name) for name in FIGURES}
_IN_SHORT = tuple(name for name in FIGURES if not name.endswith("_scaled"))  # for the terminal's table to fit a screen
_SHOWN = (1, 3, 5)  # severities of the examples
_COLUMNS = 3
_VAGUE = "†"


def robustness_sections(run: FinishedRun, data: ImageData, suite: Suite, summary: dict[str, Any]) -> list[Section]:
    """Draw the pictures into robustness/ in the run folder; the sections that show them."""
    drawn = {
        "severity": (
            _over_severity(run, summary),
            "AUROC over severity, mean over all corruptions; bands: over test cases",
        ),
        "corruptions": (
            _by_corruption(run, summary),
            "AUROC over severity under each corruption; bands: over test cases",
        ),
        "examples": (_examples(data, suite), "A test image clean, and at severities 1, 3 and 5 of each corruption"),
    }
    pictures = {}
    for name, (figure, description) in drawn.items():
        path = f"{ROBUSTNESS}/{name}.png"
        write_figure(run.folder / path, figure)
        pictures[name] = (path, description)
    sections = [
        Section("Robustness", _text(summary), *_overall(run, summary), figures=[pictures["severity"]]),
        Section(
            "Robustness by corruption",
            _corruptions_text(summary),
            *_corruptions(run, summary),
            figures=[pictures["corruptions"]],
        ),
        Section("What the corruptions look like", figures=[pictures["examples"]]),
    ]
    if summary["attacks"]:
        sections.append(_attacks(summary))
    shifted = _shift(run, data)
    return [*sections, shifted] if shifted else sections


def robustness_table(summary: dict[str, Any]) -> str:
    """The same in short, for the terminal."""
    rows = [["arm", "test images", *(_TITLES[name] for name in _IN_SHORT)]]
    for arm in summary["arms"]:
        for words, figures in (("clean", summary["clean"]), ("corrupted", summary["corrupted"])):
            rows.append([arm, words, *(mean_text(figures[arm][name]) or "-" for name in _IN_SHORT)])
    lines = [_heading(summary), aligned(rows), "", *(found["sentence"] for found in summary["verdicts"])]
    lines += [f"Left out: {name}, as {reason}" for name, reason in summary["left_out"].items()]
    return "\n".join(lines)


def _heading(summary: dict[str, Any]) -> str:
    seeds = len(summary["seeds"])
    return (
        f"Test figures under {len(summary['by_severity'])} corruptions of {len(SEVERITIES)} severities, "
        f"{'mean ± standard deviation over ' + str(seeds) + ' seeds' if seeds > 1 else 'one seed'}"
    )


def _text(summary: dict[str, Any]) -> str:
    size = summary["size"]
    verdicts = "\n\n".join(f"{found['sentence']}." for found in summary["verdicts"])
    what = (
        f"The kept weights of every arm and seed on the test images under {len(summary['by_severity'])} corruptions "
        f"({_origin(summary)}), each of {len(SEVERITIES)} severities, made at {size} x {size} pixels and the same for "
        "all arms and seeds. Nothing was trained, and no threshold or temperature was chosen on corrupted images: "
        "scaled figures are at those of clean validation images. Figures under corruption are means over severities "
        "and corruptions."
    )
    left_out = "; ".join(f"{name}, as {reason}" for name, reason in summary["left_out"].items())
    what += f" Left out: {left_out}." if left_out else ""
    rule = (
        f"The {ENDPOINT} is a second endpoint. Its intervals are over seeds and test {summary['unit']}, as those of "
        f"clean figures are, and both endpoints are judged here by one rule over {ENDPOINTS} times as many comparisons "
        "as there are arms, so that both can be claimed together."
    )
    return "\n\n".join(part for part in (verdicts, what, rule if verdicts else "") if part)


def _origin(summary: dict[str, Any]) -> str:
    """Where the corruptions are from, and whether someone has chosen among them."""
    name = summary["suite"]
    whose = "the general set, as MedMNIST-C defines each" if name == GENERAL else f"those of MedMNIST-C for {name}"
    return f"chosen by name from {whose}" if summary["chosen"] else whose


def _overall(run: FinishedRun, summary: dict[str, Any]) -> tuple[list[str], list[list[str | None]]]:
    header = ["arm", "test images", *_TITLES.values()]
    rows: list[list[str | None]] = []
    for arm in run.arms:
        for words in ("clean", "corrupted"):
            rows.append([arm, words, *(mean_text(summary[words][arm][name]) for name in FIGURES)])
        rows.append([arm, "change", *(number_text(summary["change"][arm][name]["mean"], SIGNED) for name in FIGURES)])
    return header, rows


def _corruptions_text(summary: dict[str, Any]) -> str:
    text = (
        "AUROC as the mean over severities; after each difference its interval over seeds and test "
        f"{summary['unit']} at {percent(LEVEL)}, not adjusted for how many there are."
    )
    if not summary["relative"]:
        return text + f" MedMNIST-C's relative errors are not given: AlexNet's are not known for {summary['suite']}."
    means = "; ".join(
        f"{arm} BE {found['mean_be']:.2f}, rBE {number_text(found['mean_rbe'], '{:.2f}') or '-'}"
        for arm, found in summary["relative"].items()
    )
    text += (
        " BE and rBE are MedMNIST-C's balanced error and its growth, relative to AlexNet's at 224 pixels (1: as "
        f"AlexNet; lower is better); means: {means}."
    )
    if summary["ill_conditioned"]:
        text += (
            f" {_VAGUE} AlexNet's error grows by less than {SMALLEST_GROWTH:g} there, so that rBE divides by next to "
            "nothing: it is left out of the mean."
        )
    if summary["size"] != BASELINE_SIZE:
        text += (
            f" These images have {summary['size']} pixels, at which the same blur or block is larger: both are for "
            "comparison among these arms, and not with published figures."
        )
    return text


def _corruptions(run: FinishedRun, summary: dict[str, Any]) -> tuple[list[str], list[list[str | None]]]:
    relative = summary["relative"]
    header = [
        "corruption",
        *(f"AUROC, {arm}" for arm in run.arms),
        *(f"{arm} - {BASELINE}" for arm in run.other_arms),
        *(f"balanced error, {arm}" for arm in run.arms),
        *(f"{kind}, {arm}" for arm in relative for kind in ("BE", "rBE")),
    ]
    rows = []
    for name, figures in summary["by_corruption"].items():
        differences = [summary["differences"][name][arm] for arm in run.other_arms]
        vague = f" {_VAGUE}" if name in summary["ill_conditioned"] else ""
        errors = [found["by_corruption"].get(name) for found in relative.values()]
        rows.append(
            [
                name.replace("_", " "),
                *(mean_text(figures[arm]["auroc"]) for arm in run.arms),
                *(interval_text(found["mean"], (found["low"], found["high"])) for found in differences),
                *(mean_text(figures[arm]["balanced_error"]) for arm in run.arms),
                *(
                    cell
                    for found in errors
                    for cell in ((f"{found['be']:.2f}", f"{found['rbe']:.2f}{vague}") if found else (None, None))
                ),
            ]
        )
    return header, rows


def _attacks(summary: dict[str, Any]) -> Section:
    text = (
        "Each pixel changed by so many of 255 grey levels at most, against the gradient of the very model that is "
        "scored: FGSM in one step, PGD in ten from a random start. Noise goes as far in random directions; an attack "
        "that does no more harm than it has found nothing. Such attacks say how steep a model is, and little of what "
        "happens in a clinic."
    )
    header = ["attack", "grey levels", *(f"{_TITLES[name]}, {arm}" for arm in summary["arms"] for name in FIGURES[:2])]
    rows = []
    for kind, levels in summary["attacks"].items():
        for level, arms in levels.items():
            cells = [number_text(_mean(seeds, name)) for seeds in arms.values() for name in FIGURES[:2]]
            rows.append([kind.upper() if kind != "noise" else kind, level, *cells])
    clean = [number_text(summary["clean"][arm][name]["mean"]) for arm in summary["arms"] for name in FIGURES[:2]]
    return Section("Adversarial changes", text, header, [["none", "0", *clean], *rows])


def _mean(seeds: list[Mapping[str, float | None] | None], name: str) -> float | None:
    values = [seed[name] for seed in seeds if seed is not None]  # None: the arm diverged
    return None if None in values else float(np.mean(values))


def _shift(run: FinishedRun, data: ImageData) -> Section | None:
    """From validation to test, and between the subgroups of test."""
    unit = "cases" if data.test.patients is None else "patients"
    if BASELINE not in run.arms:  # it diverged
        return None
    rows = []
    for found in shifts(run.task, run.predictions, None if run.folds else run.validation, data.test.subgroups):
        lost = [
            f"{number(a, '{:.4f}')} → {number(b, '{:.4f}')} ({number(b - a, SIGNED)})" for a, b in found.aurocs.values()
        ]
        more = [interval_text(mean, (low, high)) for mean, low, high in found.differences.values()]
        per_case = "" if found.per_case is None else " → ".join(f"{value:.2f}" for value in found.per_case)
        cases = " → ".join(f"{count:,}" for count in found.cases)
        rows.append(
            [" → ".join(found.names), cases, str(found.labels), *([per_case] if per_case else []), *lost, *more]
        )
    if not rows:
        return None
    multi = ["labels per image"] if run.task.multi_label else []
    header = ["shift", "images", "labels", *multi, *(f"AUROC, {arm}" for arm in run.arms)]
    header += [f"lost by {arm} beyond {BASELINE}" for arm in run.other_arms]
    text = (
        "Images that differ by where they come from: AUROC on one part and on another, over the labels that both parts "
        "can score, mean over seeds. The epoch was chosen on validation, which flatters it a little. In the last "
        f"columns what an arm loses beyond the baseline's loss, with its {percent(LEVEL)} bootstrap interval over the "
        f"{unit} of both parts, given these models; not adjusted for how many there are."
    )
    return Section("Shift in the data themselves", text, header, rows)


def _over_severity(run: FinishedRun, summary: dict[str, Any]) -> Figure:
    figure, axes = new_figure(3.6)
    curves = list(summary["by_severity"])
    for arm, look in looks(run, marker=True):
        means = np.mean([_curve(summary, name, arm)[0] for name in curves], axis=0)
        ends = [summary["auroc_intervals_of_mean"][str(severity)][arm] for severity in SEVERITIES]
        low, high = (np.array([None, *(end[side] for end in ends)], dtype=float) for side in ("low", "high"))
        _draw(axes, means, low, high, label=arm, look=look)
    axes.set_xlabel("severity; 0: clean")
    axes.set_ylabel(f"test {title_of('auroc')}")
    axes.grid(alpha=0.3)
    legend(figure, axes)
    return figure


def _by_corruption(run: FinishedRun, summary: dict[str, Any]) -> Figure:
    names = list(summary["by_severity"])
    rows = math.ceil(len(names) / _COLUMNS)
    figure, panels = new_figure(0.6 + 1.6 * rows, rows, _COLUMNS, sharex=True, sharey=True, squeeze=False)
    for axes in panels.flat[len(names) :]:
        axes.set_visible(False)
    for arm, look in looks(run, marker=True):
        for axes, name in zip(panels.flat, names, strict=False):
            _draw(axes, *_curve(summary, name, arm), label=arm, look=look | {"linewidth": 1.3})
            axes.set_title(name.replace("_", " "), fontsize="small")
            axes.grid(alpha=0.3)
    figure.supxlabel("severity; 0: clean", fontsize="medium")
    figure.supylabel(f"test {title_of('auroc')}", fontsize="medium")
    legend(figure, panels.flat[0])
    return figure


def _curve(summary: dict[str, Any], name: str, arm: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """AUROC at severities 0 to 5, and the ends of its interval, where 0 has none."""
    of_severity = [summary["by_severity"][name][str(severity)][arm]["auroc"]["mean"] for severity in SEVERITIES]
    ends = [summary["auroc_intervals"][name][str(severity)][arm] for severity in SEVERITIES]
    clean = summary["clean"][arm]["auroc"]["mean"]
    columns = ([clean, *of_severity], [None, *(end["low"] for end in ends)], [None, *(end["high"] for end in ends)])
    means, low, high = (np.array(column, dtype=float) for column in columns)
    return means, low, high


def _draw(
    axes: Axes, values: np.ndarray, low: np.ndarray, high: np.ndarray, label: str, look: Mapping[str, Any]
) -> None:
    severities = np.arange(len(values))
    axes.fill_between(severities, low, high, color=look["color"], alpha=0.15, linewidth=0)
    axes.plot(severities, values, label=label, markersize=4, **look)
    axes.set_xticks(severities)


def _examples(data: ImageData, suite: Suite) -> Figure:
    """One test image, the first, under all corruptions."""
    margin = (data.test.images.shape[-1] - data.size) // 2
    middle = slice(margin, margin + data.size)
    image = data.test.images[[0]][..., middle, middle]
    names = list(suite.severities)
    figure, panels = new_figure(1.02 * len(names) + 0.2, len(names), 1 + len(_SHOWN), squeeze=False)
    for row, name in zip(panels, names, strict=True):
        parameters = [suite.severities[name][severity - 1] for severity in _SHOWN]
        changed = [corrupt(image, data.test.cases[:1], name, parameter) for parameter in parameters]
        for axes, shown in zip(row, [image, *changed], strict=True):
            axes.imshow(np.moveaxis(shown[0], 0, -1).squeeze(), cmap="gray", vmin=0, vmax=255)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_frame_on(False)
        row[0].set_ylabel(name.replace("_", "\n"), rotation=0, ha="right", va="center", fontsize="small")
    for axes, title in zip(panels[0], ["clean", *(f"severity {k}" for k in _SHOWN)], strict=True):
        axes.set_title(title, fontsize="small")
    return figure
