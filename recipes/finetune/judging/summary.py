"""Figures over seeds: what summary.json holds."""

from dataclasses import asdict
from typing import Any

import numpy as np

from ..data.tasks import Predictions, Task
from ..options import BASELINE
from .intervals import LEVEL, RESAMPLES, Bootstrap, holm, paired_t
from .metrics import METRICS, choose_thresholds, per_class, score

SCHEMA = 2  # of summary.json; what another version wrote is made anew from the run folder

Results = dict[int, dict[str, dict[str, Any]]]


def scored_anew(task: Task, result: dict[str, Any], val: Predictions, test: Predictions) -> dict[str, Any]:
    """A stage's result with the figures that the metrics give today, from its predictions at the kept epoch.

    The last epoch has left no predictions: it keeps the figures of its time. So do a data set's own figures.

    Args:
        result: the content of result.json.
    """
    thresholds = choose_thresholds(task, val.labels, val.probabilities)
    scores = score(task, test.labels, test.probabilities, thresholds)
    recorded, last = result["kept"]["test"], result["last"]["test"]
    kept = scores | {name: value for name, value in recorded.items() if name not in METRICS}
    return {
        **result,
        "kept": {"test": kept},
        "last": {"test": {name: last.get(name) for name in kept}},
        "per_class": per_class(task, test.labels, test.probabilities, thresholds),
    }


def summarise(data: str, task: Task, results: Results, bootstrap: Bootstrap | None = None) -> dict[str, Any]:
    """The content of summary.json.

    Args:
        data: name of the data set.
        results: per seed and arm what scored_anew makes of the result of that stage.
        bootstrap: resamples of the test set, scored by the kept weights of every arm.
    """
    seeds = list(results)
    arms = list(results[seeds[0]])
    kept = _figures(results, arms, "kept", bootstrap)
    compared = [(arm, BASELINE, differences["auroc"]) for arm, differences in kept["differences"].items()]
    compared += [(arm, other, kept["contrasts"][f"{arm} - {other}"]["auroc"]) for arm, other in _contrasts(arms)]
    return {
        "schema": SCHEMA,
        "data": data,
        "task": task.kind,
        "classes": list(task.classes),
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


def left_out(summary: dict[str, Any]) -> list[str]:
    """The classes that the macro means don't hold, since all or none of the test cases have them."""
    return [name for name, figures in summary["per_class"][BASELINE].items() if figures["auroc"]["mean"] is None]


def total_merges(layers: dict[str, dict[str, int]]) -> dict[str, int]:
    """Pairs drawn and merged in all layers of an arm."""
    return {key: sum(count[key] for count in layers.values()) for key in ("drawn", "merged")}
