"""Weights and thresholds of all kinds for property-based tests of the merge."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import strategies as st

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Factors whose squares leave the range of numbers, or nearly so.
TINY = {torch.float64: 1e-200, torch.float32: 1e-30, torch.float16: 1e-4, torch.bfloat16: 1e-30}
HUGE = {torch.float64: 1e200, torch.float32: 1e30, torch.float16: 1e3, torch.bfloat16: 1e30}


@st.composite
def weights(draw, dtypes=DTYPES):
    """Weights of any shape whose kernels are similar in part, with zero, tiny, huge and non-finite ones among them."""
    group_size, groups = draw(st.integers(1, 7)), draw(st.integers(1, 3))
    shape = draw(st.sampled_from([(), (5,), (3, 2), (2, 3, 3), (1, 2, 2, 2)]))
    dtype = draw(st.sampled_from(dtypes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kernels = rng.normal(size=(groups * group_size, *shape)) + draw(st.sampled_from([0.0, 0.7])) * rng.normal(
        size=shape
    )
    for row in range(len(kernels)):
        kind = draw(st.sampled_from(["plain"] * 6 + ["zero", "tiny", "huge", "nan", "inf"]))
        kernels[row] *= {"zero": 0.0, "tiny": TINY[dtype], "huge": HUGE[dtype]}.get(kind, 1.0)
        if kind in ("nan", "inf"):
            kernels[row].flat[-1] = math.nan if kind == "nan" else -math.inf
    weight = torch.tensor(kernels).to(dtype)
    if weight.dim() == 4 and draw(st.booleans()):
        weight = weight.to(memory_format=torch.channels_last)
    return weight, groups


def thresholds():
    """Similarity thresholds of the three kinds."""
    return st.one_of(
        st.floats(-1, 1),
        st.floats(-3, 6).map(lambda number: f"{number}sd"),
        st.integers(0, 20).map(lambda number: f"q{number / 20}"),
    )
