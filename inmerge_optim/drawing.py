"""The random choices of the method: which kernels a step picks, and a partner for each (Algorithm 1).

They are made on the host from a NumPy generator, so that they are the same on every rank, device and dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from inmerge_optim.settings import check_count, check_setting

Indices = npt.NDArray[np.int64]

_NO_ORDER: Indices = np.empty(0, np.int64)


class Pairs(NamedTuple):
    """The random choices of one step for one layer.

    Attributes:
        picked: the kernels to change, each at most once, ascending, (m,).
        partners: the kernels that they are pulled towards, (m,).
        rounding: in [0, 1), by which a quantile of the pairs is rounded to a whole number of them.
        order: a permutation of the m pairs, by which "random_pairs" permutes the acceptances and a quantile has pairs
            of one cosine take turns; empty where neither is asked for.
    """

    picked: Indices
    partners: Indices
    rounding: float
    order: Indices


def draw_pairs(kernels: int, groups: int, merge_prob: float, rng: np.random.Generator) -> tuple[Indices, Indices]:
    """Draw the kernels that one step may merge, and a partner for each (Algorithm 1, the two random choices).

    Each kernel is picked with probability ``merge_prob``. Its partner is another kernel of its convolution group,
    each as likely as the next.

    Args:
        kernels: how many kernels the layer has (its output channels).
        groups: how many groups its convolution has; it divides ``kernels``.
        merge_prob: the probability p, in [0, 1].
        rng: the generator that draws; it advances.

    Returns:
        The picked kernels, ascending, and their partners: two int64 arrays of the same length, empty where a group
        holds a single kernel.

    Raises:
        ValueError: a probability out of range, a count below 1, or groups that don't divide the kernels.

    Example:
        >>> picked, partners = draw_pairs(4, groups=2, merge_prob=1.0, rng=np.random.default_rng(0))
        >>> picked.tolist(), partners.tolist()
        ([0, 1, 2, 3], [1, 0, 3, 2])
    """
    check_setting("merge_prob", merge_prob)
    check_count("kernels", kernels, least=1)
    check_count("groups", groups, least=1)
    if kernels % groups:
        raise ValueError(f"groups is {groups}, but it must divide the {kernels} kernels")
    (pairs,) = draw_layers([(kernels, groups)], [merge_prob], rng, [False])
    return pairs.picked, pairs.partners


def draw_layers(
    layers: Sequence[tuple[int, int]],
    merge_probs: Sequence[float],
    rng: np.random.Generator,
    ordered: Sequence[bool],
) -> list[Pairs]:
    """Draw the pairs of several layers at once, from one uniform number per kernel.

    Args:
        layers: (kernels, groups) of each.
        merge_probs: p of each.
        rng: the generator that draws; it advances.
        ordered: whether a permutation of its pairs is drawn as well, of each.
    """
    before, start, size, kernels, ends = _group_table(tuple(layers))
    prob = np.repeat(np.asarray(merge_probs, np.float64), kernels)
    uniforms, roundings = rng.random(len(start)), rng.random(len(layers)).tolist()
    picked = np.flatnonzero((uniforms < prob) & (size > 1))
    # Below p a uniform number is uniform there: where it lies says which of the others, the kernel itself left out.
    before, start, size = before[picked], start[picked], size[picked]
    place = np.minimum(uniforms[picked] * (size - 1) / prob[picked], size - 2).astype(np.int64)
    partners = start + place + (start + place >= picked)
    cuts = [0, *np.searchsorted(picked, ends).tolist()]
    picked, partners = picked - before, partners - before
    pairs = []
    for own, rounding, wanted in zip(map(slice, cuts, cuts[1:]), roundings, ordered, strict=True):
        order = rng.permutation(own.stop - own.start) if wanted else _NO_ORDER
        pairs.append(Pairs(picked[own], partners[own], rounding, order))
    return pairs


@lru_cache(maxsize=16)
def _group_table(layers: tuple[tuple[int, int], ...]) -> tuple[Indices, ...]:
    """Number the kernels of all layers through.

    The arrays are shared between the callers, who don't write to them.

    Returns:
        Of each kernel: the first kernel of its layer, the first of its group, and its group's size. Of each layer: how
        many kernels it has, and where they end.
    """
    kernels = np.array([kernels for kernels, _ in layers])
    ends = np.cumsum(kernels)
    sizes = np.repeat([kernels // groups for kernels, groups in layers], [groups for _, groups in layers])
    starts = np.cumsum(sizes) - sizes
    return np.repeat(ends - kernels, kernels), np.repeat(starts, sizes), np.repeat(sizes, sizes), kernels, ends
