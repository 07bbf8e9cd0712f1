"""The points of a sweep over merge settings, as arms of one trial."""

from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from itertools import product
from typing import Any

from inmerge_optim.selection import check_skip_layers
from inmerge_optim.settings import check_setting

from ..errors import InputError, check_names, near_names
from ..options import BASELINE, Options
from .arms import COMPACT, ROUNDS, SETTINGS, WAYS, arm_name, setting_of, smaller_name

THRESHOLD = "similarity_threshold"
DISSIMILAR = "dissimilar"  # a value of the threshold: the control that merges the pairs that are not above it
_MOST_POINTS = 1000
_HOW = "give such as --sweep skip_layers=0,5,10,15 --sweep merge_weight=0.5:0.95:0.15"

Sweep = tuple[str, list[Any]]


def read_sweeps(texts: Sequence[str]) -> list[Sweep]:
    """Settings with the values that each is to have, from texts as "skip_layers=0,5,10" or "merge_prob=0.1:0.5:0.2"."""
    if not texts:
        raise InputError(f"there is nothing to sweep over: {_HOW}")
    sweeps: list[Sweep] = []
    for text in texts:
        name, _, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if name not in SETTINGS:
            hint = near_names(name, SETTINGS) or f": choose from {', '.join(SETTINGS)}"
            raise InputError(f"--sweep {text} names the unknown setting {name!r}{hint}")
        if name in dict(sweeps):
            raise InputError(f"--sweep names {name} twice: put all of its values into one")
        found = [value for word in values.split(",") for value in _values(text, name, word.strip())]
        if len(set(map(str, found))) < len(found):
            raise InputError(f"--sweep {text} names a value twice: a repeated run adds no evidence")
        sweeps.append((name, found))
    return sweeps


def _values(text: str, name: str, word: str) -> Iterator[Any]:
    """The values of one word between commas: one, or those of a range with both of its ends."""
    if not word:
        raise InputError(f"--sweep {text} leaves a value empty: {_HOW}")
    if name == THRESHOLD and word == DISSIMILAR:
        yield word
        return
    words = [word] if ":" not in word else _range(text, word)
    for one in words:
        try:
            value = setting_of(name, one)
            if name == "skip_layers":
                check_skip_layers(value)
            else:
                check_setting(name, value)
        except ValueError as error:
            raise InputError(f"--sweep {text} can't be used ({error}): {_HOW}") from error
        yield value


def _range(text: str, word: str) -> list[str]:
    """Decimal, so that 0.5:0.95:0.15 has 0.8 and not the number beside it."""
    try:
        first, last, step = map(Decimal, word.split(":"))
        count = int((last - first) / step) + 1
    except (ValueError, ArithmeticError, InvalidOperation):
        count = 0
    if not 0 < count <= _MOST_POINTS:
        raise InputError(f"--sweep {text} has the range {word}: expected first:last:step, such as 0.5:0.95:0.15")
    return [str(first + k * step) for k in range(count)]


def sweep_arms(sweeps: Sequence[Sweep], options: Options, crossed: bool) -> tuple[str, ...]:
    """The baseline and an arm per point: one setting at a time around the options' own values, or all with all.

    A point that has the options' own values is the plain arm, and belongs to every sweep.
    """
    if crossed:
        names = [name for name, _ in sweeps]
        points = [dict(zip(names, values, strict=True)) for values in product(*(values for _, values in sweeps))]
    else:
        points = [{name: value} for name, values in sweeps for value in values]
    arms = dict.fromkeys(_arm(point, options) for point in points)
    if len(arms) > _MOST_POINTS:
        raise InputError(f"--sweep has {len(arms):,} points: choose {_MOST_POINTS:,} at most")
    return (BASELINE, *arms)


def compaction_arms(thresholds: Sequence[str], rounds: Sequence[int], ways: Sequence[str]) -> tuple[str, ...]:
    """The baseline, and per threshold and number of rounds a merging arm, its smaller model, and others of its size.

    Of the rounds a single number is no part of their names: it is that of the options.
    """
    check_names("--ways", "way", ways, WAYS[1:])
    [(_, values)] = read_sweeps([f"{THRESHOLD}={','.join(thresholds)}"])
    arms = [BASELINE]
    for value, count in product(values, rounds):
        if value == DISSIMILAR:
            raise InputError(f"--thresholds {DISSIMILAR} makes nothing equal: give numbers, or such as 4sd")
        if count < 0:
            raise InputError(f"--rounds {count} can't be made: give numbers from 0")
        rounds_of_arm = {ROUNDS: count} if count and len(rounds) > 1 else {}
        merging = arm_name("validation-rounds" if count else "inmerge", {THRESHOLD: value} | rounds_of_arm)
        arms += [merging, *(smaller_name(merging, way) for way in (COMPACT, *ways))]
    if len(arms) < 2 or len(set(arms)) < len(arms):
        raise InputError("--thresholds, --rounds and --ways need values, each once: a repeated run adds no evidence")
    return tuple(arms)


def _arm(point: Mapping[str, Any], options: Options) -> str:
    base = DISSIMILAR if point.get(THRESHOLD) == DISSIMILAR else "inmerge"
    own = {name: value for name, value in point.items() if value not in (DISSIMILAR, getattr(options, name))}
    return arm_name(base, own)
