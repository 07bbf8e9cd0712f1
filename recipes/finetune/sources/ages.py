"""Ages in bands."""

import re

_BANDS = ((17, "0-17"), (39, "18-39"), (64, "40-64"), (100, "65-100"))


def age_band(age: str) -> str | None:
    """0-17, 18-39, 40-64 or 65-100 years; None for no age, and for more than 100 years, which are errors of the file.

    Files differ in form: years as a number (57, 57.0), or a number with its unit (058Y, 013M, 040W, 005D). A few ages
    of ChestX-ray14's first file are as high as 414; whatever they stand for, those images belong to no band.
    """
    found = re.fullmatch(r"([0-9]{1,4})(?:\.[0-9]*)?([YMWD]?)", age.strip())
    if found is None:
        return None
    years = int(found[1]) // {"": 1, "Y": 1, "M": 12, "W": 52, "D": 365}[found[2]]
    return next((band for last, band in _BANDS if years <= last), None)
