"""The method: which kernels are drawn, which pairs are merged, and how (Algorithm 1 of the paper).

In-Model Merging (InMerge), from Wang, Almakky, Ma, Saeed, Yaqub: "In-Model Merging for Enhancing the Robustness of
Medical Imaging Classification Models". A kernel is the weight of one output channel, ``weight[i]``, flattened.

The random choices are made on the host (drawing.py); the cosines and the merges are computed where the weight is, and
nothing waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from inmerge_optim.drawing import Indices, Pairs, draw_layers
from inmerge_optim.settings import Criterion, Rule, check_setting, parse_threshold

# Cosines are rounded to it: parallel kernels tie however their cosine was computed, and sums of cosines are exact in
# any order and on any shard.
COSINE_UNIT = 2.0**-24


class DrawnLayer(NamedTuple):
    """A weight (floating point, kernels on dim 0), its pairs of one step, and how they are judged.

    Attributes:
        donors: the kernels that the partners are, as rows in the order of their weights, if not those of the weight
            itself: what other ranks have sent.
        channels: what else has an entry per kernel and is merged along, such as the bias: (kernels, ...) each.
    """

    weight: Tensor
    pairs: Pairs
    rule: Rule
    donors: Tensor | None = None
    channels: tuple[Tensor, ...] = ()


def merge_layer_(layer: DrawnLayer) -> Tensor:
    """Merge the drawn pairs of one weight in place (Algorithm 1, the inner loop).

    All reads come from the weight as it was, so the order of the pairs does not matter.

    Returns:
        The tally: how many kernels were merged, and the sum of their cosines in COSINE_UNIT; int64, (2,), on the
        weight's device.
    """
    weight, (picked, partners, rounding, shuffle), rule, others, channels = layer
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        rows, donor_rows, order = to_device([picked, partners, shuffle], weight.device)
        own, donors = take_rows(weight, rows), take_rows(weight if others is None else others, donor_rows)
        cosines = pair_cosines(own, donors)
        accepted = accept_pairs(cosines, own.shape[1], rule, rounding, order)
        per_channel = [(values, take_rows(values, rows), take_rows(values, donor_rows)) for values in channels]
        for tensor, mine, theirs in [(weight, own, donors), *per_channel]:
            merged = blend_rows(mine, theirs, rule.merge_weight).to(tensor.dtype)
            kept = tensor.index_select(0, rows)
            written = torch.where(accepted[:, None], merged, kept.reshape(merged.shape))
            tensor.index_copy_(0, rows, written.reshape(kept.shape))
        return torch.stack((accepted, torch.where(accepted, cosines / COSINE_UNIT, 0).long())).sum(1)


def pair_cosines(own: Tensor, donors: Tensor) -> Tensor:
    """Return the cosines of pairs of rows, (m,), from two tensors of (m, d), rounded to COSINE_UNIT.

    The cosine of a zero row is 0; a pair with a non-finite row has NaN.
    """
    # Scaled to a largest entry of 1, neither tiny nor huge kernels leave the range of the squares; inf / inf is NaN.
    own_scale, donor_scale = own.abs().amax(1, keepdim=True), donors.abs().amax(1, keepdim=True)
    a, b = own / torch.where(own_scale > 0, own_scale, 1), donors / torch.where(donor_scale > 0, donor_scale, 1)
    norms = ((a * a).sum(1) * (b * b).sum(1)).sqrt()
    return ((a * b).sum(1) / torch.where(norms > 0, norms, 1) / COSINE_UNIT).round() * COSINE_UNIT


def accept_pairs(cosines: Tensor, row_length: int, rule: Rule, rounding: float, order: Tensor) -> Tensor:
    """Say which pairs are to be merged (Algorithm 1, the comparison with tau).

    Args:
        cosines: of the drawn pairs, (m,), as pair_cosines has them.
        row_length: d, the weights of a kernel.
        rule: "similar" accepts cosines above its threshold, "dissimilar" the others, and "random_pairs" as many as
            "similar", whatever their cosine.
        rounding: of Pairs.
        order: of Pairs, on the weight's device.

    Returns:
        A mask of m booleans; a pair without a cosine is never accepted.
    """
    finite = cosines.isfinite()
    if rule.threshold.kind == "quantile":
        accepted = finite & _above_quantile(cosines, rule.threshold.value, rounding, order)
    else:
        accepted = cosines > rule.threshold.cosine(row_length)
    if rule.criterion == "dissimilar":
        accepted = finite & ~accepted
    elif rule.criterion == "random_pairs":  # permuted among the pairs that have a cosine; the others stay at the end
        by_index, by_chance = (~finite).argsort(stable=True), order[(~finite[order]).argsort(stable=True)]
        accepted = torch.zeros_like(accepted).index_copy_(0, by_chance, accepted[by_index])
    return accepted


def _above_quantile(cosines: Tensor, share: float, rounding: float, order: Tensor) -> Tensor:
    """Say which cosines are above their quantile, without reading them; pairs of one cosine take turns by ``order``.

    Of m finite ones floor(q m + v) are not above it: q m on average over v, however few there are.
    """
    not_above = (share * cosines.isfinite().sum(dtype=cosines.dtype) + rounding).floor()
    ascending = order[cosines[order].argsort(stable=True)]  # NaN comes last
    ranks = torch.empty_like(order).index_copy_(0, ascending, torch.arange(order.numel(), device=order.device))
    return ranks >= not_above


def blend_rows(own: Tensor, donors: Tensor, merge_weight: float) -> Tensor:
    """Return ``merge_weight * own + (1 - merge_weight) * donors`` (Algorithm 1, the update of K_i).

    It starts from the nearer end and adds the weighted difference, so that equal rows stay equal to the bit and none
    overflows, and in single rounded operations, so that the bits don't depend on how the rows lie in memory.
    """
    near, far, share = (own, donors, 1 - merge_weight) if merge_weight >= 0.5 else (donors, own, merge_weight)
    return (far * share - near * share) + near


def take_rows(weight: Tensor, rows: Tensor) -> Tensor:
    """Return kernels as rows of shape (len(rows), row length), copied, in float64 (float32 where a device has none)."""
    dtype = torch.float32 if weight.device.type == "mps" else torch.float64
    return weight.index_select(0, rows).reshape(rows.numel(), weight.shape[1:].numel()).to(dtype)


def to_device(arrays: Sequence[Indices], device: torch.device) -> list[Tensor]:
    """Copy arrays of indices to ``device`` in one go; CUDA is not waited for, since it reads pinned memory itself."""
    joined, pinned = torch.from_numpy(np.concatenate(arrays)), device.type == "cuda"
    if pinned:
        joined = joined.pin_memory()
    return list(joined.to(device, non_blocking=pinned).split([array.size for array in arrays]))


def merge_kernels_(
    weight: Tensor,
    *,
    merge_prob: float,
    merge_weight: float,
    similarity_threshold: float | str,
    groups: int = 1,
    criterion: Criterion = "similar",
    rng: np.random.Generator,
) -> Tensor:
    """One step of in-model merging on one weight, in place (Algorithm 1, the inner loop), for custom loops.

    Args:
        weight: floating point, of any shape, with the kernels on dim 0: (output channels, ...).
        merge_prob: p, in [0, 1]: how likely each kernel is picked.
        merge_weight: alpha, in [0, 1]: the share that a merged kernel keeps of itself.
        similarity_threshold: tau: pairs with a cosine above it are merged. A number in [-1, 1], "4sd" for 4/sqrt(d)
            with kernels of d weights, or "q0.9" for that quantile of the drawn pairs' cosines; see parse_threshold.
        groups: the groups of the convolution; partners come from the same group.
        criterion: "similar" is the paper's; "dissimilar" merges the pairs whose cosine is not above tau;
            "random_pairs" merges as many as "similar" does, taken from the drawn pairs whatever their cosine.
        rng: the generator of the random choices; it advances.

    Returns:
        How many kernels were merged: an int64 tensor without dimensions, on the weight's device, not yet read.

    Raises:
        ValueError: a setting out of range, or groups that don't divide the kernels.
        TypeError: a weight that is not of float16, bfloat16, float32 or float64, or an rng that is no Generator.

    Example:
        >>> weight = torch.tensor([[1.0, 0.0], [1.0, 0.2], [0.0, 1.0]])
        >>> settings = dict(merge_prob=1.0, merge_weight=0.5, similarity_threshold=0.3)
        >>> int(merge_kernels_(weight, **settings, rng=np.random.default_rng(0)))
        1
    """
    check_setting("merge_prob", merge_prob)
    check_setting("merge_weight", merge_weight)
    rule = Rule(merge_weight, parse_threshold(similarity_threshold), check_setting("criterion", criterion))
    if not isinstance(rng, np.random.Generator):
        raise TypeError(f"rng is {rng!r}, but it must be a NumPy generator: numpy.random.default_rng(0)")
    check_kernels("weight", weight)
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups is {groups}, but it must divide the kernels of a weight of {tuple(weight.shape)}")
    (pairs,) = draw_layers([(weight.shape[0], groups)], [merge_prob], rng, [rule.needs_order])
    return merge_layer_(DrawnLayer(weight, pairs, rule))[0]


def check_kernels(name: str, weight: Tensor) -> None:
    """Refuse a weight whose kernels can't be merged: no dimension to have them on, or numbers of another kind.

    Raises:
        TypeError: it is one; the sentence names it by ``name``.
    """
    if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64) or not weight.dim():
        raise TypeError(
            f"{name} is {weight.dtype} of shape {tuple(weight.shape)}, but kernels are merged in weights of float16, "
            "bfloat16, float32 or float64 with the kernels on their first dimension"
        )
