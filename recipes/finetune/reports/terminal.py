"""The table that a recipe ends with."""

from collections.abc import Sequence
from typing import Any

from ..judging.formatting import number, percent
from ..judging.metrics import METRICS
from ..judging.summary import left_out, metrics_of, total_merges
from ..options import BASELINE
from .verdicts import epochs_text, judged_difference, looks_text, margin_text, noise_text, power_text

_CALIBRATION = ("log_loss", "log_loss_scaled", "ece", "ece_scaled")


def table(summary: dict[str, Any]) -> str:
    """The figures as text: test metrics of each arm's best and last epoch, the differences, merges and verdicts.

    Calibration has a table of its own, of the best epoch, and what else there is is left to summary.csv, for them to
    fit a screen.
    """
    primary = summary["rule"]["metric"]
    aside = {name for name, metric in METRICS.items() if metric.aside and name != primary}
    metrics = [name for name in metrics_of(summary) if name not in aside]
    if not metrics:
        return "\n".join(["No arm came to an end in any seed.", "", *_verdict_lines(summary)])
    seeds = len(summary["seeds"])
    best = {arm: f"best ({epochs_text(summary, arm)})" for arm in summary["arms"]}
    rows = [["arm", "epoch", *metrics]]
    rows += [[arm, best.get(arm, "best"), *cells] for arm, cells in _rows(summary, metrics)]
    rows += [[arm, "last", *cells] for arm, cells in _rows(summary["last"], metrics)]
    heading = f"Test figures over {seeds} seeds, mean ± standard deviation" if seeds > 1 else "Test figures, one seed"
    if positive := summary["positive"]:
        heading += f"; AUPRC, F1 and ECE are of the positive class, {positive}"
    merges = [_merge_lines(arm, layers) for arm, layers in summary["merges"].items()]
    names = left_out(summary)
    absent = [f"Left out of the means, with one label only on test: {', '.join(names)}"] if names else []
    return "\n".join(
        [heading, aligned(rows), *absent, *_calibration_lines(summary), *merges, "", *_verdict_lines(summary)]
    )


def _rows(figures: dict[str, Any], metrics: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each arm's means, and below them the differences."""
    means = [(arm, [_mean_text(scores[metric]) for metric in metrics]) for arm, scores in figures["arms"].items()]
    return means + [
        (f"{arm} - {BASELINE}", [_number_text(differences[metric]["mean"], "{:+.4f}") for metric in metrics])
        for arm, differences in figures["differences"].items()
    ]


def _calibration_lines(summary: dict[str, Any]) -> list[str]:
    metrics = [name for name in _CALIBRATION if name in metrics_of(summary)]
    if not metrics:
        return []
    rows = [["arm", *metrics], *([arm, *cells] for arm, cells in _rows(summary, metrics))]
    heading = "Calibration at the best epoch, as predicted and scaled by a temperature fitted on validation"
    return ["", heading, aligned(rows)]


def _verdict_lines(summary: dict[str, Any]) -> list[str]:
    """Each verdict with its noise and power below it, and what they were judged by."""
    lines = []
    for found in summary["verdicts"]:
        lines.append(found["sentence"])
        difference = judged_difference(summary, found)
        below = difference and noise_text(difference, summary["unit"]), power_text(found)
        lines += [f"  {text}" for text in below if text]
    notes = margin_text(summary), looks_text(summary)
    return [*lines, *(note for note in notes if note and lines)]


def _mean_text(figure: dict[str, Any]) -> str:
    mean = _number_text(figure["mean"], "{:.4f}")
    return mean if figure["std"] is None else f"{mean} ± {figure['std']:.4f}"


def _number_text(value: float | None, form: str) -> str:
    return "-" if value is None else number(value, form)


def _merge_lines(arm: str, merges: dict[str, dict[str, int]]) -> str:
    rows = [["layer", "drawn", "merged", "share"]]
    for layer, count in [*merges.items(), ("all", total_merges(merges))]:
        share = percent(count["merged"] / count["drawn"], 2) if count["drawn"] else "-"
        rows.append([layer, str(count["drawn"]), str(count["merged"]), share])
    return f"\nKernels merged by {arm}\n{aligned(rows)}"


def aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = (
        "  ".join(
            cell.rjust(width) if k else cell.ljust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
