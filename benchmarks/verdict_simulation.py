"""How often the verdict is wrong: simulated trials whose truth is known.

    python benchmarks/verdict_simulation.py
    python benchmarks/verdict_simulation.py --trials 100 --seeds 5 --cases 150 --bootstrap

A score is binormal, as in the simulations of Roe and Metz (Academic Radiology 4, 1997, 298-303): a shift for the
positive cases, plus effects of the case (variance 1), of arm by case (0 or 1: what an arm does to a case whatever the
seed), and of arm by seed by case (1: training noise). Arms are equal, or the second is better by exactly the margin.
Beside the verdict stands the paired t test over seeds, which says "better or worse" on the same trials.

The error covariances are DeLong's (DeLong, DeLong and Clarke-Pearson, Biometrics 44, 1988, 837-845), which for AUROC
say what the recipes' bootstrap says; --bootstrap judges the same trials by it as well.
"""

import argparse
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from finetune.judging import weighted
from finetune.judging.obuchowski_rockette import ErrorCovariances, compare, error_covariances, mean_covariances
from finetune.judging.power import ALPHA
from finetune.judging.verdict import Question, outcome_of
from finetune.options import MARGIN

AUROC = 0.85
WIDE_MARGIN = 0.05  # wide enough for equivalence to be found in small trials as well
RESAMPLES = 1000
NO_ERRORS = ErrorCovariances(0.0, 0.0, 0.0, 0.0)  # leaves the paired t test over seeds


@dataclass(frozen=True)
class Setting:
    """One cell of the simulation; half of the cases are positive."""

    seeds: int
    cases: int
    arm_by_case: float
    margin: float = MARGIN


def draw_scores(setting: Setting, difference: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Labels (cases,) and scores (2, seeds, cases) of an arm and its reference, whose true AUROCs differ by that."""
    positive = np.arange(setting.cases) < setting.cases // 2
    spread = np.sqrt(2 * (2 + setting.arm_by_case))
    shifts = spread * stats.norm.ppf([AUROC + difference, AUROC])
    scores = rng.normal(size=(2, setting.seeds, setting.cases)) + rng.normal(size=setting.cases)
    scores += np.sqrt(setting.arm_by_case) * rng.normal(size=(2, 1, setting.cases))
    return positive, scores + shifts[:, None, None] * positive


def placements(positive: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per positive case the share of negatives below it, per negative the share of positives above it, by ranks.

    Args:
        positive: bool (cases,).
        scores: (..., cases), without ties.
    """
    ranks = scores.argsort(axis=-1).argsort(axis=-1)
    of_positive, of_negative = (ranks[..., mask] for mask in (positive, ~positive))
    below = of_positive - of_positive.argsort(axis=-1).argsort(axis=-1)
    above = of_positive.shape[-1] - (of_negative - of_negative.argsort(axis=-1).argsort(axis=-1))
    return below / of_negative.shape[-1], above / of_positive.shape[-1]


def delong(positive: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, ErrorCovariances]:
    """AUROCs (2, seeds) and their error covariances by DeLong."""
    below, above = placements(positive, scores)
    arms, seeds = scores.shape[:2]
    parts = [np.cov(values.reshape(arms * seeds, -1)) / values.shape[-1] for values in (below, above)]
    return below.mean(axis=-1), mean_covariances(sum(parts).reshape(arms, seeds, arms, seeds))


def bootstrapped(positive: np.ndarray, scores: np.ndarray) -> ErrorCovariances:
    """The same from resampled cases, as the recipes have them."""
    cases, rng = len(positive), np.random.default_rng(0)
    weights = rng.multinomial(cases, np.full(cases, 1 / cases), size=RESAMPLES).T.astype(np.float32)
    found = [[weighted.auroc(positive, seed, weights) for seed in arm] for arm in scores]
    return error_covariances(np.moveaxis(found, -1, 0))


@dataclass
class Tally:
    """How many of the trials said what.

    Attributes:
        covered: the interval held the true difference.
        differs: "better" or "worse".
        excludes_zero: the interval left 0 out, whatever the margin.
        equivalent: "equivalent".
        t_test: the paired t test over seeds rejected.
    """

    trials: int = 0
    covered: int = 0
    differs: int = 0
    excludes_zero: int = 0
    equivalent: int = 0
    t_test: int = 0

    def add(self, setting: Setting, truth: float, values: np.ndarray, errors: ErrorCovariances) -> None:
        """Judge one trial."""
        question = Question("arm", "reference", "AUROC", setting.cases, margin=setting.margin)
        difference = compare(values, errors)
        low, high = difference.interval(question.difference_level)
        outcome = outcome_of(question, difference)
        self.trials += 1
        self.covered += low <= truth <= high
        self.excludes_zero += not low <= 0 <= high
        self.differs += outcome in ("better", "worse")
        self.equivalent += outcome == "equivalent"
        self.t_test += compare(values, NO_ERRORS).p < ALPHA

    def share(self, name: str) -> float:
        return getattr(self, name) / self.trials


def simulate(setting: Setting, truth: float, trials: int, seed: int = 0, bootstrap: bool = False) -> Tally:
    """Judge so many trials whose arms differ by `truth`; with the bootstrap's covariances, or DeLong's."""
    rng = np.random.default_rng([seed, setting.seeds, setting.cases, int(setting.arm_by_case), round(1e6 * truth)])
    tally = Tally()
    for _ in range(trials):
        positive, scores = draw_scores(setting, truth, rng)
        values, errors = delong(positive, scores)
        tally.add(setting, truth, values, bootstrapped(positive, scores) if bootstrap else errors)
    return tally


def main() -> None:
    """Print a row per setting: equal arms, then arms that differ by just the margin."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=4000)
    parser.add_argument("--bootstrap", action="store_true", help="covariances by the bootstrap (slow) beside DeLong's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 5, 10])
    parser.add_argument("--cases", type=int, nargs="+", default=[150, 624])
    options = parser.parse_args()
    shares = ("covered", "differs", "excludes_zero", "equivalent", "t_test")
    print("Equal arms, then arms that differ by the margin; shares of the trials in %")
    print("  ".join(f"{name:>13}" for name in ("difference", "arm by case", "cases", "seeds", "margin", *shares)))
    truths = [(0.0, MARGIN), (MARGIN, MARGIN), (WIDE_MARGIN, WIDE_MARGIN)]
    for (truth, margin), arm_by_case, cases, seeds in product(truths, (0.0, 1.0), options.cases, options.seeds):
        for bootstrap in (False, True) if options.bootstrap else (False,):
            tally = simulate(Setting(seeds, cases, arm_by_case, margin), truth, options.trials, bootstrap=bootstrap)
            cells = [truth, arm_by_case, cases, seeds, margin, *(f"{100 * tally.share(name):.1f}" for name in shares)]
            print("  ".join(f"{cell:>13}" for cell in cells), "by the bootstrap" if bootstrap else "", flush=True)


if __name__ == "__main__":
    main()
