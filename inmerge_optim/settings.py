"""The settings of the method: what each may be, and the three ways to state a similarity threshold."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeGuard, TypeVar

import numpy as np

Criterion = Literal["similar", "dissimilar", "random_pairs"]
CRITERIA: tuple[Criterion, ...] = ("similar", "dissimilar", "random_pairs")

_Value = TypeVar("_Value")


class Threshold(NamedTuple):
    """tau, which the cosine of a pair must exceed, as the user meant it; see parse_threshold.

    Attributes:
        kind: what ``value`` is: the cosine itself, a number of standard deviations of the cosine of two random rows
            (1/sqrt(d) for rows of length d), or a quantile of the cosines that a step draws in a layer.
        value: in [-1, 1], any number, or a share in [0, 1].
    """

    kind: Literal["cosine", "sd", "quantile"]
    value: float

    def cosine(self, row_length: int) -> float:
        """Return the cosine that it stands for in kernels of so many weights; a quantile stands for none."""
        return self.value / math.sqrt(row_length) if self.kind == "sd" else self.value


class Rule(NamedTuple):
    """How a drawn pair is judged and merged: alpha, tau and which side of tau is merged."""

    merge_weight: float
    threshold: Threshold
    criterion: Criterion = "similar"

    @property
    def needs_order(self) -> bool:
        """Whether the pairs need a random order: to permute acceptances, or to break ties at a quantile."""
        return self.criterion == "random_pairs" or self.threshold.kind == "quantile"


def parse_threshold(value: float | str) -> Threshold:
    """Read a similarity threshold.

    Args:
        value: a cosine in [-1, 1], as in the paper; "4sd" for so many standard deviations of the cosine of two random
            rows, k/sqrt(d) for kernels of d weights; "q0.9" for the quantile, in [0, 1], of the cosines of the pairs
            that a step draws in a layer, by which a tenth of them merges.

    Raises:
        ValueError: it is none of these.

    Example:
        >>> parse_threshold(0.3), parse_threshold("4sd")
        (Threshold(kind='cosine', value=0.3), Threshold(kind='sd', value=4.0))
    """
    if isinstance(value, str):
        number = value[1:] if value.startswith("q") else value.removesuffix("sd")
        try:
            found = float(number)
        except ValueError:
            found = math.nan
        if value.startswith("q") and 0 <= found <= 1:
            return Threshold("quantile", found)
        if value.endswith("sd") and math.isfinite(found):
            return Threshold("sd", found)
    elif _is_number(value) and -1 <= value <= 1:
        return Threshold("cosine", float(value))
    raise ValueError(
        f"similarity_threshold is {value!r}, but it must be a number from -1 to 1, '<k>sd' or 'q<share from 0 to 1>'"
    )


def check_setting(name: str, value: _Value) -> _Value:
    """Return ``value`` if the setting ``name``, one of SETTINGS, may have it.

    Raises:
        ValueError: it may not.
    """
    SETTINGS[name](name, value)
    return value


def _check_share(name: str, value: Any) -> None:
    if not _is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} is {value!r}, but it must be a number from 0 to 1")


def _check_threshold(name: str, value: Any) -> None:
    parse_threshold(value)


def _check_criterion(name: str, value: Any) -> None:
    if value not in CRITERIA:
        raise ValueError(f"{name} is {value!r}, but it must be one of {', '.join(CRITERIA)}")


def check_count(name: str, value: Any, least: int = 0) -> None:
    """Refuse what is no int from ``least``."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name} is {value!r}, but it must be an int from {least}")


def _check_cadence(name: str, value: Any) -> None:
    check_count(name, value, least=1)


def _check_end(name: str, value: Any) -> None:
    if value is not None:
        check_count(name, value)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


SETTINGS: dict[str, Callable[[str, Any], None]] = {
    "merge_prob": _check_share,
    "merge_weight": _check_share,
    "similarity_threshold": _check_threshold,
    "criterion": _check_criterion,
    "seed": check_count,
    "every": _check_cadence,
    "merge_start": check_count,
    "merge_stop": _check_end,
}
