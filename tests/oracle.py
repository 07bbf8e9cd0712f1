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
    return dot / (math.sqrt(math.fsum(x * x for x in a)) * math.sqrt(math.fsum(y * y for y in b)))


def pair_cosines(kernels: list[list[float]], pairs: list[tuple[int, int]]) -> list[float | None]:
    """The cosine of each drawn pair; None where one of the two is not finite."""
    finite = [all(map(math.isfinite, kernel)) for kernel in kernels]
    return [cosine(kernels[i], kernels[j]) if finite[i] and finite[j] else None for i, j in pairs]


def threshold_cosine(threshold: float | str, cosines: list[float | None], length: int) -> float:
    """The cosine that a threshold stands for: itself, k / sqrt(length), or the sample that a quantile is closest to."""
    if not isinstance(threshold, str):
        return threshold
    if threshold.endswith("sd"):
        return float(threshold.removesuffix("sd")) / math.sqrt(length)
    ordered = sorted(value for value in cosines if value is not None)
    not_above = max(1, round(float(threshold[1:]) * len(ordered)))
    return ordered[not_above - 1] if ordered else 1.0


def merge(
    kernels: list[list[float]],
    pairs: list[tuple[int, int]],
    *,
    merge_weight: float,
    similarity_threshold: float | str,
    criterion: str = "similar",
    shuffle: list[int] | None = None,
) -> tuple[list[list[float]], list[int]]:
    """Return the kernels after one step, and which were merged."""
    cosines = pair_cosines(kernels, pairs)
    finite = [value is not None for value in cosines]
    tau = threshold_cosine(similarity_threshold, cosines, len(kernels[0]))
    accepted = [value is not None and value > tau for value in cosines]
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
