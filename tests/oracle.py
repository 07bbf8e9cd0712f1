"""Algorithm 1 of the paper as plain loops over Python floats: slow, and plain enough to be right.

Given the pairs that were drawn, it is independent of the package: no tensors, no vectorised arithmetic, double
precision throughout.
"""

from __future__ import annotations

import math


def cosine(a: list[float], b: list[float]) -> float:
    """The cosine of two kernels; 0 if one of them is zero."""
    scale_a, scale_b = max(map(abs, a)), max(map(abs, b))
    if scale_a == 0 or scale_b == 0:
        return 0.0
    a, b = [x / scale_a for x in a], [x / scale_b for x in b]
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(math.fsum(x * x for x in a)) / math.sqrt(math.fsum(y * y for y in b))


def merge(
    kernels: list[list[float]],
    pairs: list[tuple[int, int]],
    *,
    merge_weight: float,
    similarity_threshold: float,
    criterion: str = "similar",
    shuffle: list[int] | None = None,
) -> tuple[list[list[float]], list[int]]:
    """Return the kernels after one step, and which were merged."""
    finite = [all(math.isfinite(x) for x in kernels[i] + kernels[j]) for i, j in pairs]
    cosines = [cosine(kernels[i], kernels[j]) if fine else -2.0 for (i, j), fine in zip(pairs, finite, strict=True)]
    accepted = [value > similarity_threshold for value in cosines]
    if criterion == "dissimilar":
        accepted = [not value for value in accepted]
    if criterion == "any":
        accepted = [accepted[place] for place in shuffle or []]
    merged = [list(kernel) for kernel in kernels]
    changed = []
    for (i, j), accept, fine in zip(pairs, accepted, finite, strict=True):
        if accept and fine:
            changed.append(i)
            for k in range(len(kernels[i])):
                merged[i][k] = merge_weight * kernels[i][k] + (1 - merge_weight) * kernels[j][k]
    return merged, changed
