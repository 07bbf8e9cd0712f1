"""What a trial could have seen, and how many seeds another one needs.

All of it takes the two parts of a difference's variance as they were estimated, which from few seeds is itself
uncertain: a guide to planning, not a promise.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special
from statsmodels.stats.power import ttest_power

from .obuchowski_rockette import Difference, precision

POWER = 0.8
ALPHA = 0.05  # two-sided of a difference, and on either side of equivalence
FEWEST_SEEDS = 3


@dataclass(frozen=True)
class SeedsNeeded:
    """Seeds that see a margin with POWER; None where no number of them does on so many test cases.

    Attributes:
        difference: to find a difference as large as the margin.
        equivalence: to find two equal arms equivalent within the margin.
    """

    difference: int | None
    equivalence: int | None


def smallest_detectable(difference: Difference, compared: int = 1) -> float | None:
    """The smallest true difference that such a trial finds with POWER; None with one seed.

    Args:
        compared: how many arms share the error of 5 %.
    """
    if difference.standard_error is None:
        return None

    def lacking(ratio: float) -> float:
        return _power_of_difference(ratio, difference.df, compared) - POWER

    highest = _highest_ratio(difference.df, ALPHA / compared / 2)
    return difference.standard_error * float(optimize.brentq(lacking, 0, highest))


def seeds_needed(difference: Difference, margin: float, compared: int = 1) -> SeedsNeeded:
    """The seeds that a trial needs for a margin, from a pilot's variances (two seeds at least)."""

    def finds_difference(seeds: float) -> bool:
        error, df = precision(difference.seed_variance, difference.case_variance, seeds)
        return error == 0 or _power_of_difference(margin / error, df, compared) >= POWER

    def finds_equivalence(seeds: float) -> bool:
        error, df = precision(difference.seed_variance, difference.case_variance, seeds)
        return error == 0 or _power_of_equivalence(margin / error, df, compared) >= POWER

    return SeedsNeeded(_fewest(finds_difference, FEWEST_SEEDS), _fewest(finds_equivalence, FEWEST_SEEDS))


def seeds_to_decide(difference: Difference, margin: float, compared: int = 1) -> int | None:
    """The seeds, with those there are, that would probably (POWER) end in a difference or in equivalence.

    Further seeds are of the same training and meet the same test cases: given n seeds, the mean over m is spread
    around the mean there is with the seeds' variance times 1/n - 1/m. None where no number of seeds decides.
    """

    def decides(seeds: float) -> bool:
        error, df = precision(difference.seed_variance, difference.case_variance, seeds)
        moved = np.sqrt(difference.seed_variance * (1 / difference.seeds - 1 / seeds))
        apart = special.stdtrit(df, 1 - ALPHA / compared / 2) * error
        close = max(0.0, margin - special.stdtrit(df, 1 - ALPHA / compared) * error)
        # The chance of a mean outside +-apart, or inside +-close; where both overlap, more than enough.
        bounds = (np.array([-apart, -close, close, apart]) - difference.mean) / max(moved, 1e-15)
        below = special.ndtr(bounds)
        return below[0] + (below[2] - below[1]) + (1 - below[3]) >= POWER

    return _fewest(decides, difference.seeds + 1)


def _power_of_difference(ratio: float, df: float, compared: int) -> float:
    """Of the two-sided t test to find a true difference of so many standard errors, on its own side of 0."""
    return _one_sided_power(ratio, df, ALPHA / compared / 2)


def _power_of_equivalence(ratio: float, df: float, compared: int) -> float:
    """Of two one-sided t tests (TOST), where the arms are equal and the margin is so many standard errors.

    Both must reject, and each fails as often as the other (K. F. Phillips, Journal of Pharmacokinetics and
    Biopharmaceutics 18, 1990, 137-144).
    """
    return max(0.0, 2 * _one_sided_power(ratio, df, ALPHA / compared) - 1)


def _one_sided_power(ratio: float, df: float, alpha: float) -> float:
    """Statsmodels' power, up to a ratio where it is practically 1; the noncentral t is not computed far beyond."""
    highest = _highest_ratio(df, alpha)
    return float(ttest_power(min(ratio, highest), nobs=1, alpha=alpha, df=df, alternative="larger"))


def _highest_ratio(df: float, alpha: float) -> float:
    return 2 * float(special.stdtrit(df, 1 - alpha)) + 10


def _fewest(enough: Callable[[float], bool], least: int) -> int | None:
    """The smallest number of seeds from `least` on that is enough; None where none is."""
    if not enough(np.inf):
        return None
    below, seeds = least - 1, least
    while not enough(seeds):
        below, seeds = seeds, 2 * seeds
    while seeds - below > 1:
        middle = (below + seeds) // 2
        below, seeds = (below, middle) if enough(middle) else (middle, seeds)
    return seeds
