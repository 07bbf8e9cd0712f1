"""What several trials say together: a mean over data sets, and tests that share one error.

Data sets are what is drawn at random: the question is what another one would show. Models that were tried on the same
data set share its cases and its nature, and count as one study.

References:
    R. C. Paule, J. Mandel, Journal of Research of the National Bureau of Standards 87 (1982), 377-385.
    J. Hartung, G. Knapp, Statistics in Medicine 20 (2001), 3875-3889; never narrower than without it, as in C. Roever,
    G. Knapp, T. Friede, BMC Medical Research Methodology 15 (2015), 99.
    J. P. T. Higgins, S. G. Thompson, D. J. Spiegelhalter, Journal of the Royal Statistical Society A 172 (2009),
    137-159: the prediction interval.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from statsmodels.stats.meta_analysis import combine_effects
from statsmodels.stats.multitest import multipletests

LEVEL = 0.95
FEWEST_DATASETS = 3


@dataclass(frozen=True)
class Pooled:
    """A difference over data sets.

    Attributes:
        datasets: how many.
        mean: of the random-effects model.
        low, high: its interval at LEVEL, by Hartung and Knapp.
        prediction_low, prediction_high: where the true difference on another data set would lie, at LEVEL.
        tau_squared: variance of the true differences between data sets, by Paule and Mandel.
    """

    datasets: int
    mean: float
    low: float
    high: float
    prediction_low: float
    prediction_high: float
    tau_squared: float


def pool(differences: Sequence[float], standard_errors: Sequence[float], datasets: Sequence[str]) -> Pooled:
    """Pool one arm's differences over data sets.

    The differences of the models on one data set are averaged, and so are their standard errors, as if all their
    errors were one: they meet the same cases, and it is the most that they can share.

    Args:
        differences: one per trial.
        standard_errors: theirs, above 0.
        datasets: the data set of each trial, FEWEST_DATASETS different ones at least.

    Raises:
        ValueError: with a sentence that says what the trials lack.
    """
    names = list(dict.fromkeys(datasets))
    if len(names) < FEWEST_DATASETS:
        raise ValueError(
            f"differences are pooled over {FEWEST_DATASETS} data sets at least, and there are {len(names)} "
            f"({', '.join(names)}): their spread can't be told from chance"
        )
    members = [[name == other for other in datasets] for name in names]
    effects = np.array([np.asarray(differences)[of].mean() for of in members])
    errors = np.array([np.asarray(standard_errors)[of].mean() for of in members])
    certain = [name for name, error in zip(names, errors, strict=True) if not error > 0]
    if certain:
        raise ValueError(
            f"the difference on {', '.join(certain)} has no standard error, so that it can't be weighed: leave it out"
        )
    found = combine_effects(effects, errors**2, method_re="pm", use_t=True)
    mean, tau_squared = float(found.mean_effect_re), float(found.tau2)
    error = float(max(found.sd_eff_w_re_hksj, found.sd_eff_w_re))
    half = stats.t.isf((1 - LEVEL) / 2, len(names) - 1) * error
    wide = stats.t.isf((1 - LEVEL) / 2, len(names) - 2) * np.sqrt(tau_squared + error**2)
    return Pooled(len(names), mean, mean - half, mean + half, float(mean - wide), float(mean + wide), tau_squared)


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Holm's step-down adjustment within a family that was declared beforehand.

    A member without a p (a trial that is not finished, or that leaves nothing to test with) counts as one that rejects
    nothing, so that the others' adjusted p don't change once it has one that is large.
    """
    if not p_values:
        return {}
    known = [1.0 if p is None else p for p in p_values.values()]
    adjusted = multipletests(known, method="holm")[1]
    return {
        name: None if p is None else float(value) for (name, p), value in zip(p_values.items(), adjusted, strict=True)
    }
