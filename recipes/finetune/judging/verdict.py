"""The one rule by which a trial says what it found, and the sentence that says it.

Equivalent is a claim about the margin; undecided is a claim about the experiment.

The outcomes, in this order:

    diverged      training broke down in some seeds; what the others show is told, and not judged
    not judged    fewer than FEWEST_SEEDS seeds, or a figure that the test set leaves undefined
    identical     the same weights in every seed
    equivalent    the interval at 1 - .10/k lies within the margin (two one-sided tests), even where it leaves 0 out
    better, worse the interval at 1 - .05/k leaves 0 out; by more than the margin where it leaves that out too
    undecided     neither

k arms that are compared share one error by Bonferroni's single step, so that each has an interval that says what its
verdict says.
"""

from dataclasses import dataclass
from typing import Literal

from ..options import MARGIN
from .formatting import number, with_bounds
from .obuchowski_rockette import Difference
from .power import ALPHA, FEWEST_SEEDS, seeds_to_decide, smallest_detectable

_MOST_SEEDS_NAMED = 1000

Outcome = Literal["diverged", "not judged", "identical", "equivalent", "better", "worse", "undecided"]


@dataclass(frozen=True)
class Question:
    """What a verdict answers.

    Attributes:
        arm, reference: their names.
        metric: its name in words, as "AUROC" or "log loss".
        lower_is_better: whether a negative difference speaks for the arm.
        margin: the smallest difference that matters, above 0.
        compared: k, how many arms share the error.
        cases: how many test cases, or patients, there are to draw from.
        unit: "cases" or "patients".
    """

    arm: str
    reference: str
    metric: str
    cases: int
    unit: str = "cases"
    lower_is_better: bool = False
    margin: float = MARGIN
    compared: int = 1

    @property
    def difference_level(self) -> float:
        """Of the interval that a difference is judged by."""
        return 1 - ALPHA / self.compared

    @property
    def equivalence_level(self) -> float:
        """Of the interval that equivalence is judged by."""
        return 1 - 2 * ALPHA / self.compared


@dataclass(frozen=True)
class Verdict:
    """An outcome, and what it rests on. Figures are None where there are none, as with one seed.

    Attributes:
        mean: arm minus reference, over seeds.
        low, high: the interval at 1 - .05/k.
        equivalence_low, equivalence_high: the interval at 1 - .10/k.
        p: two-sided, of this comparison alone.
        beyond_margin: whether a better or worse arm is so by more than the margin.
        seeds: how many it rests on.
        smallest_detectable: the smallest true difference that this trial would find four times out of five.
        seeds_needed: the seeds, with those there are, that would probably decide; None where none would, and where
            nothing is undecided.
        sentence: what was found, in words.
    """

    outcome: Outcome
    sentence: str
    margin: float
    seeds: int
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    equivalence_low: float | None = None
    equivalence_high: float | None = None
    p: float | None = None
    beyond_margin: bool = False
    smallest_detectable: float | None = None
    seeds_needed: int | None = None


def judge(question: Question, difference: Difference, identical: bool = False) -> Verdict:
    """Answer a question from the difference that was found.

    Args:
        identical: whether the arm's weights equal the reference's in every seed.
    """
    low, high = difference.interval(question.difference_level)
    equivalence_low, equivalence_high = difference.interval(question.equivalence_level)
    outcome, needed, beyond = outcome_of(question, difference, identical), None, False
    if outcome in ("better", "worse"):
        beyond = max(low, -high) > question.margin  # type: ignore[type-var]
    elif outcome == "undecided":
        needed = seeds_to_decide(difference, question.margin, question.compared)
    return Verdict(
        outcome,
        _sentence(question, difference, outcome, beyond, needed),
        question.margin,
        difference.seeds,
        difference.mean,
        low,
        high,
        equivalence_low,
        equivalence_high,
        difference.p,
        beyond,
        smallest_detectable(difference, question.compared),
        needed,
    )


def judge_diverged(
    question: Question, diverged: dict[str, int], seeds: int, difference: Difference | None = None
) -> Verdict:
    """The verdict on arms that broke down: what the surviving seeds say would flatter them.

    Args:
        diverged: in how many seeds, for the arm and the reference, where any.
        seeds: of how many.
        difference: in the seeds that both finished, if there are any.
    """
    broken = " and ".join(f"{name} diverged in {count} of {seeds} seeds" for name, count in diverged.items())
    words = f"{broken}: {question.arm} is not judged against {question.reference} on {question.metric}"
    if difference is None:
        return Verdict("diverged", f"{words}, since no seed is left that both finished", question.margin, 0)
    words += ", since the seeds that survive are no fair sample"
    mean, (low, high) = difference.mean, difference.interval(question.difference_level)
    if low is not None:
        words += f"; these alone: {_found(question, difference, question.difference_level)}"
    elif mean is not None:
        words += f"; the one that both finished: {number(mean, '{:+.4f}')}"
    return Verdict("diverged", words, question.margin, difference.seeds, mean, low, high)


def outcome_of(question: Question, difference: Difference, identical: bool = False) -> Outcome:
    """The rule itself, for seeds that all came to an end."""
    if difference.seeds < FEWEST_SEEDS or difference.mean is None:
        return "not judged"
    if identical:
        return "identical"
    low, high = difference.interval(question.equivalence_level)
    if -question.margin < low and high < question.margin:
        return "equivalent"
    low, high = difference.interval(question.difference_level)
    if low <= 0 <= high:
        return "undecided"
    return "better" if (low > 0) != question.lower_is_better else "worse"


def _sentence(question: Question, difference: Difference, outcome: Outcome, beyond: bool, needed: int | None) -> str:
    arm, reference, metric = question.arm, question.reference, question.metric
    if outcome == "not judged":
        return f"{arm} is not judged against {reference} on {metric}: {_why_not_judged(difference)}"
    if outcome == "identical":
        return f"{arm} and {reference} are identical: their weights are equal in all {difference.seeds} seeds"
    found = _found(question, difference, question.difference_level)
    if outcome == "equivalent":
        close = _found(question, difference, question.equivalence_level)
        words = f"{arm} is equivalent to {reference} within {question.margin:g} on {metric}: {close}"
        low, high = difference.interval(question.difference_level)
        return words if low <= 0 <= high else f"{words}; it is too small to matter, but not 0: {found}"
    if outcome == "undecided":
        return f"{arm} against {reference} is undecided on {metric}: {found}; {_what_would_decide(question, needed)}"
    direction = ", where lower is better" if question.lower_is_better else ""
    size = f", by more than {question.margin:g}" if beyond else ""
    doubt = "" if beyond else f"; whether by more than {question.margin:g} is open"
    return f"{arm} is {outcome} than {reference} on {metric}{direction}{size}: {found}{doubt}"


def _why_not_judged(difference: Difference) -> str:
    if difference.mean is None:
        return "it is not defined on this test set"
    seeds = "one seed" if difference.seeds == 1 else f"{difference.seeds} seeds"
    return (
        f"{number(difference.mean, '{:+.4f}')} in {seeds} says too little of how training varies; give at least "
        f"{FEWEST_SEEDS}, better 5, as in --seeds 0 1 2 3 4"
    )


def _found(question: Question, difference: Difference, level: float) -> str:
    low, high = difference.interval(level)
    figures = with_bounds(difference.mean, low, high, (0.0, question.margin, -question.margin))
    return f"{figures} ({100 * level:.4g} % interval, {difference.seeds} seeds)"


def _what_would_decide(question: Question, needed: int | None) -> str:
    if needed is None:
        return f"no number of seeds decides this on {question.cases:,} {question.unit}"
    if needed > _MOST_SEEDS_NAMED:
        return f"it would take more than {_MOST_SEEDS_NAMED:,} seeds to decide it on {question.cases:,} {question.unit}"
    return f"{needed:,} seeds would probably decide it"
