"""Where the noise in a difference between two arms comes from: the seeds, or the cases of the test set.

Training again with another seed moves a figure (training noise, given this test set): the paired t interval over seeds.
Another test set from the same source would move it as well (test-set noise, given these models): the bootstrap
interval. Neither holds the other; what holds both is in obuchowski_rockette.py, and it is what a verdict rests on.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy import stats

from ..data.tasks import Task
from .metrics import RESAMPLED, Chosen, Scored, positives, resample, resample_aurocs
from .obuchowski_rockette import Interval

LEVEL = 0.95
RESAMPLES = 2000
_CHUNK_VALUES = 1 << 21
_MOST_DRAWS = 50  # for each resample that is wanted
_ROUNDING = 1e-12


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


@dataclass(frozen=True)
class Bootstrap:
    """The test set drawn anew RESAMPLES times, the same draws for every arm and seed, so that differences are paired.

    Attributes:
        unit: what is drawn with replacement, "cases" or "patients" (all images of a patient go together).
        units: how many of them the test set has.
        arms: in the order of the replicates.
        finished: which seeds each arm came to an end in, bool (arms, seeds).
        figures: per metric its value in each resample, (RESAMPLES, arms, seeds); NaN where the resample leaves it
            undefined, and for seeds that are not finished.
        aurocs: per scored class its AUROC, likewise.
    """

    unit: str
    units: int
    arms: tuple[str, ...]
    finished: np.ndarray
    figures: dict[str, np.ndarray]
    aurocs: dict[str, np.ndarray]

    def replicates(self, arms: Sequence[str], name: str | None = None, metric: str = "auroc") -> np.ndarray:
        """A metric of these arms, or the AUROC of the class `name`, in the seeds that all of them finished.

        Returns:
            (RESAMPLES, arms, seeds).
        """
        values = self.figures[metric] if name is None else self.aurocs[name]
        places = [self.arms.index(arm) for arm in arms]
        return values[:, places][:, :, self.finished[places].all(axis=0)]

    def interval(
        self, arm: str, reference: str | None = None, name: str | None = None, metric: str = "auroc"
    ) -> Interval:
        """Percentile interval at LEVEL of an arm's figure, mean over seeds, or of its difference to a reference arm.

        None where no resample defines it, and without a seed. `name` is a class, whose AUROC is meant then.
        """
        arms = [arm] if reference is None else [arm, reference]
        replicates = self.replicates(arms, name, metric)
        if not replicates.shape[2]:
            return None, None
        means = replicates.mean(axis=2)
        values = means[:, 0] if reference is None else means[:, 0] - means[:, 1]
        values = values[np.isfinite(values)]
        if not len(values):
            return None, None
        low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)


def bootstrap(
    task: Task,
    labels: np.ndarray,
    probabilities: Mapping[str, Sequence[np.ndarray | None]],
    patients: Sequence[str] | None = None,
    seed: int = 0,
    chosen: Mapping[str, Sequence[Chosen | None]] | None = None,
    metrics: Sequence[str] = RESAMPLED,
) -> Bootstrap:
    """Resample the test set.

    Args:
        labels: class indices (N,), or 0 and 1 of shape (N, labels).
        probabilities: per arm and seed, shape (N, outputs); None where the arm diverged.
        patients: whose image each case is; then patients are drawn, since images of one patient resemble each other.
        seed: of the draws, which otherwise depend on the size of the test set alone.
        chosen: per arm and seed, on validation, which is not drawn anew; None where the arm diverged.
        metrics: what is scored, of RESAMPLED; the AUROC of each class is in any case.

    A resample without positive or without negative cases of a class that the test set has both of is drawn anew, so
    that all macro means are over the same classes.
    """
    unit_of = units_of(len(labels), patients)
    units = int(unit_of.max()) + 1
    seeds = len(next(iter(probabilities.values())))
    shape = (RESAMPLES, len(probabilities), seeds)
    finished = np.array([[found is not None for found in of_arm] for of_arm in probabilities.values()])
    figures = {metric: np.full(shape, np.nan) for metric in metrics}
    aurocs = {task.classes[k]: np.full(shape, np.nan) for k in positives(task, labels)}
    start = 0
    for weights in resamples(unit_of, both_of(positives(task, labels).values()), seed):
        end = start + weights.shape[1]
        for (i, arm), j in product(enumerate(probabilities), range(seeds)):
            if not finished[i, j]:
                continue
            scored = Scored(task, labels, probabilities[arm][j], chosen[arm][j] if chosen else Chosen())
            for into, found in (
                (figures, resample(scored, weights, metrics)),
                (aurocs, resample_aurocs(scored, weights)),
            ):
                for name, values in found.items():
                    into[name][start:end, i, j] = values
        start = end
    unit = "cases" if patients is None else "patients"
    return Bootstrap(unit, units, tuple(probabilities), finished, figures, aurocs)


def units_of(cases: int, patients: Sequence[str] | None) -> np.ndarray:
    """What is drawn with each case: a number per patient, or per case, int64 (N,)."""
    return np.arange(cases) if patients is None else np.unique(np.asarray(patients), return_inverse=True)[1]


def both_of(positive: Iterable[np.ndarray]) -> list[np.ndarray]:
    """The positive and the negative cases of each class that has both, as masks (N,), for `resamples`."""
    return [mask for cases in positive if cases.any() and not cases.all() for mask in (cases, ~cases)]


def resamples(unit_of: np.ndarray, needed: Sequence[np.ndarray], seed: int = 0) -> Iterator[np.ndarray]:
    """RESAMPLES draws of the units with replacement, as how often each holds each case, float32 (N, B) at a time.

    Args:
        unit_of: from units_of, (N,).
        needed: sets of cases, as masks (N,), of each of which a resample has to hold one; one that doesn't is drawn
            anew. Where that is so nearly always, resamples are taken as they come.
    """
    rng = np.random.default_rng(seed)
    units = int(unit_of.max()) + 1
    chunk = min(RESAMPLES, max(1, _CHUNK_VALUES // len(unit_of)))
    in_unit = np.array([np.bincount(unit_of, mask, units) for mask in needed]).reshape(len(needed), units)
    wanted, drawn = RESAMPLES, 0
    while wanted:
        draws = rng.multinomial(units, np.full(units, 1 / units), size=chunk)
        drawn += len(draws)
        if drawn <= _MOST_DRAWS * RESAMPLES:
            draws = draws[(draws @ in_unit.T > 0).all(axis=1)]
        draws = draws[:wanted]
        wanted -= len(draws)
        if len(draws):
            yield draws.T.astype(np.float32)[unit_of]
