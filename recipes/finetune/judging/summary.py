"""Figures over seeds: what summary.json holds."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from types import MappingProxyType
from typing import Any

import numpy as np

from ..data.tasks import Predictions, Task
from ..options import BASELINE, MARGIN
from .formatting import percent
from .intervals import LEVEL, RESAMPLES, Bootstrap, paired_t
from .metrics import METRICS, RESAMPLED, choose_thresholds, per_class, score, title_of
from .obuchowski_rockette import Difference, compare, error_covariances
from .pooling import holm
from .verdict import Question, judge, judge_diverged

_SPREAD = ("seed_variance", "case_variance", "standard_error", "df")

SCHEMA = 2  # of summary.json; what another version wrote is made anew from the run folder

Results = dict[int, dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class Rule:
    """What a trial is judged by, fixed before it began.

    Attributes:
        metric: the primary one.
        margin: the smallest difference in it that matters.
        margin_chosen: whether someone chose it.
        planned_seeds: how many seeds there will be in the end, if that was said.
    """

    metric: str = "auroc"
    margin: float = MARGIN
    margin_chosen: bool = False
    planned_seeds: int | None = None


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


def summarise(
    data: str,
    task: Task,
    results: Results,
    bootstrap: Bootstrap | None = None,
    rule: Rule = Rule(),
    identical: Collection[tuple[str, str]] = (),
    looks: int = 1,
    diverged: Mapping[str, Mapping[int, int]] = MappingProxyType({}),
) -> dict[str, Any]:
    """The content of summary.json.

    Args:
        data: name of the data set.
        results: per seed and arm what scored_anew makes of the result of that stage.
        bootstrap: resamples of the test set, scored by the kept weights of every arm; without it nothing is judged.
        rule: what the verdicts rest on.
        identical: pairs of arms whose weights are equal in every seed.
        looks: how often the run has been judged, this time included.
        diverged: per arm the seeds in which it diverged, and in which epoch; their figures are not in results.
    """
    seeds = list(results)
    arms = list(results[seeds[0]])
    kept = _figures(results, arms, "kept", bootstrap)
    asked = {*seeds, *(seed for found in diverged.values() for seed in found)}
    verdicts = _verdicts(kept, bootstrap, rule, identical, diverged, asked) if bootstrap else []
    return {
        "schema": SCHEMA,
        "data": data,
        "task": task.kind,
        "classes": list(task.classes),
        "seeds": seeds,
        "rule": asdict(rule),
        "looks": looks,
        "diverged": {arm: {str(seed): epoch for seed, epoch in found.items()} for arm, found in diverged.items()},
        "unit": bootstrap.unit if bootstrap else "cases",
        **kept,
        "intervals": _intervals(seeds, bootstrap),
        "per_class": _per_class(results, arms, bootstrap),
        "verdicts": verdicts,
        "last": _figures(results, arms, "last", None),
        "epochs": {arm: [results[seed][arm]["epoch"] for seed in seeds] for arm in arms},
        "merges": {arm: merges for arm in arms if (merges := _merges(results, arm))},
    }


def _figures(results: Results, arms: list[str], epoch: str, bootstrap: Bootstrap | None) -> dict[str, Any]:
    """Per arm each test metric over seeds, and per other arm its difference to the baseline, seed by seed."""
    figures = {arm: _over_seeds([result[arm][epoch]["test"] for result in results.values()]) for arm in arms}
    for arm, metric in product(arms, RESAMPLED):
        if metric in figures[arm]:
            figures[arm][metric] |= _bootstrapped(bootstrap, arm, metric=metric)

    def differences(arm: str, reference: str) -> dict[str, Any]:
        values = {name: {m: found["values"] for m, found in figures[name].items()} for name in (arm, reference)}
        return {m: _difference(bootstrap, arm, reference, m, *(v[m] for v in values.values())) for m in values[arm]}

    return {
        "arms": figures,
        "differences": {arm: differences(arm, BASELINE) for arm in arms if arm != BASELINE},
        "contrasts": {f"{arm} - {other}": differences(arm, other) for arm, other in _contrasts(arms)},
    }


def _contrasts(arms: list[str]) -> list[tuple[str, str]]:
    """Arms that are compared with each other, as a question of its own: is it similarity that matters?"""
    return [("inmerge", "random-pairs")] if {"inmerge", "random-pairs"} <= set(arms) else []


def _intervals(seeds: list[int], bootstrap: Bootstrap | None) -> dict[str, str | None]:
    """What the intervals of a difference are, in words."""
    level = percent(LEVEL)
    cases = f"{bootstrap.units:,} test {bootstrap.unit}" if bootstrap else "the test cases"
    both = f"{level} interval over seeds and {cases} (Obuchowski and Rockette)"
    over_seeds = f"{level} paired t interval over {len(seeds)} seeds: training noise, given this test set"
    over_tests = (
        f"{level} bootstrap interval over {cases} ({RESAMPLES:,} resamples): test-set noise, given these models"
    )
    several = len(seeds) > 1
    return {
        "low, high": both if several and bootstrap else None,
        "t_low, t_high": over_seeds if several else None,
        "bootstrap_low, bootstrap_high": over_tests if bootstrap else None,
    }


def _verdicts(
    kept: dict[str, Any],
    bootstrap: Bootstrap,
    rule: Rule,
    identical: Collection[tuple[str, str]],
    diverged: Mapping[str, Mapping[int, int]],
    asked: set[int],
) -> list[dict[str, Any]]:
    """The verdict on every arm against the baseline, and on the contrasts; `p_adjusted` is put beside each p."""
    others = [arm for arm in kept["arms"] if arm != BASELINE]
    lost = [arm for arm in diverged if arm not in kept["arms"]]
    compared = [(arm, BASELINE, kept["differences"][arm]) for arm in others]
    compared += [(arm, other, kept["contrasts"][f"{arm} - {other}"]) for arm, other in _contrasts(list(kept["arms"]))]
    compared += [(arm, BASELINE, {}) for arm in lost]
    adjusted = holm({arm: kept["differences"][arm][rule.metric]["p"] for arm in others})
    found = []
    for arm, reference, differences in compared:
        difference = differences.get(rule.metric, {"p": None})
        difference["p_adjusted"] = adjusted.get(arm) if reference == BASELINE else difference["p"]
        question = Question(
            arm,
            reference,
            title_of(rule.metric),
            bootstrap.units,
            bootstrap.unit,
            METRICS[rule.metric].lower_is_better,
            rule.margin,
            len(others) + len(lost),
        )
        broken = {name: len(diverged[name]) for name in (arm, reference) if name in diverged}
        if broken:
            verdict = judge_diverged(question, broken, len(asked))
        else:
            verdict = judge(question, difference_of(difference), (arm, reference) in identical)
        found.append({"arm": arm, "reference": reference, "metric": rule.metric, **asdict(verdict)})
    return found


def difference_of(figures: dict[str, Any]) -> Difference:
    """A difference of summary.json as it was judged."""
    values = figures["values"]
    mean = None if None in values else figures["mean"]
    return Difference(mean, len(values), *(figures[name] for name in _SPREAD))


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
                auroc["difference"] = _difference(bootstrap, arm, BASELINE, "auroc", auroc["values"], reference, name)
    return figures


def _over_seeds(scores: list[dict[str, float | None]]) -> dict[str, Any]:
    """Per metric the mean, standard deviation and values of one score per seed."""
    values = {metric: [score[metric] for score in scores] for metric in scores[0]}
    return {metric: {**_mean_and_std(v), "values": v} for metric, v in values.items()}


def _bootstrapped(
    bootstrap: Bootstrap | None,
    arm: str,
    reference: str | None = None,
    metric: str = "auroc",
    name: str | None = None,
) -> dict[str, float | None]:
    scored = bootstrap is not None and metric in bootstrap.figures
    low, high = bootstrap.interval(arm, reference, name, metric) if scored else (None, None)
    return {"bootstrap_low": low, "bootstrap_high": high}


def _mean_and_std(values: list[float | None]) -> dict[str, float | None]:
    """Mean and standard deviation (n - 1) of the values that are defined."""
    defined = [value for value in values if value is not None]
    return {
        "mean": float(np.mean(defined)) if defined else None,
        "std": float(np.std(defined, ddof=1)) if len(defined) > 1 else None,
    }


def _difference(
    bootstrap: Bootstrap | None,
    arm: str,
    reference: str,
    metric: str,
    values: list[float | None],
    reference_values: list[float | None],
    name: str | None = None,
) -> dict[str, Any]:
    """A difference seed by seed, with its interval and p, and where the noise comes from.

    Without resamples of the metric (the last epoch's, medmnist's own) the noise over seeds alone is known.
    """
    pairs = list(zip(values, reference_values, strict=True))
    paired = [None if None in pair else pair[0] - pair[1] for pair in pairs]
    over_seeds = paired_t(paired)
    spread: dict[str, Any] = {"low": None, "high": None, "p": None, **dict.fromkeys(_SPREAD)}
    if bootstrap and metric in bootstrap.figures and None not in paired:
        errors = error_covariances(bootstrap.replicates((arm, reference), name, metric)) if len(paired) > 1 else None
        found = compare(np.array(pairs).T, errors)
        low, high = found.interval(LEVEL)
        spread = {"low": low, "high": high, "p": found.p, **{key: getattr(found, key) for key in _SPREAD}}
    return {
        "mean": over_seeds.mean,
        **spread,
        "values": paired,
        "t_low": over_seeds.low,
        "t_high": over_seeds.high,
        "t_p": over_seeds.p,
        **_bootstrapped(bootstrap, arm, reference, metric, name),
    }


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


def positive_class(summary: dict[str, Any]) -> str | None:
    """The class of a binary task that AUPRC, F1 and ECE are of."""
    return next(iter(summary["per_class"][BASELINE])) if summary["task"] == "binary" else None


def total_merges(layers: dict[str, dict[str, int]]) -> dict[str, int]:
    """Pairs drawn and merged in all layers of an arm."""
    return {key: sum(count[key] for count in layers.values()) for key in ("drawn", "merged")}
