"""Figures as text: two significant digits of an interval's half-width, and never the sign of a 0."""

from math import floor, log10

_PLACES_WITHOUT_WIDTH = 4
_MOST_PLACES = 12


def number(value: float, form: str) -> str:
    """A number in a format such as "{:+.4f}", without a sign where nothing but zeros is left of it."""
    text = form.format(value)
    return text if any(digit in text for digit in "123456789") else text.lstrip("+-")


def percent(share: float, places: int = 0) -> str:
    """A share, as "95 %"."""
    return f"{100 * share:.{places}f} %"


def epoch_text(epoch: int | list[int]) -> str:
    """The epoch that was kept, or of cross-validation that of each fold, as 3/5/4."""
    return "/".join(map(str, epoch)) if isinstance(epoch, list) else str(epoch)


def bounds(low: float, high: float, apart: tuple[float, ...] = (0.0,)) -> str:
    """An interval, as "[0.001, 0.023]".

    Args:
        apart: values that the bounds are judged against. A bound that would be rounded onto one that it doesn't equal
            gets the digits that keep it on its side, so that the interval shows what is said of it.
    """
    form = _form(low, high, apart)
    return f"[{number(low, form)}, {number(high, form)}]"


def with_bounds(mean: float, low: float, high: float, apart: tuple[float, ...] = (0.0,)) -> str:
    """A difference and its interval, as "+0.012 [0.001, 0.023]"; see `bounds`."""
    signed = _form(low, high, apart).replace(":", ":+")
    return f"{number(mean, signed)} {bounds(low, high, apart)}"


def _form(low: float, high: float, apart: tuple[float, ...]) -> str:
    half_width = (high - low) / 2
    places = max(0, 1 - floor(log10(half_width))) if half_width > 0 else _PLACES_WITHOUT_WIDTH
    while places < _MOST_PLACES and any(round(b, places) == value != b for b in (low, high) for value in apart):
        places += 1
    return f"{{:.{places}f}}"
