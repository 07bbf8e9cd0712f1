"""Figures over seeds: what summary.json holds."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from types import MappingProxyType
from typing import Any

import numpy as np

from ..data.tasks import Predictions, Task
from ..options import BASELINE, MARGIN
from .formatting import percent
from .intervals import LEVEL, RESAMPLES, Bootstrap, paired_t
from .metrics import METRICS, RESAMPLED, choose, per_class, score, title_of
from .obuchowski_rockette import Difference, compare, error_covariances
from .pooling import holm
from .temperature import named
from .verdict import Question, judge, judge_diverged

_SPREAD = ("seed_variance", "case_variance", "standard_error", "df")

SCHEMA = 4  # of summary.json; what another version wrote is made anew from the run folder

_CONTROLS = {"random-pairs": "inmerge", "norm-matched": "inmerge", "noise-matched": "inmerge"}  # of which arm
_CONTROLS |= {"norm-matched-rounds": "validation-rounds", "noise-matched-rounds": "validation-rounds"}

Results = dict[int, dict[str, dict[str, Any]]]  # per seed the arms that came to an end in it
Scores = dict[str, float | None]
Kernels = Mapping[str, Scores]  # per layer what merging did to it


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
    chosen = choose(task, val.labels, val.probabilities)
    scores = score(task, test.labels, test.probabilities, chosen)
    recorded, last = result["kept"]["test"], result["last"]["test"]
    kept = scores | {name: value for name, value in recorded.items() if name not in METRICS}
    return {
        **result,
        "kept": {"test": kept},
        "last": {"test": {name: last.get(name) for name in kept}},
        "per_class": per_class(task, test.labels, test.probabilities, chosen),
        "temperatures": named(task, chosen.temperatures),
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
    kernels: Mapping[str, Sequence[Kernels | None]] = MappingProxyType({}),
) -> dict[str, Any]:
    """The content of summary.json.

    Args:
        data: name of the data set.
        results: per seed and arm what scored_anew makes of the result of that stage; an arm is missing where it
            diverged.
        bootstrap: resamples of the test set, scored by the kept weights of every arm; without it nothing is judged.
        rule: what the verdicts rest on.
        identical: pairs of arms whose weights are equal in every seed.
        looks: how often the run has been judged, this time included.
        diverged: per arm the seeds in which it diverged, and in which epoch.
        kernels: per merging arm and seed what merging did to the kernels of each layer; None where the arm or the
            baseline diverged.

    Values stand in the order of the seeds, None where an arm diverged. A difference is taken over the seeds that both
    arms finished, and there is none where that is no seed.
    """
    seeds = list(results)
    arms = list(dict.fromkeys(arm for of_seed in results.values() for arm in of_seed))
    kept = _figures(results, arms, "kept", bootstrap)
    verdicts = _verdicts(kept, bootstrap, rule, identical, diverged, len(seeds)) if bootstrap or diverged else []
    return {
        "schema": SCHEMA,
        "data": data,
        "task": task.kind,
        "classes": list(task.classes),
        "positive": task.classes[task.positive] if task.kind == "binary" else None,
        "seeds": seeds,
        "rule": asdict(rule),
        "looks": looks,
        "diverged": {arm: {str(seed): epoch for seed, epoch in found.items()} for arm, found in diverged.items()},
        "unit": bootstrap.unit if bootstrap else "cases",
        **kept,
        "intervals": _intervals(_seeds_in_words(len(seeds), bool(diverged)), bootstrap),
        "per_class": _per_class(results, arms, bootstrap),
        "temperatures": {
            arm: over_seeds([found and found["temperatures"] for found in _over(results, arm)]) for arm in arms
        },
        "verdicts": verdicts,
        "last": _figures(results, arms, "last", None),
        "epochs": {arm: [found and found["epoch"] for found in _over(results, arm)] for arm in arms},
        "merges": {arm: merges for arm in arms if (merges := _merges(results, arm))},
        "kernels": {arm: _over_layers(of_arm) for arm, of_arm in kernels.items()},
    }


def _figures(results: Results, arms: list[str], epoch: str, bootstrap: Bootstrap | None) -> dict[str, Any]:
    """Per arm each test metric over seeds, and per other arm its difference to the baseline, seed by seed."""
    figures = {arm: over_seeds([found and found[epoch]["test"] for found in _over(results, arm)]) for arm in arms}
    for arm, metric in product(arms, RESAMPLED):
        if metric in figures[arm]:
            figures[arm][metric] |= _bootstrapped(bootstrap, arm, metric=metric)

    def differences(arm: str, reference: str) -> dict[str, Any]:
        values = {name: {m: found["values"] for m, found in figures[name].items()} for name in (arm, reference)}
        return {m: _difference(bootstrap, arm, reference, m, *(v[m] for v in values.values())) for m in values[arm]}

    others = [arm for arm in arms if arm != BASELINE and _share_a_seed(results, arm, BASELINE)]
    contrasts = [pair for pair in _contrasts(arms) if _share_a_seed(results, *pair)]
    return {
        "arms": figures,
        "differences": {arm: differences(arm, BASELINE) for arm in others},
        "contrasts": {f"{arm} - {other}": differences(arm, other) for arm, other in contrasts},
    }


def _over(results: Results, arm: str) -> list[dict[str, Any] | None]:
    """An arm's result of each seed, None where it diverged."""
    return [of_seed.get(arm) for of_seed in results.values()]


def _share_a_seed(results: Results, *arms: str) -> bool:
    """Whether there is a seed that all of these arms finished."""
    return any(of_seed.keys() >= {*arms} for of_seed in results.values())


def _contrasts(arms: list[str]) -> list[tuple[str, str]]:
    """Merging arms and their controls of the same settings: is it similarity, or the partner at all, that matters?"""
    pairs = []
    for control in arms:
        base, at, settings = control.partition("@")
        if base in _CONTROLS and (arm := f"{_CONTROLS[base]}{at}{settings}") in arms:
            pairs.append((arm, control))
    return pairs


def _seeds_in_words(seeds: int, some_diverged: bool) -> str | None:
    """What a difference is taken over; None where that is one seed."""
    if seeds == 1:
        return None
    return "the seeds that both arms finished" if some_diverged else f"{seeds} seeds"


def _intervals(seeds: str | None, bootstrap: Bootstrap | None) -> dict[str, str | None]:
    """What the intervals of a difference are, in words; `seeds` in words too, None: there is one."""
    level = percent(LEVEL)
    cases = f"{bootstrap.units:,} test {bootstrap.unit}" if bootstrap else "the test cases"
    both = f"{level} interval over seeds and {cases} (Obuchowski and Rockette)"
    over_seeds = f"{level} paired t interval over {seeds}: training noise, given this test set"
    over_tests = (
        f"{level} bootstrap interval over {cases} ({RESAMPLES:,} resamples): test-set noise, given these models"
    )
    return {
        "low, high": both if seeds and bootstrap else None,
        "t_low, t_high": over_seeds if seeds else None,
        "bootstrap_low, bootstrap_high": over_tests if bootstrap else None,
    }


def _verdicts(
    kept: dict[str, Any],
    bootstrap: Bootstrap | None,
    rule: Rule,
    identical: Collection[tuple[str, str]],
    diverged: Mapping[str, Mapping[int, int]],
    seeds: int,
) -> list[dict[str, Any]]:
    """The verdict on every arm against the baseline, and on the contrasts; `p_adjusted` is put beside each p."""
    arms = list(dict.fromkeys([*kept["arms"], *diverged]))
    others = [arm for arm in arms if arm != BASELINE]
    compared = [(arm, BASELINE, kept["differences"].get(arm)) for arm in others]
    compared += [(arm, other, kept["contrasts"].get(f"{arm} - {other}")) for arm, other in _contrasts(arms)]
    adjusted = holm(
        {
            arm: None if {arm, BASELINE} & diverged.keys() else differences[rule.metric]["p"]
            for arm, reference, differences in compared
            if reference == BASELINE
        }
    )
    found = []
    for arm, reference, differences in compared:
        question = Question(
            arm,
            reference,
            title_of(rule.metric),
            bootstrap.units if bootstrap else 0,
            bootstrap.unit if bootstrap else "cases",
            METRICS[rule.metric].lower_is_better,
            rule.margin,
            len(others),
        )
        broken = {name: len(diverged[name]) for name in (arm, reference) if name in diverged}
        difference = differences and difference_of(differences[rule.metric])
        if broken:
            verdict = judge_diverged(question, broken, seeds, difference)
        else:
            verdict = judge(question, difference, (arm, reference) in identical)
        if differences:
            figures = differences[rule.metric]
            figures["p_adjusted"] = adjusted[arm] if reference == BASELINE else None if broken else figures["p"]
        found.append({"arm": arm, "reference": reference, "metric": rule.metric, **asdict(verdict)})
    return found


def difference_of(figures: dict[str, Any]) -> Difference:
    """A difference of summary.json as it was judged."""
    seeds = sum(value is not None for value in figures["values"])
    return Difference(figures["mean"], seeds or len(figures["values"]), *(figures[name] for name in _SPREAD))


def _per_class(results: Results, arms: list[str], bootstrap: Bootstrap | None) -> dict[str, dict[str, Any]]:
    """Per arm the figures of each class over seeds; an AUROC with its interval and its difference to the baseline's."""
    figures: dict[str, dict[str, Any]] = {}
    for arm in arms:
        found = [result and result["per_class"] for result in _over(results, arm)]
        classes = next(of_seed for of_seed in found if of_seed)
        figures[arm] = {name: over_seeds([of_seed and of_seed[name] for of_seed in found]) for name in classes}
    for arm in arms:
        for name, metrics in figures[arm].items():
            auroc = metrics["auroc"]
            auroc |= _bootstrapped(bootstrap, arm, name=name)
            if arm != BASELINE and _share_a_seed(results, arm, BASELINE):
                reference = figures[BASELINE][name]["auroc"]["values"]
                auroc["difference"] = _difference(bootstrap, arm, BASELINE, "auroc", auroc["values"], reference, name)
    return figures


def over_seeds(scores: Sequence[Scores | None], names: Iterable[str] | None = None) -> dict[str, Any]:
    """Per name, by default of the first score, the mean, standard deviation and values over seeds.

    Args:
        scores: one per seed, None where there is none.
        names: what is asked for; to be given where there may be no score at all.
    """
    asked = next(filter(None, scores)) if names is None else names
    values = {name: [score and score[name] for score in scores] for name in asked}
    return {name: {**_mean_and_std(v), "values": v} for name, v in values.items()}


def _over_layers(found: Sequence[Kernels | None]) -> dict[str, dict[str, Any]]:
    """Per layer what over_seeds gives."""
    layers: Kernels = next(filter(None, found), {})
    return {layer: over_seeds([of_seed[layer] if of_seed else None for of_seed in found]) for layer in layers}


def _bootstrapped(
    bootstrap: Bootstrap | None,
    arm: str,
    reference: str | None = None,
    metric: str = "auroc",
    name: str | None = None,
) -> Scores:
    scored = bootstrap is not None and metric in bootstrap.figures
    low, high = bootstrap.interval(arm, reference, name, metric) if scored else (None, None)
    return {"bootstrap_low": low, "bootstrap_high": high}


def _mean_and_std(values: list[float | None]) -> Scores:
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
    shared = [pair for pair in pairs if None not in pair]
    if bootstrap and metric in bootstrap.figures and shared:
        errors = error_covariances(bootstrap.replicates((arm, reference), name, metric)) if len(shared) > 1 else None
        found = compare(np.array(shared).T, errors)
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
    for result in filter(None, _over(results, arm)):
        for layer, counts in result["merges"].items():
            total = totals.setdefault(layer, {"drawn": 0, "merged": 0})
            for key, count in counts.items():
                total[key] += count
    return totals


def left_out(summary: dict[str, Any]) -> list[str]:
    """The classes that the macro means don't hold, since all or none of the test cases have them."""
    of_an_arm: dict[str, Any] = next(iter(summary["per_class"].values()), {})
    return [name for name, figures in of_an_arm.items() if figures["auroc"]["mean"] is None]


def metrics_of(summary: dict[str, Any]) -> list[str]:
    """The metrics that the arms have, none where all of them diverged in every seed."""
    return list(next(iter(summary["arms"].values()), {}))


def metric_in_words(summary: dict[str, Any]) -> str:
    """The primary metric, and of a binary task the class that is looked for."""
    words = title_of(summary["rule"]["metric"])
    return f"{words}, positive: {summary['positive']}" if summary["positive"] else words


def total_merges(layers: dict[str, dict[str, int]]) -> dict[str, int]:
    """Pairs drawn and merged in all layers of an arm."""
    return {key: sum(count[key] for count in layers.values()) for key in ("drawn", "merged")}
