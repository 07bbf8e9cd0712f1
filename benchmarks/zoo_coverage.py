"""Ask kernel_layers about every model of timm, built without weights, and print what it selects by family.

    python benchmarks/zoo_coverage.py                       all models; about twenty minutes on one core
    python benchmarks/zoo_coverage.py "resnet*" "vgg*"      those that match

A line per model goes to standard error as it is done, the table in Markdown to standard output at the end. The exit
code is 1 if a model raised, or left a layer out without a reason.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter, defaultdict
from typing import NamedTuple

import timm
import torch

from inmerge_optim import kernel_layers


class Outcome(NamedTuple):
    """What kernel_layers says of a model.

    Attributes:
        model: its name in timm.
        family: the module of timm that defines it.
        problem: what was raised, or which layer has no reason; empty if there is none.
        fallback: why the order of definition was taken; empty if the model was traced.
        counted: how many layers are counted.
        reasons: how many layers are left out for which reason, and how many are selected under "".
    """

    model: str
    family: str
    problem: str
    fallback: str
    counted: int
    reasons: Counter[str]


def look_at(name: str) -> Outcome:
    """Build a model on the meta device and ask for its layers."""
    family = "?"
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of models about themselves
            model = timm.create_model(name)
        family = type(model).__module__.rpartition(".")[2]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            layers = kernel_layers(model)
    except Exception as error:  # the point of the script: none may come
        return Outcome(name, family, f"{type(error).__name__}: {error}", "", 0, Counter())
    silent = [layer.name for layer in layers if not layer.selected and not layer.reason]
    fallback = [str(warning.message) for warning in caught if "can't be traced" in str(warning.message)]
    return Outcome(
        model=name,
        family=family,
        problem=f"no reason for {', '.join(silent)}" if silent else "",
        fallback="".join(fallback),
        counted=sum(layer.depth is not None for layer in layers),
        reasons=Counter(layer.reason for layer in layers),
    )


def line(outcome: Outcome) -> str:
    """Return what is told of one model."""
    if outcome.problem:
        return f"{outcome.model}: FAILED, {outcome.problem}"
    left_out = ", ".join(f"{count} {reason}" for reason, count in outcome.reasons.most_common() if reason)
    return (
        f"{outcome.model} ({outcome.family}): {'fallen back' if outcome.fallback else 'traced'}, {outcome.counted} "
        f"counted, {outcome.reasons['']} selected; {left_out or 'none left out'}"
    ) + (f" [{outcome.fallback}]" if outcome.fallback else "")


def span(numbers: list[int]) -> str:
    """Return the least and the greatest number."""
    return f"{min(numbers)}" if min(numbers) == max(numbers) else f"{min(numbers)}-{max(numbers)}"


def table(outcomes: list[Outcome]) -> list[str]:
    """Return the Markdown table by family."""
    families: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        families[outcome.family].append(outcome)
    rows = ["| family | models | traced | counted | selected | left out |", "|---|---|---|---|---|---|"]
    for family, members in sorted(families.items()):
        reasons = sum((member.reasons for member in members), Counter())
        rows.append(
            f"| {family} | {len(members)} | {sum(not (member.fallback or member.problem) for member in members)} "
            f"| {span([member.counted for member in members])} | {span([member.reasons[''] for member in members])} "
            f"| {', '.join(f'{reason} {count}' for reason, count in reasons.most_common() if reason)} |"
        )
    return rows


def main() -> int:
    """Look at the models, tell of each, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="names with wildcards; all models by default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    outcomes = []
    for name in timm.list_models(options.patterns or ""):
        outcomes.append(look_at(name))
        print(line(outcomes[-1]), file=sys.stderr, flush=True)
    failed = sum(bool(outcome.problem) for outcome in outcomes)
    fallen_back = sum(bool(outcome.fallback) for outcome in outcomes)
    none_selected = sum(not outcome.reasons[""] for outcome in outcomes)
    print(*table(outcomes), "", sep="\n")
    print(
        f"{len(outcomes)} models: {failed} failed, {fallen_back} fallen back to the order of definition, "
        f"{none_selected} with nothing selected."
    )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
