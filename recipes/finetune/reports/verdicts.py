"""What the terminal and the reports say about the verdicts of a summary."""

from pathlib import Path
from typing import Any

from ..judging.formatting import bounds, epoch_text, number, with_bounds
from ..judging.metrics import title_of
from ..options import BASELINE
from ..runs.finished import FinishedRun

RULE = (
    "Equivalent is a claim about the margin; undecided is a claim about the experiment. An arm is equivalent where the "
    "interval at 1 - .10/k lies within the margin, for k arms that are compared, better or worse where the one at "
    "1 - .05/k leaves 0 out, and undecided otherwise. Both intervals are over seeds and test cases."
)


def judged_difference(summary: dict[str, Any], verdict: dict[str, Any]) -> dict[str, Any] | None:
    """The difference that a verdict is about; None where there is no seed that both arms finished."""
    arm, reference = verdict["arm"], verdict["reference"]
    kind, name = ("differences", arm) if reference == BASELINE else ("contrasts", f"{arm} - {reference}")
    return summary[kind][name][verdict["metric"]] if name in summary[kind] else None


def epochs_text(summary: dict[str, Any], arm: str) -> str:
    """The epochs that an arm kept, a seed after the other; a dash where it diverged."""
    return ", ".join("-" if epoch is None else epoch_text(epoch) for epoch in summary["epochs"][arm])


def noise_text(difference: dict[str, Any], unit: str) -> str | None:
    """Where the noise in a difference comes from, as far as it is known."""
    parts = [
        f"{name} {bounds(difference[f'{kind}_low'], difference[f'{kind}_high'])}"
        for kind, name in (("t", "over seeds alone"), ("bootstrap", f"over {unit} alone"))
        if difference[f"{kind}_low"] is not None
    ]
    return f"where the noise comes from: {', '.join(parts)}" if parts else None


def power_text(verdict: dict[str, Any]) -> str | None:
    """The smallest difference that the trial could have seen."""
    size = verdict["smallest_detectable"]
    return size and f"this trial finds a true difference of {number(size, '{:.2g}')} four times out of five"


def margin_text(summary: dict[str, Any]) -> str:
    """The margin, and whether anyone chose it."""
    rule = summary["rule"]
    margin = f"The margin is {rule['margin']:g} {title_of(rule['metric'])}, fixed before the run"
    return f"{margin}." if rule["margin_chosen"] else f"{margin} by default and not chosen for these data (--margin)."


def looks_text(summary: dict[str, Any]) -> str | None:
    """A word on seeds and arms that were added after a look, where there is something to say."""
    seeds, planned, looks = len(summary["seeds"]), summary["rule"]["planned_seeds"], summary["looks"]
    if planned is not None:
        if seeds < planned:
            return (
                f"Interim: {seeds} of the {planned} seeds planned at the start. Judge when all of them have been run."
            )
        return f"All of the {planned} seeds that were planned at the start have been run."
    if looks < 2:
        return None
    return (
        f"This run was looked at {looks} times, while seeds or arms were added to it. Whoever stops at the first p "
        "below .05 over 3 to 10 looks is wrong in 17 % of cases; --planned-seeds, set at the start, says when to judge."
    )


def plain_sentence(found: dict[str, Any]) -> str:
    """A verdict for whoever reads one sentence."""
    arm, reference, metric, margin = found["arm"], found["reference"], title_of(found["metric"]), found["margin"]
    subject = "Merging" if arm == "inmerge" else arm
    against = "" if reference == BASELINE else f" against {reference}"
    outcome = found["outcome"]
    if outcome == "diverged":
        return f"{subject} can't be judged{against}: training broke down in some seeds."
    if outcome == "not judged":
        return f"{subject} is not judged{against}: {found['sentence'].partition(': ')[2]}."
    if outcome == "identical":
        return f"{subject} changed nothing{against}: the weights are the same in every seed."
    apart = (0.0, margin, -margin)
    close = with_bounds(found["mean"], found["equivalence_low"], found["equivalence_high"], apart)
    moved = with_bounds(found["mean"], found["low"], found["high"], apart)
    if outcome == "equivalent":
        return (
            f"{subject} made no difference that matters{against}: it moved test {metric} by {close}, within the margin "
            f"of {margin:g}."
        )
    if outcome == "undecided":
        needed = found["seeds_needed"]
        seeds = f"; about {needed:,} seeds would decide it" if needed else "; more seeds would not decide it"
        return (
            f"Whether {'merging' if arm == 'inmerge' else arm} helps{against} is undecided: it moved test {metric} by "
            f"{moved}, which may be nothing or may matter{seeds}."
        )
    size = f"more than the margin of {margin:g}" if found["beyond_margin"] else "by how much is open"
    verb = "helped" if outcome == "better" else "did harm"
    return f"{subject} {verb}{against}: it moved test {metric} by {moved}, {size}."


def origin_text(run: FinishedRun) -> str:
    """The weights that a run began with, by their exact tag where it is known."""
    options, found = run.options, run.versions.get("model") or {}
    if options["checkpoint"]:
        return f"weights from {Path(options['checkpoint']).name}"
    if not options["pretrained"]:
        return "random weights"
    where = f" ({found['weights']})" if found.get("weights") else ""
    return f"timm's pretrained weights {found['name']}{where}" if found.get("name") else "timm's pretrained weights"
