"""How sure a difference between two arms is: over the seeds, and over the cases of the test set.

Two sources of chance are told apart. Training again with another seed moves a figure (training noise, given this test
set): the paired t interval over seeds. Another test set from the same source would move it as well (test-set noise,
given these models): the bootstrap interval. Neither holds the other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ..data.tasks import Task
from .metrics import positives

LEVEL = 0.95
RESAMPLES = 2000
_CHUNK_VALUES = 1 << 21
_ROUNDING = 1e-12

Interval = tuple[float | None, float | None]


@dataclass(frozen=True)
class PairedT:
    """Mean of paired differences with its t interval at LEVEL and two-sided p; None where there is none."""

    mean: float | None
    low: float | None
    high: float | None
    p: float | None


def paired_t(differences: Sequence[float | None]) -> PairedT:
    """Student's t over the differences, one per seed, that are defined.

    One seed says nothing of the spread over seeds and gets a mean alone. Differences that are all equal (but for
    rounding) leave nothing to estimate a spread from: low = high = mean, and no p.
    """
    values = np.array([value for value in differences if value is not None])
    if len(values) < 2:
        return PairedT(float(values[0]) if len(values) else None, None, None, None)
    mean = float(values.mean())
    if np.ptp(values) <= _ROUNDING:
        return PairedT(mean, mean, mean, None)
    test = stats.ttest_1samp(values, 0)
    low, high = test.confidence_interval(LEVEL)
    return PairedT(mean, float(low), float(high), float(test.pvalue))


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Holm's step-down adjustment over the p values there are; the family's error stays at the level of one test."""
    known = sorted((p, name) for name, p in p_values.items() if p is not None)
    adjusted: dict[str, float | None] = dict.fromkeys(p_values)
    largest = 0.0
    for rank, (p, name) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[name] = largest
    return adjusted


@dataclass(frozen=True)
class Bootstrap:
    """The test set drawn anew RESAMPLES times, the same draws for every arm and seed, so that differences are paired.

    Attributes:
        unit: what is drawn with replacement, "cases" or "patients" (all images of a patient go together).
        units: how many of them the test set has.
        aurocs: per arm and scored class the AUROC of each resample, mean over seeds, shape (RESAMPLES,); NaN where the
            resample leaves it undefined.
    """

    unit: str
    units: int
    aurocs: dict[str, dict[str, np.ndarray]]

    def auroc(self, arm: str, name: str | None = None) -> np.ndarray:
        """The AUROC of a class in each resample, or by default the macro mean over the classes defined in it."""
        if name is not None:
            return self.aurocs[arm][name]
        return np.ma.masked_invalid(list(self.aurocs[arm].values())).mean(axis=0).filled(np.nan)

    def interval(self, arm: str, reference: str | None = None, name: str | None = None) -> Interval:
        """Percentile interval at LEVEL of an arm's AUROC, mean over seeds, or of its difference to a reference arm.

        None where no resample defines it. `name` is a class; by default the interval is that of the macro mean.
        """
        values = self.auroc(arm, name)
        if reference is not None:
            values = values - self.auroc(reference, name)
        values = values[np.isfinite(values)]
        if not len(values):
            return None, None
        low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)


def bootstrap(
    task: Task,
    labels: np.ndarray,
    probabilities: Mapping[str, Sequence[np.ndarray]],
    patients: Sequence[str] | None = None,
    seed: int = 0,
) -> Bootstrap:
    """Resample the test set.

    Args:
        labels: class indices (N,), or 0 and 1 of shape (N, labels).
        probabilities: per arm and seed, shape (N, outputs).
        patients: whose image each case is; then patients are drawn, since images of one patient resemble each other.
        seed: of the draws, which otherwise depend on the size of the test set alone.

    A class that a resample leaves without positive or negative cases is left out of that resample's macro mean.
    """
    unit_of = np.arange(len(labels)) if patients is None else np.unique(np.asarray(patients), return_inverse=True)[1]
    units = int(unit_of.max()) + 1
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK_VALUES // len(labels))
    scored = positives(task, labels)
    aurocs: dict[str, list[np.ndarray]] = {arm: [] for arm in probabilities}
    for start in range(0, RESAMPLES, chunk):
        draws = rng.multinomial(units, np.full(units, 1 / units), size=min(chunk, RESAMPLES - start))
        weights = draws.T.astype(np.float32)[unit_of]
        for arm, seeds in probabilities.items():
            found = [
                [weighted_auroc(positive, scores[:, k], weights) for k, positive in scored.items()] for scores in seeds
            ]
            aurocs[arm].append(np.mean(found, axis=0))
    unit = "cases" if patients is None else "patients"
    names = [task.classes[k] for k in scored]
    per_class = {arm: dict(zip(names, np.concatenate(parts, axis=1), strict=True)) for arm, parts in aurocs.items()}
    return Bootstrap(unit, units, per_class)


def weighted_auroc(positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUROC under many weightings of the cases at once; scikit-learn's takes one, and sorts the scores for each.

    Args:
        positive: bool (N,).
        scores: (N,); tied scores count half.
        weights: (N, B), counts, whose sums float32 holds exactly.

    Returns:
        (B,), NaN where the positive or the negative cases have no weight.
    """
    negatives = np.flatnonzero(~positive)
    negatives = negatives[np.argsort(scores[negatives])]
    below = np.zeros((len(negatives) + 1, weights.shape[1]), dtype=np.float32)
    np.cumsum(weights[negatives], axis=0, out=below[1:])
    first, last = (np.searchsorted(scores[negatives], scores[positive], side) for side in ("left", "right"))
    won = np.einsum("nb,nb->b", weights[positive], (below[first] + below[last]) / 2, dtype=np.float64)
    pairs = weights[positive].sum(axis=0, dtype=np.float64) * below[-1]
    return np.divide(won, pairs, out=np.full(weights.shape[1], np.nan), where=pairs > 0)
