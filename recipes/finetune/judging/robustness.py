"""What corruptions do to the figures of each arm, and the verdict on it: a trial's second endpoint.

The endpoint is the mean AUROC over all corruptions and severities. It is judged by the rule for clean figures
(verdict.py), over the same test cases: they are drawn anew once for all corruptions. Who claims both endpoints makes
twice as many comparisons, and both are judged here by the single-step rule over all of them.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from ..data.tasks import Predictions, Task
from ..options import BASELINE
from .intervals import LEVEL, Bootstrap, bootstrap
from .medmnistc import ill_conditioned, relative_errors
from .metrics import METRICS, Chosen, score, title_of
from .obuchowski_rockette import Difference, compare, error_covariances
from .summary import over_seeds
from .verdict import Question, judge, judge_diverged

FIGURES = ("auroc", "balanced_error", "log_loss", "log_loss_scaled", "ece", "ece_scaled")
ENDPOINT = "mean corrupted AUROC"
ENDPOINTS = 2
_METRICS = tuple("balanced_accuracy" if name == "balanced_error" else name for name in FIGURES)

Scores = dict[str, float | None]
OfArms = Mapping[str, Sequence[Scores | None]]  # per seed; None where the arm diverged
# A corruption, its severity, and per arm the probabilities of each seed's model, (N, outputs), None where it diverged.
Cell = tuple[str, int, Mapping[str, Sequence[np.ndarray | None]]]


@dataclass(frozen=True)
class Clean:
    """What the trial knows of its arms on clean images.

    Attributes:
        predictions: per arm and seed, on the test set; None where the arm diverged.
        chosen: likewise, what is chosen on clean validation images.
        metric, margin: the trial's own.
        compared: the arms that are set against the baseline, whether they came to an end or not.
        differences: per arm that finished a seed which the baseline did as well, their difference in that metric.
        identical: arms whose weights equal the baseline's.
        diverged: per arm that diverged in how many seeds it did.
    """

    predictions: Mapping[str, Sequence[Predictions | None]]
    chosen: Mapping[str, Sequence[Chosen | None]]
    metric: str
    margin: float
    compared: Sequence[str]
    differences: Mapping[str, Difference]
    identical: Collection[str] = ()
    diverged: Mapping[str, int] = field(default_factory=dict)

    @property
    def test(self) -> Predictions:
        """Any of them: all are on the same cases."""
        return next(found for seeds in self.predictions.values() for found in seeds if found is not None)


def figures_of(
    task: Task, labels: np.ndarray, probabilities: np.ndarray | None, chosen: Chosen | None
) -> Scores | None:
    """FIGURES of one model, where there is one; the balanced error is 1 - balanced accuracy."""
    if probabilities is None:
        return None
    found = score(task, labels, probabilities, chosen, _METRICS)
    balanced = found.pop("balanced_accuracy")
    return {name: found[name] if name in found else None if balanced is None else 1 - balanced for name in FIGURES}


def summarise_robustness(task: Task, suite: str, clean: Clean, cells: Iterable[Cell]) -> dict[str, Any]:
    """Figures over corruptions, with differences and verdicts: what robustness/summary.json holds of them."""
    arms, test = list(clean.predictions), clean.test

    def scored(probabilities: Mapping[str, Sequence[np.ndarray | None]]) -> OfArms:
        pairs = {arm: zip(probabilities[arm], clean.chosen[arm], strict=True) for arm in arms}
        return {arm: [figures_of(task, test.labels, *pair) for pair in of_arm] for arm, of_arm in pairs.items()}

    of_clean = scored(
        {
            arm: [None if found is None else found.probabilities for found in seeds]
            for arm, seeds in clean.predictions.items()
        }
    )
    found: dict[str, dict[int, OfArms]] = {}
    bands: dict[str, dict[int, Any]] = {}
    resampled: dict[str, np.ndarray] = {}
    of_severity: dict[int, list[Bootstrap]] = {}
    unit, units = "cases", len(test.labels)
    for name, severity, probabilities in cells:
        found.setdefault(name, {})[severity] = scored(probabilities)
        draws = _aurocs(bootstrap(task, test.labels, probabilities, test.patients, metrics=()))
        unit, units = draws.unit, draws.units
        resampled[name] = resampled.get(name, 0) + draws.figures["auroc"]
        of_severity[severity] = [*of_severity.get(severity, []), draws]
        bands.setdefault(name, {})[severity] = _intervals(draws, arms)
    resampled = {name: total / len(found[name]) for name, total in resampled.items()}
    by_corruption = {name: _mean_of(list(severities.values()), arms) for name, severities in found.items()}
    overall = _mean_of(list(by_corruption.values()), arms)
    change = {
        arm: [
            bad
            and good
            and {name: None if None in (bad[name], good[name]) else bad[name] - good[name] for name in FIGURES}
            for bad, good in zip(overall[arm], of_clean[arm], strict=True)
        ]
        for arm in arms
    }
    means = sum(resampled.values()) / len(resampled)
    return {
        "unit": unit,
        "units": units,
        "clean": _over_seeds(of_clean),
        "corrupted": _over_seeds(overall),
        "change": _over_seeds(change),
        "by_corruption": {name: _over_seeds(figures) for name, figures in by_corruption.items()},
        "differences": {
            name: {arm: _as_plain(found) for arm, found in _differences(by_corruption[name], arms, draws).items()}
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
        "auroc_intervals_of_mean": {
            str(severity): _intervals(_mean_draws(draws), arms) for severity, draws in of_severity.items()
        },
        "relative": _relative(suite, of_clean, by_corruption),
        "ill_conditioned": [name for name in ill_conditioned(suite) if name in found],
        "verdicts": _verdicts(clean, _differences(overall, arms, means), unit, units),
    }


def _aurocs(draws: Bootstrap) -> Bootstrap:
    """With the macro AUROC as the mean of what was drawn of the classes, which is half the work of scoring it too."""
    of_classes = np.ma.masked_invalid(list(draws.aurocs.values()))
    return replace(draws, figures={"auroc": of_classes.mean(axis=0).filled(np.nan)})


def _mean_draws(draws: Sequence[Bootstrap]) -> Bootstrap:
    return replace(draws[0], figures={"auroc": np.mean([found.figures["auroc"] for found in draws], axis=0)})


def _intervals(draws: Bootstrap, arms: Sequence[str]) -> dict[str, dict[str, float | None]]:
    return {arm: dict(zip(("low", "high"), draws.interval(arm), strict=True)) for arm in arms}


def _mean_of(parts: Sequence[OfArms], arms: Sequence[str]) -> OfArms:
    """The mean of each figure over parts, per arm and seed; None where a part leaves it undefined."""

    def mean(scores: Sequence[Scores | None]) -> Scores | None:
        if None in scores:
            return None
        values = {name: [of_part[name] for of_part in scores] for name in FIGURES}
        return {name: None if None in found else float(np.mean(found)) for name, found in values.items()}

    return {arm: [mean(of_seed) for of_seed in zip(*(part[arm] for part in parts), strict=True)] for arm in arms}


def _over_seeds(figures: OfArms) -> dict[str, dict[str, Any]]:
    """Per arm and figure the mean and standard deviation over seeds, and the values."""
    return {arm: over_seeds(seeds, FIGURES) for arm, seeds in figures.items()}


def _differences(figures: OfArms, arms: Sequence[str], draws: np.ndarray) -> dict[str, Difference]:
    """Per other arm its AUROC minus the baseline's in the seeds that both finished, if there are any.

    Args:
        draws: the AUROC in each resample of the cases, (resamples, arms, seeds).
    """
    found = {}
    for arm in arms:
        pairs = list(zip(figures[arm], figures.get(BASELINE, [None] * len(figures[arm])), strict=True))
        shared = [place for place, pair in enumerate(pairs) if None not in pair]
        if arm != BASELINE and shared:
            values = [[pairs[place][side]["auroc"] for place in shared] for side in (0, 1)]
            chosen = draws[:, [arms.index(arm), arms.index(BASELINE)]][:, :, shared]
            found[arm] = _difference(values, chosen)
    return found


def _difference(values: list[list[float | None]], draws: np.ndarray) -> Difference:
    seeds = len(values[0])
    if any(None in of_arm for of_arm in values):
        return Difference(None, seeds)
    return compare(np.array(values), error_covariances(draws) if seeds > 1 else None)


def _as_plain(difference: Difference) -> dict[str, Any]:
    low, high = difference.interval(LEVEL) if difference.mean is not None else (None, None)
    return {"mean": difference.mean, "low": low, "high": high, "p": difference.p}


def _relative(suite: str, clean: OfArms, by_corruption: Mapping[str, OfArms]) -> dict[str, Any]:
    """Per arm BE and rBE of each corruption and their means, mean over seeds; the mean rBE is of the firm ones."""
    vague = ill_conditioned(suite)
    relative = {}
    for arm, seeds in clean.items():
        of_seeds = [
            relative_errors(
                suite,
                seed["balanced_error"],
                {name: of_arms[arm][place]["balanced_error"] for name, of_arms in by_corruption.items()},  # type: ignore[misc]
            )
            for place, seed in enumerate(seeds)
            if seed and seed["balanced_error"] is not None
        ]
        errors = {name: np.mean([seed[name] for seed in of_seeds], axis=0).tolist() for name in (of_seeds or [{}])[0]}
        firm = [rbe for name, (_, rbe) in errors.items() if name not in vague]
        if errors:
            relative[arm] = {
                "mean_be": float(np.mean([be for be, _ in errors.values()])),
                "mean_rbe": float(np.mean(firm)) if firm else None,
                "by_corruption": {name: {"be": be, "rbe": rbe} for name, (be, rbe) in errors.items()},
            }
    return relative


def _verdicts(clean: Clean, of_mean: Mapping[str, Difference], unit: str, units: int) -> list[dict[str, Any]]:
    """Both endpoints of every arm against the baseline, by the single-step rule over all of them."""
    clean_title = f"clean {title_of(clean.metric)}"
    endpoints = [(clean_title, clean.differences, METRICS[clean.metric].lower_is_better), (ENDPOINT, of_mean, False)]
    seeds = len(next(iter(clean.predictions.values())))
    found = []
    for arm in clean.compared:
        for title, differences, lower_is_better in endpoints:
            compared = ENDPOINTS * len(clean.compared)
            question = Question(arm, BASELINE, title, units, unit, lower_is_better, clean.margin, compared)
            broken = {name: clean.diverged[name] for name in (arm, BASELINE) if name in clean.diverged}
            if broken:
                verdict = judge_diverged(question, broken, seeds, differences.get(arm))
            else:
                verdict = judge(question, differences[arm], arm in clean.identical)
            found.append({"arm": arm, "reference": BASELINE, "endpoint": title, **asdict(verdict)})
    return found
