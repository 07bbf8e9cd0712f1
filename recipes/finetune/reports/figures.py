"""The pictures of a report. A picture is added to _FIGURES, and named in the section that shows it."""

import math
from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix, precision_recall_curve, roc_curve

from ..data.tasks import Predictions
from ..judging.formatting import percent
from ..judging.metrics import METRICS, positives, title_of
from ..judging.power import ALPHA
from ..options import BASELINE
from ..runs.finished import FinishedRun
from ..runs.layout import BACKBONE, PLOTS
from .style import (
    GREY,
    WIDTH,
    arm_title,
    contrast_name,
    difference_legend,
    difference_rows,
    legend,
    looks,
    new_figure,
    text_colour,
    write_figure,
)
from .verdicts import judged_difference

_BINS = 10
_MOST_CELLS_WITH_NUMBERS = 120
CEILING = 0.99
_DIFFERENCES = ("auroc", "auprc", "balanced_accuracy", "accuracy")


def pictures(run: FinishedRun, *names: str) -> list[tuple[str, str]]:
    """Draw these into plots/, as far as the run has something to show; their paths in the run folder, with words."""
    drawn = []
    for name in names:
        draw, description = _FIGURES[name]
        figure = draw(run)
        if figure is not None:
            path = f"{PLOTS}/{name}.png"
            write_figure(run.folder / path, figure)
            drawn.append((path, description))
    return drawn


def _primary_difference(run: FinishedRun) -> Figure | None:
    verdicts = run.summary["verdicts"]
    rows = []
    for found in verdicts:
        difference = judged_difference(run.summary, found)
        if difference is not None and found["mean"] is not None:
            judged = {"low": found["low"], "high": found["high"]}
            arm, reference = found["arm"], found["reference"]
            name = arm if reference == BASELINE else contrast_name(arm, reference)
            rows.append((name, difference | judged))
    if not rows:
        return None
    rule = run.summary["rule"]
    figure, axes = new_figure(1.35 + 0.5 * len(rows))
    difference_rows(axes, rows, rule["margin"])
    lower = ", lower is better" if METRICS[rule["metric"]].lower_is_better else ""
    axes.set_title(f"Test {title_of(rule['metric'])}{lower}: arm minus {BASELINE}", fontsize="medium", loc="left")
    compared = sum(found["reference"] == BASELINE for found in verdicts)
    difference_legend(figure, 1 - ALPHA / max(compared, 1), margin=True)
    return figure


def _differences(run: FinishedRun) -> Figure | None:
    metrics = [metric for metric in _DIFFERENCES if metric != run.summary["rule"]["metric"]]
    if not run.other_arms:
        return None
    height = len(metrics) * (0.5 + 0.42 * len(run.other_arms)) + 0.6
    figure, panels = new_figure(height, len(metrics), 1)
    for axes, metric in zip(panels.flat, metrics, strict=True):
        difference_rows(axes, [(arm, run.summary["differences"][arm][metric]) for arm in run.other_arms])
        axes.set_title(f"Test {title_of(metric)}, arm minus {BASELINE}", fontsize="medium", loc="left")
    difference_legend(figure)
    return figure


def _learning_curves(run: FinishedRun) -> Figure | None:
    figure, (above, below) = new_figure(5.5, 2, 1, sharex=True)
    before = run.options["epochs"]
    backbone = run.curves(BACKBONE) if before else None
    for axes, column, title in ((above, "train_loss", "Training loss"), (below, "val_auroc", "Validation AUROC")):
        if backbone is not None:
            for _, seed in backbone.groupby("seed"):
                axes.plot(seed["epoch"], seed[column], color=GREY, linewidth=1, alpha=0.7)
        for arm, look in looks(run, marker=True):
            curves = run.curves(arm)
            if curves.empty:
                continue
            for _, seed in curves.groupby("seed"):
                axes.plot(before + seed["epoch"], seed[column], color=look["color"], linewidth=0.8, alpha=0.35)
            mean = curves.groupby("epoch")[column].mean()
            axes.plot(before + mean.index, mean, label=arm, markersize=4, **look)
        if before:
            axes.axvline(before + 0.5, color=GREY, linewidth=0.8, linestyle=":")
        axes.set_title(title, fontsize="medium", loc="left")
        axes.grid(alpha=0.3)
    below.set_xlabel("epoch; grey: backbone stage, thin: one seed, thick: mean")
    below.xaxis.get_major_locator().set_params(integer=True)
    legend(figure, above)
    return figure


def at_ceiling(run: FinishedRun) -> list[str]:
    """The scored classes whose AUROC is CEILING or more in every arm: their curves would be right angles."""
    by_arm = run.summary["per_class"]
    return [
        name
        for name in by_arm[run.arms[0]]
        if all((found := by_arm[arm][name]["auroc"]["mean"]) is not None and found >= CEILING for arm in run.arms)
    ]


def _roc(run: FinishedRun) -> Figure | None:
    def curve(positive: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return roc_curve(positive, scores)[:2]

    figure, panels = _curves_by_class(run, curve)
    if not panels:
        return None
    for axes in panels:
        axes.plot((0, 1), (0, 1), color=GREY, linewidth=0.8, linestyle=":")
    figure.supxlabel("false positive rate", fontsize="medium")
    figure.supylabel("true positive rate", fontsize="medium")
    return figure


def _precision_recall(run: FinishedRun) -> Figure | None:
    def curve(positive: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        precision, recall, _ = precision_recall_curve(positive, scores)
        return recall, precision

    figure, panels = _curves_by_class(run, curve)
    if not panels:
        return None
    figure.supxlabel("recall", fontsize="medium")
    figure.supylabel("precision", fontsize="medium")
    return figure


def _curves_by_class(
    run: FinishedRun, curve: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
) -> tuple[Figure, list[Axes]]:
    """A panel per class that has positive and negative cases on test and is not at the ceiling; a line per arm and
    seed.
    """
    labels, high = run.predictions[run.arms[0]][0].labels, at_ceiling(run)
    scored = {
        k: positive
        for k, positive in positives(run.task, labels).items()
        if 0 < positive.sum() < len(positive) and run.task.classes[k] not in high
    }
    columns = min(3, max(1, len(scored)))
    rows = math.ceil(len(scored) / columns) or 1
    side = 4.2 if columns == 1 else WIDTH / columns + 0.2
    figure, panels = new_figure(side * rows + 0.8, rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in panels.flat[len(scored) :]:
        axes.set_visible(False)
    for arm, look in looks(run):
        predictions = run.predictions[arm]
        for axes, (k, positive) in zip(panels.flat, scored.items(), strict=False):
            for seed, found in enumerate(predictions):
                label = arm if seed == 0 else None
                axes.plot(
                    *curve(positive, found.probabilities[:, k]), label=label, alpha=0.75, **look | {"linewidth": 1.1}
                )
            axes.set_title(f"{_short(run.task.classes[k], 24)}\n{positive.sum()} of {len(positive)}", fontsize="small")
            axes.set_box_aspect(1)
            axes.grid(alpha=0.3)
    if scored:
        legend(figure, panels.flat[0])
    return figure, list(panels.flat[: len(scored)])


def _reliability(run: FinishedRun) -> Figure:
    """Of a task of several classes for the class that is predicted, else for the positive cases of all labels."""
    figure, (above, below) = new_figure(6.2, 2, 1, sharex=True, height_ratios=(3, 1))
    for arm, look in looks(run, marker=True):
        pairs = [_outcomes_and_confidence(run, found) for found in run.predictions[arm]]
        outcomes, confidence = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
        observed, expected = calibration_curve(outcomes, confidence, n_bins=_BINS)
        above.plot(expected, observed, label=arm, markersize=5, **look)
        count, edges = np.histogram(confidence, bins=_BINS, range=(0, 1))
        below.stairs(count / len(confidence), edges, color=look["color"], linestyle=look["linestyle"], linewidth=1.6)
    above.plot((0, 1), (0, 1), color=GREY, linewidth=0.8, linestyle=":")
    several = run.task.kind in ("multi-class", "ordinal")
    above.set_ylabel("share that is right" if several else f"share that is {_positive(run)}")
    below.set_xlabel("probability of the predicted class" if several else f"predicted probability, {_positive(run)}")
    below.set_ylabel("share of cases" if not run.task.multi_label else "share of labels")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    legend(figure, above)
    return figure


def _positive(run: FinishedRun) -> str:
    return run.task.classes[run.task.positive] if run.task.kind == "binary" else "positive"


def _outcomes_and_confidence(run: FinishedRun, found: Predictions) -> tuple[np.ndarray, np.ndarray]:
    labels, probabilities = found.labels, found.probabilities
    if run.task.multi_label:
        return labels.ravel(), probabilities.ravel()
    if run.task.kind == "binary":
        return labels == run.task.positive, probabilities[:, run.task.positive]
    return labels == probabilities.argmax(axis=1), probabilities.max(axis=1)


def _short(name: str, longest: int) -> str:
    return name if len(name) <= longest else f"{name[: longest - 2]}…"


def _confusion(run: FinishedRun) -> Figure:
    if run.task.multi_label:
        return _label_aurocs(run)
    classes = run.task.classes
    columns = min(2, len(run.arms)) if len(classes) <= 4 else 1
    rows = math.ceil(len(run.arms) / columns)
    figure, panels = new_figure((0.6 + WIDTH / columns) * rows, rows, columns, squeeze=False)
    for axes in panels.flat[len(run.arms) :]:
        axes.set_visible(False)
    names = [_short(name, 14) for name in classes]
    for axes, arm in zip(panels.flat, run.arms, strict=False):
        counts = sum(
            confusion_matrix(found.labels, found.probabilities.argmax(axis=1), labels=range(len(classes)))
            for found in run.predictions[arm]
        )
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axes.imshow(shares, cmap="cividis", vmin=0, vmax=1)
        for (i, j), share in np.ndenumerate(shares):
            text = percent(share) if len(classes) <= 8 else f"{100 * share:.0f}"
            axes.text(j, i, text, ha="center", va="center", fontsize="small", color=text_colour(share))
        axes.set_xticks(range(len(classes)), names, rotation=40, ha="right", fontsize="small")
        axes.set_yticks(range(len(classes)), names, fontsize="small")
        arm_title(axes, arm)
    figure.supxlabel("predicted", fontsize="medium")
    figure.supylabel("true", fontsize="medium")
    return figure


def _label_aurocs(run: FinishedRun) -> Figure:
    names = list(run.task.classes)
    figure, axes = new_figure(1.0 + len(names) * (0.12 * len(run.arms) + 0.14))
    height = 0.7 / len(run.arms)
    for place, (arm, look) in enumerate(looks(run, marker=True)):
        aurocs = [run.summary["per_class"][arm][name]["auroc"] for name in names]
        means = [math.nan if figures["mean"] is None else figures["mean"] for figures in aurocs]
        spread = [figures["std"] or 0 for figures in aurocs]
        heights = [-k + 0.35 - (place + 0.5) * height for k in range(len(names))]
        axes.errorbar(means, heights, xerr=spread, fmt=look["marker"], color=look["color"], markersize=5, label=arm)
    axes.set_yticks([-k for k in range(len(names))], names)
    axes.axvline(0.5, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_xlabel("test AUROC; lines: one standard deviation")
    axes.grid(alpha=0.3)
    legend(figure, axes)
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
                text = "-" if np.isnan(value) else percent(value, 1)
                axes.text(j, i, text, ha="center", va="center", fontsize="x-small", color=text_colour(value / largest))
        axes.set_xticks(range(rate.shape[1]), rate.columns)
        axes.set_yticks(range(rate.shape[0]), rate.index, fontsize="small")
        arm_title(axes, arm, 42, loc="left")
        axes.set_xlabel("epoch of the arm")
        figure.colorbar(image, ax=axes, format=lambda share, _: percent(share, 1))
    return figure


_FIGURES: dict[str, tuple[Callable[[FinishedRun], Figure | None], str]] = {
    "primary_difference": (
        _primary_difference,
        "The difference to the baseline in the primary metric: a dot per seed, the mean with the interval over seeds "
        "and test cases that it is judged by, and below it the intervals that hold one of both. Shaded: too small to "
        "matter.",
    ),
    "differences": (_differences, "Differences to the baseline in other metrics on test, with their intervals"),
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
