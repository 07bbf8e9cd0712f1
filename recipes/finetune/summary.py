"""Figures over seeds, and the table that a recipe ends with."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from finetune.arms import BASELINE
from finetune.files import write_csv, write_json
from finetune.metrics import CALIBRATION
from finetune.statistics import LEVEL, RESAMPLES, Bootstrap, holm, paired_t

Results = dict[int, dict[str, dict[str, Any]]]


def summarise(task: str, results: Results, bootstrap: Bootstrap | None = None) -> dict[str, Any]:
    """The content of summary.json.

    Args:
        task: the kind of task.
        results: per seed and arm the result of that stage.
        bootstrap: resamples of the test set, scored by the kept weights of every arm.
    """
    seeds = list(results)
    arms = list(results[seeds[0]])
    kept = _figures(results, arms, "kept", bootstrap)
    compared = [(arm, BASELINE, differences["auroc"]) for arm, differences in kept["differences"].items()]
    compared += [(arm, other, kept["contrasts"][f"{arm} - {other}"]["auroc"]) for arm, other in _contrasts(arms)]
    return {
        "task": task,
        "seeds": seeds,
        **kept,
        "intervals": _intervals(seeds, bootstrap),
        "per_class": _per_class(results, arms, bootstrap),
        "verdicts": [verdict(arm, reference, difference) for arm, reference, difference in compared],
        "last": _figures(results, arms, "last", None),
        "epochs": {arm: [results[seed][arm]["epoch"] for seed in seeds] for arm in arms},
        "merges": {arm: merges for arm in arms if (merges := _merges(results, arm))},
    }


def _figures(results: Results, arms: list[str], epoch: str, bootstrap: Bootstrap | None) -> dict[str, Any]:
    """Per arm each test metric over seeds, and per other arm its difference to the baseline, seed by seed."""
    figures = {arm: _over_seeds([result[arm][epoch]["test"] for result in results.values()]) for arm in arms}
    for arm in arms:
        figures[arm]["auroc"] |= _bootstrapped(bootstrap, arm)

    def differences(arm: str, reference: str) -> dict[str, Any]:
        other = figures[reference]
        pairs = {m: _difference(found["values"], other[m]["values"]) for m, found in figures[arm].items()}
        pairs["auroc"] |= {"p_adjusted": pairs["auroc"]["p"], **_bootstrapped(bootstrap, arm, reference)}
        return pairs

    to_baseline = {arm: differences(arm, BASELINE) for arm in arms if arm != BASELINE}
    for arm, p in holm({arm: metrics["auroc"]["p"] for arm, metrics in to_baseline.items()}).items():
        to_baseline[arm]["auroc"]["p_adjusted"] = p
    return {
        "arms": figures,
        "differences": to_baseline,
        "contrasts": {f"{arm} - {other}": differences(arm, other) for arm, other in _contrasts(arms)},
    }


def _contrasts(arms: list[str]) -> list[tuple[str, str]]:
    """Arms that are compared with each other, as a question of its own: is it similarity that matters?"""
    return [("inmerge", "random-pairs")] if {"inmerge", "random-pairs"} <= set(arms) else []


def _intervals(seeds: list[int], bootstrap: Bootstrap | None) -> dict[str, str | None]:
    """What the two intervals of a difference are, in words."""
    level = f"{LEVEL:.0%}".replace("%", " %")
    over_seeds = f"{level} paired t interval over {len(seeds)} seeds: training noise, given this test set"
    over_tests = bootstrap and (
        f"{level} bootstrap interval over {bootstrap.units} test {bootstrap.unit} ({RESAMPLES} resamples): test-set "
        "noise, given these models"
    )
    return {"low, high": over_seeds if len(seeds) > 1 else None, "bootstrap_low, bootstrap_high": over_tests}


def verdict(arm: str, reference: str, difference: dict[str, Any]) -> dict[str, str]:
    """The one rule: an AUROC differs where the paired t test over seeds says so at 5 %, Holm-adjusted over the arms.

    Anything else is "no difference shown", which is not the same as equal.
    """
    mean, p = difference["mean"], difference["p_adjusted"]
    shown = p is not None and p < 1 - LEVEL
    outcome = "no difference shown" if not shown else "better" if mean > 0 else "worse"
    words = {"no difference shown": "shows no difference from", "better": "beats", "worse": "is worse than"}[outcome]
    seeds = sum(value is not None for value in difference["values"])
    if not seeds:
        figures = "not defined on this test set"
    elif seeds == 1:
        figures = f"{mean:+.4f}, one seed, which gives no interval over seeds"
    else:
        figures = f"{mean:+.4f} [{difference['low']:.4f}, {difference['high']:.4f}], {seeds} seeds"
        if p != difference["p"]:
            figures += f", Holm-adjusted p {p:.2g}"
    sentence = f"{arm} {words} {reference} on AUROC: {figures}"
    return {"arm": arm, "reference": reference, "outcome": outcome, "sentence": sentence}


def _per_class(results: Results, arms: list[str], bootstrap: Bootstrap | None) -> dict[str, dict[str, Any]]:
    """Per arm the figures of each class over seeds; an AUROC with its interval and its difference to the baseline's."""
    stages = {arm: [result[arm]["per_class"] for result in results.values()] for arm in arms}
    figures: dict[str, dict[str, Any]] = {}
    for arm, found in stages.items():
        figures[arm] = {name: _over_seeds([result[name] for result in found]) for name in found[0]}
        for name, metrics in figures[arm].items():
            auroc = metrics["auroc"]
            auroc |= _bootstrapped(bootstrap, arm, name=name)
            if arm != BASELINE:
                reference = [result[name]["auroc"] for result in stages[BASELINE]]
                difference = _difference(auroc["values"], reference)
                auroc["difference"] = difference | _bootstrapped(bootstrap, arm, BASELINE, name)
    return figures


def _over_seeds(scores: list[dict[str, float | None]]) -> dict[str, Any]:
    """Per metric the mean, standard deviation and values of one score per seed."""
    values = {metric: [score[metric] for score in scores] for metric in scores[0]}
    return {metric: {**_mean_and_std(v), "values": v} for metric, v in values.items()}


def _bootstrapped(
    bootstrap: Bootstrap | None, arm: str, reference: str | None = None, name: str | None = None
) -> dict[str, float | None]:
    low, high = bootstrap.interval(arm, reference, name) if bootstrap else (None, None)
    return {"bootstrap_low": low, "bootstrap_high": high}


def _mean_and_std(values: list[float | None]) -> dict[str, float | None]:
    """Mean and standard deviation (n - 1) of the values that are defined."""
    defined = [value for value in values if value is not None]
    return {
        "mean": float(np.mean(defined)) if defined else None,
        "std": float(np.std(defined, ddof=1)) if len(defined) > 1 else None,
    }


def _difference(values: list[float | None], reference: list[float | None]) -> dict[str, Any]:
    pairs = zip(values, reference, strict=True)
    paired = [None if value is None or other is None else value - other for value, other in pairs]
    return {**asdict(paired_t(paired)), "values": paired}


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
    """The figures as text: test metrics of each arm's best and last epoch, the differences, merges and verdicts.

    Figures of calibration are left to summary.csv, for the table to fit a screen.
    """
    metrics = [metric for metric in summary["arms"][BASELINE] if metric not in CALIBRATION]
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
    merges = [_merge_lines(arm, layers) for arm, layers in summary["merges"].items()]
    names = left_out(summary)
    absent = [f"Left out of the means, with one label only on test: {', '.join(names)}"] if names else []
    return "\n".join([heading, _aligned(rows), *absent, *merges, "", *_verdict_lines(summary)])


def left_out(summary: dict[str, Any]) -> list[str]:
    """The classes that the macro means don't hold, since all or none of the test cases have them."""
    return [name for name, figures in summary["per_class"][BASELINE].items() if figures["auroc"]["mean"] is None]


def total_merges(layers: dict[str, dict[str, int]]) -> dict[str, int]:
    """Pairs drawn and merged in all layers of an arm."""
    return {key: sum(count[key] for count in layers.values()) for key in ("drawn", "merged")}


def _verdict_lines(summary: dict[str, Any]) -> list[str]:
    """Each verdict with the test-set noise below it, and what the intervals are."""
    intervals = summary["intervals"]
    lines = []
    for found in summary["verdicts"]:
        arm, reference = found["arm"], found["reference"]
        kind, name = ("differences", arm) if reference == BASELINE else ("contrasts", f"{arm} - {reference}")
        difference = summary[kind][name]["auroc"]
        lines.append(found["sentence"])
        if difference["bootstrap_low"] is not None:
            interval = f"[{difference['bootstrap_low']:.4f}, {difference['bootstrap_high']:.4f}]"
            lines.append(f"  {intervals['bootstrap_low, bootstrap_high']} {interval}")
    if intervals["low, high"]:
        lines.append(f"After a verdict: {intervals['low, high']}")
    return lines


def _mean_text(figure: dict[str, Any]) -> str:
    mean = _number_text(figure["mean"], "{:.4f}")
    return mean if figure["std"] is None else f"{mean} ± {figure['std']:.4f}"


def _number_text(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _merge_lines(arm: str, merges: dict[str, dict[str, int]]) -> str:
    rows = [["layer", "drawn", "merged", "share"]]
    for layer, count in [*merges.items(), ("all", total_merges(merges))]:
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
