"""Figures over seeds, and the table that a recipe ends with."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from finetune.arms import BASELINE
from finetune.files import write_csv, write_json

Results = dict[int, dict[str, dict[str, Any]]]


def summarise(task: str, results: Results) -> dict[str, Any]:
    """The content of summary.json.

    Args:
        task: the kind of task.
        results: per seed and arm the result of that stage.
    """
    seeds = list(results)
    arms = list(results[seeds[0]])
    return {
        "task": task,
        "seeds": seeds,
        **_figures(results, arms, "kept"),
        "last": _figures(results, arms, "last"),
        "epochs": {arm: [results[seed][arm]["epoch"] for seed in seeds] for arm in arms},
        "merges": {arm: merges for arm in arms if (merges := _merges(results, arm))},
    }


def _figures(results: Results, arms: list[str], epoch: str) -> dict[str, Any]:
    """Per arm each test metric over seeds, and per other arm its difference to the baseline, seed by seed."""
    values = {
        arm: {
            metric: [result[arm][epoch]["test"][metric] for result in results.values()]
            for metric in next(iter(results.values()))[arm][epoch]["test"]
        }
        for arm in arms
    }
    return {
        "arms": {
            arm: {m: {**_mean_and_std(v), "values": v} for m, v in metrics.items()} for arm, metrics in values.items()
        },
        "differences": {
            arm: {metric: _difference(values[arm][metric], values[BASELINE][metric]) for metric in values[arm]}
            for arm in arms
            if arm != BASELINE
        },
    }


def _mean_and_std(values: list[float | None]) -> dict[str, float | None]:
    """Mean and standard deviation (n - 1) of the values that are defined."""
    defined = [value for value in values if value is not None]
    return {
        "mean": float(np.mean(defined)) if defined else None,
        "std": float(np.std(defined, ddof=1)) if len(defined) > 1 else None,
    }


def _difference(values: list[float | None], baseline: list[float | None]) -> dict[str, Any]:
    pairs = zip(values, baseline, strict=True)
    paired = [None if value is None or base is None else value - base for value, base in pairs]
    return {"mean": _mean_and_std(paired)["mean"], "low": None, "high": None, "p": None, "values": paired}


def _merges(results: Results, arm: str) -> dict[str, dict[str, int]]:
    """Pairs drawn and merged per layer, over all seeds."""
    totals: dict[str, dict[str, int]] = {}
    for result in results.values():
        for layer, counts in result[arm]["merges"].items():
            total = totals.setdefault(layer, {"drawn": 0, "merged": 0})
            for key, count in counts.items():
                total[key] += count
    return totals


def write_summary(run: Path, summary: dict[str, Any]) -> None:
    """summary.csv, a row per arm, seed and epoch scored; then summary.json, which marks the run as finished."""
    rows = []
    metrics = list(summary["arms"][BASELINE])
    for epoch, figures in (("best", summary), ("last", summary["last"])):
        for arm, scores in figures["arms"].items():
            for k, seed in enumerate(summary["seeds"]):
                rows.append([arm, seed, epoch, *(scores[metric]["values"][k] for metric in metrics)])
    write_csv(run / "summary.csv", ["arm", "seed", "epoch", *metrics], rows)
    write_json(run / "summary.json", summary)


def table(summary: dict[str, Any]) -> str:
    """The figures as text: test metrics of each arm's best and last epoch, the differences, and the merges."""
    metrics = list(summary["arms"][BASELINE])
    seeds = len(summary["seeds"])
    rows = [["arm", "epoch", *metrics]]
    for figures, name in ((summary, "best"), (summary["last"], "last")):
        for arm, scores in figures["arms"].items():
            epoch = f"best ({', '.join(map(str, summary['epochs'][arm]))})" if name == "best" else name
            rows.append([arm, epoch, *(_mean_text(scores[metric]) for metric in metrics)])
        for arm, differences in figures["differences"].items():
            cells = (_number_text(differences[metric]["mean"], "{:+.4f}") for metric in metrics)
            rows.append([f"{arm} - {BASELINE}", name, *cells])
    heading = f"Test figures over {seeds} seeds, mean ± standard deviation" if seeds > 1 else "Test figures, one seed"
    return "\n".join([heading, _aligned(rows), *(_merge_lines(arm, m) for arm, m in summary["merges"].items())])


def _mean_text(figure: dict[str, Any]) -> str:
    mean = _number_text(figure["mean"], "{:.4f}")
    return mean if figure["std"] is None else f"{mean} ± {figure['std']:.4f}"


def _number_text(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _merge_lines(arm: str, merges: dict[str, dict[str, int]]) -> str:
    rows = [["layer", "drawn", "merged", "share"]]
    for layer, count in [
        *merges.items(),
        ("all", {k: sum(c[k] for c in merges.values()) for k in ("drawn", "merged")}),
    ]:
        share = f"{count['merged'] / count['drawn']:.2%}" if count["drawn"] else "-"
        rows.append([layer, str(count["drawn"]), str(count["merged"]), share])
    return f"\nKernels merged by {arm}\n{_aligned(rows)}"


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = (
        "  ".join(
            cell.rjust(width) if k else cell.ljust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def read_summary(run: Path) -> dict[str, Any] | None:
    """The summary of a finished run, or None."""
    path = run / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
