"""How far apart two arms are, for other seeds and other test cases alike: the analysis of Obuchowski and Rockette.

It is that of radiology's reader studies, where every reader reads every case in every modality: seeds are the readers,
arms the modalities, both crossed with the same test cases. A figure's error is correlated over seeds and arms because
they share the cases, and four numbers describe it (ErrorCovariances). A t test over the seeds leaves the one out that
more seeds don't lower, and rejects too often, the more seeds there are.

An arm is compared with its reference alone, not with all arms at once, so that an arm added later leaves the other
comparisons as they were, and one that varies more than others doesn't blur them.

References:
    N. A. Obuchowski, H. E. Rockette, "Hypothesis testing of diagnostic accuracy for multiple readers and multiple
    tests", Communications in Statistics: Simulation and Computation 24 (1995), 285-308.
    S. L. Hillis, "A comparison of denominator degrees of freedom methods for multiple observer ROC analysis",
    Statistics in Medicine 26 (2007), 596-619.
"""

from dataclasses import dataclass

import numpy as np
from scipy import special

_ROUNDING = 1e-12
_LARGEST_DF = 1e6  # where Student's t has long been normal

Interval = tuple[float | None, float | None]


@dataclass(frozen=True)
class ErrorCovariances:
    """How the figures of two arms move together where the test cases are drawn anew.

    Attributes:
        variance: of a figure (Obuchowski and Rockette's Var).
        cov1: of the same seed in different arms.
        cov2: of different seeds in the same arm.
        cov3: of different seeds in different arms.
    """

    variance: float
    cov1: float
    cov2: float
    cov3: float


def error_covariances(replicates: np.ndarray) -> ErrorCovariances:
    """The covariances over resamples of the test cases.

    Args:
        replicates: a figure in each resample, arm and seed, shape (resamples, 2, seeds), two seeds at least. Resamples
            that leave it undefined anywhere (NaN) are left out.
    """
    defined = replicates[np.isfinite(replicates).all(axis=(1, 2))]
    arms, seeds = replicates.shape[1:]
    covariances = np.cov(defined.reshape(len(defined), -1), rowvar=False)
    return mean_covariances(covariances.reshape(arms, seeds, arms, seeds))


def mean_covariances(covariances: np.ndarray) -> ErrorCovariances:
    """The mean of each kind in the covariances of all figures, shape (2, seeds, 2, seeds)."""
    same_arm = (covariances[0, :, 0] + covariances[1, :, 1]) / 2
    other_arm = (covariances[0, :, 1] + covariances[1, :, 0]) / 2
    apart = ~np.eye(len(same_arm), dtype=bool)
    return ErrorCovariances(
        variance=float(same_arm.diagonal().mean()),
        cov1=float(other_arm.diagonal().mean()),
        cov2=float(same_arm[apart].mean()),
        cov3=float(other_arm[apart].mean()),
    )


@dataclass(frozen=True)
class Difference:
    """An arm minus its reference, and how sure it is.

    Attributes:
        mean: over seeds; None where the figure is not defined on the test set.
        seeds: how many.
        seed_variance: the part of the variance that is divided by the number of seeds (twice the mean square of
            arms by seeds); None with one seed.
        case_variance: the part that more seeds don't lower (twice Cov2 - Cov3); None with one seed.
        standard_error: of the mean; None with one seed.
        df: Hillis' degrees of freedom, up to a million; None with one seed.
    """

    mean: float | None
    seeds: int
    seed_variance: float | None = None
    case_variance: float | None = None
    standard_error: float | None = None
    df: float | None = None

    @property
    def p(self) -> float | None:
        """Two-sided p of no difference; None where there is no spread to test with."""
        if not self.standard_error:
            return None
        return float(2 * special.stdtr(self.df, -abs(self.mean) / self.standard_error))

    def interval(self, level: float) -> Interval:
        """The t interval at that level; low = high = mean without any spread, and None with one seed."""
        if self.standard_error is None:
            return None, None
        if self.standard_error == 0:
            return self.mean, self.mean
        half = float(special.stdtrit(self.df, (1 + level) / 2)) * self.standard_error
        return self.mean - half, self.mean + half


def compare(values: np.ndarray, errors: ErrorCovariances | None) -> Difference:
    """The difference of two arms with readers (seeds) and cases random.

    Cov2 - Cov3 is estimated, and may come out below 0, where it can't be: it is set to 0 then, as in Hillis (2007).
    Where all seeds differ by the same (three times one case of accuracy), they leave no spread to judge by, and the
    analysis for fixed readers takes its place, whose spread is that of the cases alone (RJafroc's FRRC).

    Args:
        values: the figure of each arm and seed, the arm's in row 0 and the reference's in row 1, shape (2, seeds).
        errors: from the bootstrap over test cases; not needed for one seed.
    """
    differences = values[0] - values[1]
    mean, seeds = float(differences.mean()), len(differences)
    if not np.isfinite(mean):
        return Difference(None, seeds)
    if seeds == 1:
        return Difference(mean, seeds)
    shared = max(errors.cov2 - errors.cov3, 0.0)
    if np.ptp(differences) <= _ROUNDING:
        seed_variance = 2 * max(errors.variance - errors.cov1 - shared, 0.0)
        standard_error, df = precision(seed_variance, 2 * shared, seeds)[0], _LARGEST_DF
    else:
        seed_variance = float(differences.var(ddof=1))
        standard_error, df = precision(seed_variance, 2 * shared, seeds)
    if standard_error <= _ROUNDING:
        standard_error = 0.0
    return Difference(mean, seeds, seed_variance, 2 * shared, standard_error, df)


def precision(seed_variance: float, case_variance: float, seeds: float) -> tuple[float, float]:
    """Standard error of the mean difference over so many seeds, and Hillis' degrees of freedom (2007, equation 12).

    `seeds` may be infinite.
    """
    from_seeds = seed_variance / seeds
    variance = from_seeds + case_variance
    df = (seeds - 1) * (variance / from_seeds) ** 2 if from_seeds else np.inf
    return float(np.sqrt(variance)), float(min(df, _LARGEST_DF))
