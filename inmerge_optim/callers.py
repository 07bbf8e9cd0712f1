"""Whose line a warning is about: the user's, however deep inside the package it is given."""

from __future__ import annotations

import os
import sys

import torch


def user_stacklevel() -> int:
    """Return the stacklevel by which a warning of the caller shows the line outside torch and this package."""
    inside = tuple(os.path.join(os.path.dirname(file), "") for file in (__file__, torch.__file__))
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    return level
