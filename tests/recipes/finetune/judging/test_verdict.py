"""The one rule, its order, and sentences that say what their intervals say."""

from __future__ import annotations

import re

import numpy as np
import pytest
from finetune.judging.formatting import bounds, number, with_bounds
from finetune.judging.obuchowski_rockette import Difference, ErrorCovariances, compare, precision
from finetune.judging.verdict import Question, judge, judge_diverged

QUESTION = Question("inmerge", "baseline", "AUROC", 150)


def difference(mean: float, seed_variance: float, case_variance: float = 0.0, seeds: int = 5) -> Difference:
    return Difference(mean, seeds, seed_variance, case_variance, *precision(seed_variance, case_variance, seeds))


def asked(**changes: object) -> Question:
    return Question(**{**QUESTION.__dict__, **changes})


@pytest.mark.parametrize(
    ("found", "identical", "outcome", "words"),
    [
        (
            difference(0.02, 1e-4, seeds=2),
            True,
            "not judged",
            "inmerge is not judged against baseline on AUROC: +0.0200 in 2 seeds says too little of how training "
            "varies; give at least 3, better 5, as in --seeds 0 1 2 3 4",
        ),
        (Difference(0.02, 1), False, "not judged", "inmerge is not judged against baseline on AUROC: +0.0200 in one"),
        (Difference(None, 5), False, "not judged", "on AUROC: it is not defined on this test set"),
        (
            difference(0.0, 0.0),
            True,
            "identical",
            "inmerge and baseline are identical: their weights are equal in all 5 seeds",
        ),
        (
            difference(0.0002, 1e-6),
            False,
            "equivalent",
            "inmerge is equivalent to baseline within 0.005 on AUROC: +0.00020 [-0.00075, 0.00115] (90 % interval, 5 "
            "seeds)",
        ),
        (
            difference(0.002, 1e-6),
            False,
            "equivalent",
            "within 0.005 on AUROC: +0.00200 [0.00105, 0.00295] (90 % interval, 5 seeds); it is too small to matter, "
            "but not 0: +0.0020 [0.0008, 0.0032] (95 % interval, 5 seeds)",
        ),
        (
            difference(0.02, 1e-4),
            False,
            "better",
            "inmerge is better than baseline on AUROC, by more than 0.005: +0.020 [0.008, 0.032] (95 % interval, 5 "
            "seeds)",
        ),
        (
            difference(-0.015, 1e-4),
            False,
            "worse",
            "inmerge is worse than baseline on AUROC: -0.015 [-0.027, -0.003] (95 % interval, 5 seeds); whether by "
            "more than 0.005 is open",
        ),
        (
            difference(0.003, 1e-4),
            False,
            "undecided",
            "inmerge against baseline is undecided on AUROC: +0.003 [-0.009, 0.015] (95 % interval, 5 seeds); ",
        ),
        (
            difference(0.003, 1e-6, case_variance=1e-4),
            False,
            "undecided",
            "(95 % interval, 5 seeds); no number of seeds decides this on 150 cases",
        ),
    ],
)
def test_outcomes_in_their_order(found: Difference, identical: bool, outcome: str, words: str) -> None:
    verdict = judge(QUESTION, found, identical)
    assert verdict.outcome == outcome
    assert words in verdict.sentence


def test_undecided_names_the_seeds_that_would_decide() -> None:
    verdict = judge(QUESTION, difference(0.003, 1e-4))
    assert verdict.seeds_needed > 5
    assert f"{verdict.seeds_needed} seeds would probably decide it" in verdict.sentence
    slow = judge(QUESTION, difference(0.0, 0.01, seeds=100))
    assert "it would take more than 1,000 seeds to decide it on 150 cases" in slow.sentence


def test_lower_is_better_for_losses() -> None:
    question = asked(metric="log loss", lower_is_better=True, margin=0.01)
    for mean, outcome in ((-0.02, "better"), (0.02, "worse")):
        verdict = judge(question, difference(mean, 1e-6))
        assert (verdict.outcome, verdict.beyond_margin) == (outcome, True)
        assert f"{outcome} than baseline on log loss, where lower is better, by more than 0.01: " in verdict.sentence


def test_several_arms_share_one_error() -> None:
    """The levels are 1 - .05/k and 1 - .10/k, and what is shown alone may be open among three."""
    found = difference(0.015, 1e-4)
    alone, among = judge(QUESTION, found), judge(asked(compared=3), found)
    assert (alone.low, alone.high) == found.interval(0.95)
    assert (among.low, among.high) == found.interval(1 - 0.05 / 3)
    assert (among.equivalence_low, among.equivalence_high) == found.interval(1 - 0.10 / 3)
    assert (alone.outcome, among.outcome) == ("better", "undecided")
    assert "(98.33 % interval, 5 seeds)" in among.sentence
    assert alone.p == among.p, "of the comparison itself"


def test_equal_differences_are_no_certainty() -> None:
    """Three seeds that each gain one case of 150 are judged by the noise of the cases."""
    errors = ErrorCovariances(variance=0.0009, cov1=0.0008, cov2=0.0007, cov3=0.0007)
    verdict = judge(QUESTION, compare(np.array([[0.81] * 3, [0.8] * 3]), errors))
    assert verdict.outcome == "undecided"
    assert verdict.low < 0 < verdict.high


@pytest.mark.parametrize(
    ("left", "words"),
    [
        (None, ", since no seed is left that both finished"),
        (
            Difference(0.01, 1),
            ", since the seeds that survive are no fair sample; the one that both finished: +0.0100",
        ),
        (
            difference(0.02, 1e-4),
            ", since the seeds that survive are no fair sample; these alone: +0.020 [0.008, 0.032] (95 % interval, 5 "
            "seeds)",
        ),
        (Difference(None, 2), ", since the seeds that survive are no fair sample"),
    ],
)
def test_divergence_is_an_outcome(left: Difference | None, words: str) -> None:
    """What is left is told, and not judged, however large it is."""
    verdict = judge_diverged(QUESTION, {"inmerge": 2}, 7, left)
    assert verdict.outcome == "diverged"
    assert (
        verdict.sentence == f"inmerge diverged in 2 of 7 seeds: inmerge is not judged against baseline on AUROC{words}"
    )
    assert verdict.seeds == (left.seeds if left else 0)


@pytest.mark.parametrize(
    ("figures", "text"),
    [
        ((0.01234, 0.0012, 0.0235), "+0.012 [0.001, 0.024]"),
        ((0.1234, 0.1, 0.15), "+0.123 [0.100, 0.150]"),
        ((-0.00001, -0.01, 0.01), "0.000 [-0.010, 0.010]"),
        ((0.0, 0.0, 0.0), "0.0000 [0.0000, 0.0000]"),
        ((12.3, -4.0, 28.6), "+12 [-4, 29]"),
        ((0.012, 0.0004, 0.0236), "+0.0120 [0.0004, 0.0236]"),  # 0.000 would show 0 inside
    ],
)
def test_two_digits_of_the_half_width_and_no_signed_zero(figures: tuple[float, float, float], text: str) -> None:
    assert with_bounds(*figures) == text
    assert bounds(*figures[1:]) == text.partition(" ")[2]


def test_a_number_that_rounds_to_0_has_no_sign() -> None:
    assert [number(value, "{:+.2f}") for value in (-0.004, 0.004, -0.006, 0.1)] == ["0.00", "0.00", "-0.01", "+0.10"]


def test_no_sentence_contradicts_its_interval() -> None:
    """For many differences: what is printed lies on the sides of 0 and of the margin that the outcome names."""
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(600):
        spread = 10 ** rng.uniform(-8, -3)
        found = difference(rng.normal(0, 0.01), spread, rng.choice([0, spread]), int(rng.integers(3, 9)))
        question = asked(compared=int(rng.integers(1, 4)), lower_is_better=bool(rng.integers(2)))
        verdict = judge(question, found)
        seen.add((verdict.outcome, verdict.beyond_margin))
        low, high = (float(bound) for bound in re.search(r"\[(\S+), (\S+)\]", verdict.sentence).groups())
        assert "-0.0000 " not in verdict.sentence
        if verdict.outcome == "equivalent":
            assert -0.005 < low <= high < 0.005
        elif verdict.outcome == "undecided":
            assert low <= 0 <= high
        else:
            near = low if (verdict.outcome == "better") != question.lower_is_better else -high
            assert near > 0
            assert verdict.beyond_margin == (near > 0.005) == ("by more than 0.005:" in verdict.sentence)
    assert len(seen) == 6
