"""What a trial could have seen, and how many seeds another needs: against published tables and simulated trials."""

from __future__ import annotations

import numpy as np
import pytest
from finetune.judging.obuchowski_rockette import Difference, ErrorCovariances, compare, precision
from finetune.judging.power import seeds_needed, seeds_to_decide, smallest_detectable
from finetune.judging.verdict import Question, outcome_of
from statsmodels.stats.power import TTestPower

NO_ERRORS = ErrorCovariances(0.0, 0.0, 0.0, 0.0)


def pilot(seed_variance: float, case_variance: float = 0.0, mean: float = 0.0, seeds: int = 5) -> Difference:
    return Difference(mean, seeds, seed_variance, case_variance, *precision(seed_variance, case_variance, seeds))


@pytest.mark.parametrize(("ratio", "seeds"), [(2, 5), (1.4, 7), (1, 11), (0.75, 17), (0.5, 36)])
def test_seeds_for_a_margin_in_standard_deviations(ratio: float, seeds: int) -> None:
    """The usual table for 80 % power at 5 %, to two seeds; the difference is statsmodels' paired t test."""
    found = seeds_needed(pilot(1.0), ratio)
    assert abs(found.difference - seeds) <= 2
    assert abs(found.equivalence - seeds) <= 2
    assert found.difference == np.ceil(TTestPower().solve_power(ratio, alpha=0.05, power=0.8) - 1e-9)


def test_a_trial_sees_its_smallest_detectable_difference_four_times_out_of_five() -> None:
    rng = np.random.default_rng(0)
    size = smallest_detectable(pilot(1.0))
    assert size == pytest.approx(TTestPower().solve_power(nobs=5, alpha=0.05, power=0.8), rel=1e-3)
    seen = [compare(np.stack([rng.normal(size, 1, 5), np.zeros(5)]), NO_ERRORS).p < 0.05 for _ in range(2000)]
    assert np.mean(seen) == pytest.approx(0.8, abs=0.03)


def test_more_arms_need_more_seeds_and_see_less() -> None:
    assert seeds_needed(pilot(1.0), 1.0, compared=3).difference > seeds_needed(pilot(1.0), 1.0).difference
    assert smallest_detectable(pilot(1.0), compared=3) > smallest_detectable(pilot(1.0))


def test_seeds_cant_make_up_for_cases() -> None:
    """The case variance alone is a margin wide: no number of seeds finds it, and none decides."""
    blurred = pilot(1e-6, case_variance=0.005**2)
    assert seeds_needed(blurred, 0.005).difference is None
    assert seeds_needed(blurred, 0.005).equivalence is None
    assert seeds_to_decide(blurred, 0.005) is None
    assert seeds_needed(blurred, 0.05).difference == 3


def test_seeds_to_decide_decide_as_often_as_they_say() -> None:
    """Trials that go on from their first five seeds end in a verdict about four times out of five."""
    rng = np.random.default_rng(0)
    question = Question("arm", "baseline", "AUROC", 150, margin=1.0)
    decided = []
    for _ in range(400):
        first = rng.normal(rng.uniform(-1, 1), 1, 5)
        begun = compare(np.stack([first, np.zeros(5)]), NO_ERRORS)
        if outcome_of(question, begun) != "undecided":
            continue
        seeds = seeds_to_decide(begun, 1.0)
        # Further seeds from what the first five show, at their own spread.
        mean = rng.normal(begun.mean, np.sqrt(begun.seed_variance / 5))
        more = np.concatenate([first, rng.normal(mean, np.sqrt(begun.seed_variance), seeds - 5)])
        ended = compare(np.stack([more, np.zeros(seeds)]), NO_ERRORS)
        decided.append(outcome_of(question, ended) != "undecided")
    assert len(decided) > 100
    assert np.mean(decided) == pytest.approx(0.8, abs=0.07)


def test_one_seed_plans_nothing() -> None:
    assert smallest_detectable(Difference(0.01, 1)) is None
