"""How many seeds another trial needs, with a finished run as its pilot."""

from ..errors import InputError
from ..judging.formatting import number
from ..judging.metrics import title_of
from ..judging.power import seeds_needed, smallest_detectable
from ..judging.summary import difference_of
from ..runs.finished import FinishedRun
from .terminal import aligned


def plan_text(run: FinishedRun, margin: float | None = None) -> str:
    """The seeds that each arm of the run needs for a margin, by default the run's own, in its primary metric."""
    rule, arms = run.summary["rule"], run.other_arms
    margin = rule["margin"] if margin is None else margin
    if not arms:
        raise InputError(f"the run in {run.folder} sets no arm against the baseline: give one that does, as its pilot")
    rows = [["arm", "to find a difference", "to find equivalence", "smallest difference found by this run"]]
    for arm in arms:
        difference = difference_of(run.summary["differences"][arm][rule["metric"]])
        if difference.standard_error is None:
            raise InputError(
                f"the run in {run.folder} shows no spread over seeds to plan by: give one of two seeds or more, whose "
                f"test set defines {title_of(rule['metric'])}"
            )
        needed = seeds_needed(difference, margin, len(arms))
        smallest = smallest_detectable(difference, len(arms))
        rows.append([arm, _seeds(needed.difference), _seeds(needed.equivalence), number(smallest, "{:.2g}")])
    pilot = f"the {len(run.seeds)} seeds of {run.name}"
    heading = f"Seeds for a margin of {margin:g} {title_of(rule['metric'])} (80 % power), from {pilot}"
    notes = "The spread of few seeds is itself uncertain: take the numbers for a guide."
    if any("none" in row for row in rows):
        notes += " none: the test set is too small for it, whatever the number of seeds."
    return f"{heading}\n{aligned(rows)}\n{notes}"


def _seeds(count: int | None) -> str:
    return "none" if count is None else f"{count:,}"
