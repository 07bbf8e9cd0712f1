"""Algorithm 1 of the paper as plain loops over Python floats: slow, and plain enough to be right.

Given the pairs that were drawn, it is independent of the package: no tensors, no vectorised arithmetic, double
precision throughout.
"""

from __future__ import annotations

import math

UNIT = 2.0**-24


def draw(uniforms: list[float], groups: int, merge_prob: float) -> list[tuple[int, int]]:
    """The pairs that one uniform number per kernel stands for: drawn below p, and its place below p names the other."""
    size, pairs = len(uniforms) // groups, []
    for i, uniform in enumerate(uniforms):
        if uniform < merge_prob and size > 1:
            others = [j for j in range(len(uniforms)) if j // size == i // size and j != i]
            pairs.append((i, others[min(math.floor(uniform * (size - 1) / merge_prob), size - 2)]))
    return pairs


def cosine(a: list[float], b: list[float]) -> float:
    """The cosine of two kernels, to the nearest UNIT; 0 if one of them is zero."""
    scale_a, scale_b = max(map(abs, a)), max(map(abs, b))
    if scale_a == 0 or scale_b == 0:
        return 0.0
    a, b = [x / scale_a for x in a], [x / scale_b for x in b]
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    norms = math.sqrt(math.fsum(x * x for x in a)) * math.sqrt(math.fsum(y * y for y in b))
    return round(dot / norms / UNIT) * UNIT


def pair_cosines(kernels: list[list[float]], pairs: list[tuple[int, int]]) -> list[float | None]:
    """The cosine of each drawn pair; None where one of the two is not finite."""
    finite = [all(map(math.isfinite, kernel)) for kernel in kernels]
    return [cosine(kernels[i], kernels[j]) if finite[i] and finite[j] else None for i, j in pairs]


def above_threshold(
    threshold: float | str, cosines: dict[int, float], length: int, rounding: float, order: list[int]
) -> set[int]:
    """Which pairs, of those that have a cosine, are above the threshold."""
    if isinstance(threshold, str) and threshold.startswith("q"):
        ascending = sorted((index for index in order if index in cosines), key=lambda index: cosines[index])
        return set(ascending[math.floor(float(threshold[1:]) * len(ascending) + rounding) :])
    tau = float(threshold.removesuffix("sd")) / math.sqrt(length) if isinstance(threshold, str) else threshold
    return {index for index, value in cosines.items() if value > tau}


def merge(
    kernels: list[list[float]],
    pairs: list[tuple[int, int]],
    *,
    merge_weight: float,
    similarity_threshold: float | str,
    criterion: str,
    rounding: float,
    order: list[int],
) -> tuple[list[list[float]], list[int]]:
    """Return the kernels after one step, and which were merged."""
    cosines = {index: value for index, value in enumerate(pair_cosines(kernels, pairs)) if value is not None}
    above = above_threshold(similarity_threshold, cosines, len(kernels[0]), rounding, order)
    accepted = {index: (index in above) != (criterion == "dissimilar") for index in cosines}
    if criterion == "random_pairs":
        shuffled = [index for index in order if index in accepted]
        accepted = {index: accepted[other] for index, other in zip(shuffled, cosines, strict=True)}
    merged = [list(kernel) for kernel in kernels]
    changed = []
    for index, accept in accepted.items():
        i, j = pairs[index]
        if accept:
            changed.append(i)
            for k in range(len(kernels[i])):
                merged[i][k] = merge_weight * kernels[i][k] + (1 - merge_weight) * kernels[j][k]
    return merged, changed
