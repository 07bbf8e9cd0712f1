"""The pictures of a report.

Arms differ by colour (Okabe and Ito's palette, which colour-blind readers tell apart), line style and marker, so that
they can be told apart in grey print as well. Figures are narrow, for phones.
"""

import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix, precision_recall_curve, roc_curve

from ..files import write_bytes
from ..judging.intervals import LEVEL
from ..judging.metrics import positives
from ..runs.finished import FinishedRun
from ..runs.layout import BACKBONE, PLOTS

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P")
_GREY = "#595959"
_WIDTH = 5.2
_BINS = 10
_MOST_CELLS_WITH_NUMBERS = 120
_DIFFERENCES = {"auroc": "AUROC", "auprc": "AUPRC", "balanced_accuracy": "balanced accuracy", "accuracy": "accuracy"}


def write_figures(run: FinishedRun) -> dict[str, tuple[str, str]]:
    """Draw what the run has figures for, into its plots/; per picture its path in the run folder and what it shows."""
    drawn = {}
    for name, (draw, description) in _FIGURES.items():
        figure = draw(run)
        if figure is not None:
            path = f"{PLOTS}/{name}.png"
            write_figure(run.folder / path, figure)
            drawn[name] = (path, description)
    return drawn


def new_figure(height: float, *grid: int, **settings: Any) -> tuple[Figure, Any]:
    """A figure of the common width, with its panels; height in inches."""
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots(*grid, **settings)


def write_figure(path: Path, figure: Figure) -> None:
    path.parent.mkdir(exist_ok=True)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150, metadata={"Software": None})
    write_bytes(path, content.getvalue())


def difference_rows(axes: Axes, rows: list[tuple[str, dict[str, Any]]]) -> None:
    """A row per difference of summary.json: a dot per seed; thick: its interval, thin: over seeds and over cases."""
    for place, (_, difference) in enumerate(rows):
        height = -place
        for kind, shift, colour in (("t", 0.12, _COLOURS[2]), ("bootstrap", 0.24, _COLOURS[1])):
            if difference.get(f"{kind}_low") is not None:
                ends = difference[f"{kind}_low"], difference[f"{kind}_high"]
                axes.plot(ends, (height - shift,) * 2, color=colour, linewidth=1.2, marker="|", markersize=7)
        if difference["low"] is not None:
            axes.plot((difference["low"], difference["high"]), (height,) * 2, color=_COLOURS[0], linewidth=3.5)
        values = [value for value in difference["values"] if value is not None]
        axes.plot(values, [height + 0.18] * len(values), "o", color=_GREY, markersize=4, alpha=0.8)
        if difference["mean"] is not None:
            axes.plot(difference["mean"], height, "D", color=_COLOURS[0], markeredgecolor="white", markersize=8)
    axes.axvline(0, color=_GREY, linewidth=0.8)
    axes.set_yticks([-place for place in range(len(rows))], [label for label, _ in rows])
    axes.set_ylim(-len(rows) + 0.5, 0.5)
    axes.locator_params(axis="x", nbins=5)
    axes.grid(axis="x", alpha=0.3)


def difference_legend(figure: Figure) -> None:
    level = f"{LEVEL:.0%}"
    handles = [
        Line2D([], [], color=_GREY, marker="o", linestyle="", markersize=4, label="one seed"),
        Line2D([], [], color=_COLOURS[0], marker="D", linewidth=3.5, label=f"mean, {level} interval"),
        Line2D([], [], color=_COLOURS[2], marker="|", linewidth=1.2, label=f"{level}, over seeds alone"),
        Line2D([], [], color=_COLOURS[1], marker="|", linewidth=1.2, label=f"{level}, over the test set alone"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize="small", frameon=False)


def _differences(run: FinishedRun) -> Figure | None:
    if not run.other_arms:
        return None
    height = len(_DIFFERENCES) * (0.5 + 0.42 * len(run.other_arms)) + 0.6
    figure, panels = new_figure(height, len(_DIFFERENCES), 1)
    for axes, (metric, title) in zip(panels.flat, _DIFFERENCES.items(), strict=True):
        difference_rows(axes, [(arm, run.summary["differences"][arm][metric]) for arm in run.other_arms])
        axes.set_title(f"Test {title}, arm minus baseline", fontsize="medium", loc="left")
    difference_legend(figure)
    return figure


def _learning_curves(run: FinishedRun) -> Figure | None:
    figure, (above, below) = new_figure(5.5, 2, 1, sharex=True)
    before = run.options["epochs"]
    backbone = run.curves(BACKBONE) if before else None
    for axes, column, title in ((above, "train_loss", "Training loss"), (below, "val_auroc", "Validation AUROC")):
        if backbone is not None:
            for _, seed in backbone.groupby("seed"):
                axes.plot(seed["epoch"], seed[column], color=_GREY, linewidth=1, alpha=0.7)
        for arm, look in _looks(run, marker=True):
            curves = run.curves(arm)
            if curves.empty:
                continue
            for _, seed in curves.groupby("seed"):
                axes.plot(before + seed["epoch"], seed[column], color=look["color"], linewidth=0.8, alpha=0.35)
            mean = curves.groupby("epoch")[column].mean()
            axes.plot(before + mean.index, mean, label=arm, markersize=4, **look)
        if before:
            axes.axvline(before + 0.5, color=_GREY, linewidth=0.8, linestyle=":")
        axes.set_title(title, fontsize="medium", loc="left")
        axes.grid(alpha=0.3)
    below.set_xlabel("epoch; grey: backbone stage, thin: one seed, thick: mean")
    below.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, above)
    return figure


def _roc(run: FinishedRun) -> Figure:
    def curve(positive: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return roc_curve(positive, scores)[:2]

    figure, panels = _curves_by_class(run, curve)
    for axes in panels:
        axes.plot((0, 1), (0, 1), color=_GREY, linewidth=0.8, linestyle=":")
    figure.supxlabel("false positive rate", fontsize="medium")
    figure.supylabel("true positive rate", fontsize="medium")
    return figure


def _precision_recall(run: FinishedRun) -> Figure:
    def curve(positive: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        precision, recall, _ = precision_recall_curve(positive, scores)
        return recall, precision

    figure, _ = _curves_by_class(run, curve)
    figure.supxlabel("recall", fontsize="medium")
    figure.supylabel("precision", fontsize="medium")
    return figure


def _curves_by_class(
    run: FinishedRun, curve: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
) -> tuple[Figure, list[Axes]]:
    """A panel per class that has positive and negative cases on test, with a line per arm and seed."""
    labels = run.predictions[run.arms[0]][0][0]
    scored = {k: positive for k, positive in positives(run.task, labels).items() if 0 < positive.sum() < len(positive)}
    columns = min(3, max(1, len(scored)))
    rows = math.ceil(len(scored) / columns) or 1
    side = 4.2 if columns == 1 else _WIDTH / columns + 0.2
    figure, panels = new_figure(side * rows + 0.8, rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in panels.flat[len(scored) :]:
        axes.set_visible(False)
    for arm, look in _looks(run):
        predictions = run.predictions[arm]
        for axes, (k, positive) in zip(panels.flat, scored.items(), strict=False):
            for seed, (_, probabilities) in enumerate(predictions):
                label = arm if seed == 0 else None
                axes.plot(*curve(positive, probabilities[:, k]), label=label, alpha=0.75, **look | {"linewidth": 1.1})
            axes.set_title(f"{run.task.classes[k]}\n{positive.sum()} of {len(positive)}", fontsize="small")
            axes.set_aspect("equal")
            axes.grid(alpha=0.3)
    if scored:
        _legend(figure, panels.flat[0])
    return figure, list(panels.flat[: len(scored)])


def _reliability(run: FinishedRun) -> Figure:
    """Of a task of several classes for the class that is predicted, else for the positive cases of all labels."""
    figure, (above, below) = new_figure(6.2, 2, 1, sharex=True, height_ratios=(3, 1))
    for arm, look in _looks(run, marker=True):
        pairs = [_outcomes_and_confidence(run, *prediction) for prediction in run.predictions[arm]]
        outcomes, confidence = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
        observed, expected = calibration_curve(outcomes, confidence, n_bins=_BINS)
        above.plot(expected, observed, label=arm, markersize=5, **look)
        count, edges = np.histogram(confidence, bins=_BINS, range=(0, 1))
        below.stairs(count / len(confidence), edges, color=look["color"], linestyle=look["linestyle"], linewidth=1.6)
    above.plot((0, 1), (0, 1), color=_GREY, linewidth=0.8, linestyle=":")
    several = run.task.kind in ("multi-class", "ordinal")
    above.set_ylabel("share that is right" if several else "share that is positive")
    below.set_xlabel("probability of the predicted class" if several else "predicted probability")
    below.set_ylabel("share of cases" if not run.task.multi_label else "share of labels")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    _legend(figure, above)
    return figure


def _outcomes_and_confidence(
    run: FinishedRun, labels: np.ndarray, probabilities: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    if run.task.multi_label:
        return labels.ravel(), probabilities.ravel()
    if run.task.kind == "binary":
        return labels, probabilities[:, 1]
    return labels == probabilities.argmax(axis=1), probabilities.max(axis=1)


def _confusion(run: FinishedRun) -> Figure:
    if run.task.multi_label:
        return _label_aurocs(run)
    classes = run.task.classes
    columns = min(2, len(run.arms)) if len(classes) <= 4 else 1
    rows = math.ceil(len(run.arms) / columns)
    figure, panels = new_figure((0.6 + _WIDTH / columns) * rows, rows, columns, squeeze=False)
    for axes in panels.flat[len(run.arms) :]:
        axes.set_visible(False)
    names = [name if len(name) <= 14 else f"{name[:12]}…" for name in classes]
    for axes, arm in zip(panels.flat, run.arms, strict=False):
        counts = sum(
            confusion_matrix(labels, probabilities.argmax(axis=1), labels=range(len(classes)))
            for labels, probabilities in run.predictions[arm]
        )
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axes.imshow(shares, cmap="cividis", vmin=0, vmax=1)
        for (i, j), share in np.ndenumerate(shares):
            text = f"{share:.0%}" if len(classes) <= 8 else f"{100 * share:.0f}"
            axes.text(j, i, text, ha="center", va="center", fontsize="small", color=_text_colour(share))
        axes.set_xticks(range(len(classes)), names, rotation=40, ha="right", fontsize="small")
        axes.set_yticks(range(len(classes)), names, fontsize="small")
        axes.set_title(arm, fontsize="medium")
    figure.supxlabel("predicted", fontsize="medium")
    figure.supylabel("true", fontsize="medium")
    return figure


def _label_aurocs(run: FinishedRun) -> Figure:
    names = list(run.task.classes)
    figure, axes = new_figure(1.0 + len(names) * (0.12 * len(run.arms) + 0.14))
    height = 0.7 / len(run.arms)
    for place, (arm, look) in enumerate(_looks(run, marker=True)):
        aurocs = [run.summary["per_class"][arm][name]["auroc"] for name in names]
        means = [math.nan if figures["mean"] is None else figures["mean"] for figures in aurocs]
        spread = [figures["std"] or 0 for figures in aurocs]
        heights = [-k + 0.35 - (place + 0.5) * height for k in range(len(names))]
        axes.errorbar(means, heights, xerr=spread, fmt=look["marker"], color=look["color"], markersize=5, label=arm)
    axes.set_yticks([-k for k in range(len(names))], names)
    axes.axvline(0.5, color=_GREY, linewidth=0.8, linestyle=":")
    axes.set_xlabel("test AUROC; lines: one standard deviation")
    axes.grid(alpha=0.3)
    _legend(figure, axes)
    return figure


def _merge_rates(run: FinishedRun) -> Figure | None:
    """A heat map per merging arm: the share of drawn pairs that merged, by layer (deepest last) and epoch."""
    arms = [arm for arm in run.merging_arms if not run.merges(arm).empty]
    if not arms:
        return None
    rates = {}
    for arm in arms:
        table = run.merges(arm)
        totals = table.groupby(["layer", "epoch"], sort=False)[["drawn", "merged"]].sum()
        rates[arm] = (totals["merged"] / totals["drawn"].where(totals["drawn"] > 0)).unstack("epoch")
        rates[arm] = rates[arm].loc[list(dict.fromkeys(table["layer"]))]
    layers = len(next(iter(rates.values())))
    figure, panels = new_figure(len(arms) * (0.9 + 0.26 * layers) + 0.4, len(arms), 1, squeeze=False)
    largest = max(float(np.nanmax(rate.to_numpy(), initial=0)) for rate in rates.values()) or 1.0
    for axes, (arm, rate) in zip(panels.flat, rates.items(), strict=True):
        image = axes.imshow(rate, cmap="cividis", vmin=0, vmax=largest, aspect="auto")
        if rate.size <= _MOST_CELLS_WITH_NUMBERS:
            for (i, j), value in np.ndenumerate(rate.to_numpy()):
                text = "-" if np.isnan(value) else f"{value:.1%}"
                axes.text(j, i, text, ha="center", va="center", fontsize="x-small", color=_text_colour(value / largest))
        axes.set_xticks(range(rate.shape[1]), rate.columns)
        axes.set_yticks(range(rate.shape[0]), rate.index, fontsize="small")
        axes.set_title(arm, fontsize="medium", loc="left")
        axes.set_xlabel("epoch of the arm")
        figure.colorbar(image, ax=axes, format="{x:.1%}")
    return figure


_FIGURES: dict[str, tuple[Callable[[FinishedRun], Figure | None], str]] = {
    "differences": (_differences, "Paired differences to the baseline on test, with both intervals"),
    "learning_curves": (_learning_curves, "Training loss and validation AUROC by epoch"),
    "roc": (_roc, "ROC curves on test, a line per arm and seed"),
    "precision_recall": (_precision_recall, "Precision-recall curves on test, a line per arm and seed"),
    "reliability": (_reliability, "Reliability diagram on test, all seeds together"),
    "confusion": (
        _confusion,
        "What was predicted for each class on test, all seeds together, or the AUROC of each label",
    ),
    "merge_rates": (_merge_rates, "Share of drawn pairs that merged, by layer and epoch, all seeds together"),
}


def _looks(run: FinishedRun, marker: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """How each arm's lines look."""
    for place, arm in enumerate(run.arms):
        look: dict[str, Any] = {"color": _COLOURS[place], "linestyle": _STYLES[place], "linewidth": 1.8}
        yield arm, look | ({"marker": _MARKERS[place]} if marker else {})


def _text_colour(share: float) -> str:
    """Readable on cividis, which is dark at 0."""
    return "black" if share > 0.55 else "white"


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize="small", frameon=False)
