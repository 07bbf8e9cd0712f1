"""What corruptions do to the figures of each arm, and the verdict on it: a trial's second endpoint.

The endpoint is the mean AUROC over all corruptions and severities. It is judged by the rule for clean figures
(verdict.py), over the same test cases: they are drawn anew once for all corruptions. Who claims both endpoints makes
twice as many comparisons, and both are judged here by the single-step rule over all of them.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..data.tasks import Predictions, Task
from ..options import BASELINE
from .intervals import LEVEL, bootstrap
from .medmnistc import ill_conditioned, relative_errors
from .metrics import METRICS, Thresholds, score, title_of
from .obuchowski_rockette import Difference, compare, error_covariances
from .verdict import Question, judge, judge_diverged

FIGURES = ("auroc", "balanced_error", "log_loss", "ece")
ENDPOINT = "mean corrupted AUROC"
ENDPOINTS = 2
_METRICS = ("auroc", "balanced_accuracy", "log_loss", "ece")

# A corruption, its severity, and per arm the probabilities of each seed's model, (N, outputs).
Cell = tuple[str, int, Mapping[str, Sequence[np.ndarray]]]


@dataclass(frozen=True)
class Clean:
    """What the trial knows of its arms on clean images.

    Attributes:
        predictions: per arm and seed, on the test set.
        thresholds: per arm and seed, chosen on clean validation images.
        metric, margin: the trial's own.
        differences: per arm its difference to the baseline in that metric.
        identical: arms whose weights equal the baseline's.
        diverged: per arm that diverged in how many seeds it did.
        asked: how many seeds there were to be.
    """

    predictions: Mapping[str, Sequence[Predictions]]
    thresholds: Mapping[str, Sequence[Thresholds | None]]
    metric: str
    margin: float
    differences: Mapping[str, Difference]
    identical: Collection[str] = ()
    diverged: Mapping[str, int] = field(default_factory=dict)
    asked: int = 0


def figures_of(
    task: Task, labels: np.ndarray, probabilities: np.ndarray, thresholds: Thresholds | None
) -> dict[str, float | None]:
    """FIGURES of one model; the balanced error is 1 - balanced accuracy."""
    found = score(task, labels, probabilities, thresholds, _METRICS)
    balanced = found.pop("balanced_accuracy")
    return {name: found[name] if name in found else None if balanced is None else 1 - balanced for name in FIGURES}


def summarise_robustness(task: Task, suite: str, clean: Clean, cells: Iterable[Cell]) -> dict[str, Any]:
    """Figures over corruptions, with differences and verdicts: what robustness/summary.json holds of them."""
    arms = list(clean.predictions)
    test = clean.predictions[arms[0]][0]

    def scored(probabilities: Mapping[str, Sequence[np.ndarray]]) -> dict[str, list[dict[str, float | None]]]:
        return {
            arm: [
                figures_of(task, test.labels, *pair)
                for pair in zip(probabilities[arm], clean.thresholds[arm], strict=True)
            ]
            for arm in arms
        }

    of_clean = scored({arm: [found.probabilities for found in seeds] for arm, seeds in clean.predictions.items()})
    found: dict[str, dict[int, dict[str, list[dict[str, float | None]]]]] = {}
    bands: dict[str, dict[int, dict[str, dict[str, float | None]]]] = {}
    resampled: dict[str, np.ndarray] = {}
    unit, units = "cases", len(test.labels)
    for name, severity, probabilities in cells:
        found.setdefault(name, {})[severity] = scored(probabilities)
        draws = bootstrap(task, test.labels, probabilities, test.patients, metrics=("auroc",))
        unit, units = draws.unit, draws.units
        resampled[name] = resampled.get(name, 0) + draws.replicates(arms)
        intervals = {arm: draws.interval(arm) for arm in arms}
        bands.setdefault(name, {})[severity] = {
            arm: dict(zip(("low", "high"), ends, strict=True)) for arm, ends in intervals.items()
        }
    resampled = {name: total / len(found[name]) for name, total in resampled.items()}
    by_corruption = {name: _mean_of(list(severities.values()), arms) for name, severities in found.items()}
    overall = _mean_of(list(by_corruption.values()), arms)
    change = {
        arm: [
            {name: None if None in (bad[name], good[name]) else bad[name] - good[name] for name in FIGURES}
            for bad, good in zip(overall[arm], of_clean[arm], strict=True)
        ]
        for arm in arms
    }
    means = sum(resampled.values()) / len(resampled)
    others = [arm for arm in arms if arm != BASELINE]
    of_mean = {arm: _difference(overall, arms, arm, means) for arm in others}
    return {
        "unit": unit,
        "units": units,
        "clean": _over_seeds(of_clean),
        "corrupted": _over_seeds(overall),
        "change": _over_seeds(change),
        "by_corruption": {name: _over_seeds(figures) for name, figures in by_corruption.items()},
        "differences": {
            name: {arm: _as_plain(_difference(by_corruption[name], arms, arm, draws)) for arm in others}
            for name, draws in resampled.items()
        },
        "by_severity": {
            name: {str(severity): _over_seeds(figures) for severity, figures in severities.items()}
            for name, severities in found.items()
        },
        "auroc_intervals": {
            name: {str(severity): intervals for severity, intervals in severities.items()}
            for name, severities in bands.items()
        },
        "relative": _relative(suite, of_clean, by_corruption),
        "ill_conditioned": [name for name in ill_conditioned(suite) if name in found],
        "verdicts": _verdicts(clean, of_mean, others, unit, units),
    }


def _mean_of(parts: Sequence[Mapping[str, Sequence[dict[str, float | None]]]], arms: Sequence[str]) -> dict[str, Any]:
    """The mean of each figure over parts, per arm and seed; None where a part leaves it undefined."""

    def mean(values: list[float | None]) -> float | None:
        return None if None in values else float(np.mean(values))

    return {
        arm: [
            {name: mean([part[arm][seed][name] for part in parts]) for name in FIGURES}
            for seed in range(len(parts[0][arm]))
        ]
        for arm in arms
    }


def _over_seeds(figures: Mapping[str, Sequence[Mapping[str, float | None]]]) -> dict[str, dict[str, Any]]:
    """Per arm and figure the mean and standard deviation over seeds, and the values."""
    return {
        arm: {name: _spread([seed[name] for seed in seeds]) for name in seeds[0]} if seeds else {}
        for arm, seeds in figures.items()
    }


def _spread(values: list[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    return {
        "mean": float(np.mean(known)) if known else None,
        "std": float(np.std(known, ddof=1)) if len(known) > 1 else None,
        "values": values,
    }


def _difference(figures: Mapping[str, Any], arms: Sequence[str], arm: str, draws: np.ndarray) -> Difference:
    """An arm's mean AUROC minus the baseline's, over seeds and resamples of the cases (resamples, arms, seeds)."""
    pair = [[seed["auroc"] for seed in figures[name]] for name in (arm, BASELINE)]
    if any(None in values for values in pair):
        return Difference(None, len(pair[0]))
    chosen = draws[:, [arms.index(arm), arms.index(BASELINE)]]
    return compare(np.array(pair), error_covariances(chosen) if len(pair[0]) > 1 else None)


def _as_plain(difference: Difference) -> dict[str, Any]:
    low, high = difference.interval(LEVEL) if difference.mean is not None else (None, None)
    return {"mean": difference.mean, "low": low, "high": high, "p": difference.p}


def _relative(suite: str, clean: Mapping[str, Any], by_corruption: Mapping[str, Any]) -> dict[str, Any]:
    """Per arm BE and rBE of each corruption and their means, mean over seeds; the mean rBE is of the firm ones."""
    vague = ill_conditioned(suite)
    relative = {}
    for arm, seeds in clean.items():
        if any(seed["balanced_error"] is None for seed in seeds):
            continue
        of_seeds = [
            relative_errors(
                suite,
                seed["balanced_error"],
                {name: figures[arm][place]["balanced_error"] for name, figures in by_corruption.items()},
            )
            for place, seed in enumerate(seeds)
        ]
        errors = {name: np.mean([seed[name] for seed in of_seeds], axis=0).tolist() for name in of_seeds[0]}
        firm = [rbe for name, (_, rbe) in errors.items() if name not in vague]
        if errors:
            relative[arm] = {
                "mean_be": float(np.mean([be for be, _ in errors.values()])),
                "mean_rbe": float(np.mean(firm)) if firm else None,
                "by_corruption": {name: {"be": be, "rbe": rbe} for name, (be, rbe) in errors.items()},
            }
    return relative


def _verdicts(
    clean: Clean, of_mean: Mapping[str, Difference], others: Sequence[str], unit: str, units: int
) -> list[dict[str, Any]]:
    """Both endpoints of every arm against the baseline, by the single-step rule over all of them."""
    lost = [arm for arm in clean.diverged if arm not in (*others, BASELINE)]
    compared = ENDPOINTS * len([*others, *lost])
    clean_title = f"clean {title_of(clean.metric)}"
    endpoints = [(clean_title, clean.differences, METRICS[clean.metric].lower_is_better), (ENDPOINT, of_mean, False)]
    found = []
    for arm in [*others, *lost]:
        for title, differences, lower_is_better in endpoints:
            question = Question(arm, BASELINE, title, units, unit, lower_is_better, clean.margin, compared)
            broken = {name: clean.diverged[name] for name in (arm, BASELINE) if name in clean.diverged}
            if broken:
                verdict = judge_diverged(question, broken, clean.asked)
            else:
                verdict = judge(question, differences[arm], arm in clean.identical)
            found.append({"arm": arm, "reference": BASELINE, "endpoint": title, **asdict(verdict)})
    return found
