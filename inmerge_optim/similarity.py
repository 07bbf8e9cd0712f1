"""What the kernels of a model look like before it is trained, and what the method would do to them.

In-model merging (InMerge; Wang, Almakky, Ma, Saeed, Yaqub, "In-Model Merging for Enhancing the Robustness of Medical
Imaging Classification Models") merges pairs of kernels whose cosine is above a threshold. How many there are differs
from layer to layer: the cosines of random rows of length d have the standard deviation 1/sqrt(d), so that a threshold
of 0.3 is far out for a 3x3 convolution with 512 inputs, and nothing special for a 1x1 with 32.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from inmerge_optim.selection import CONVOLUTIONS, KernelLayer, LayerTypes, kernel_layers, layer_modules
from inmerge_optim.settings import Threshold, check_setting, parse_threshold

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
HISTOGRAM_BINS = 20_000  # of equal width from -1 to 1, so that what is read from them is exact to 1e-4
_BLOCK = 2**20  # cosines held at once
_DEAD = 1e-3


class KernelPair(NamedTuple):
    """Two kernels of a layer, by their places among its output channels, and their cosine."""

    first: int
    second: int
    cosine: float


@dataclass(frozen=True)
class LayerProfile:
    """The similarities of a layer's kernels, over all pairs that can be drawn: two kernels of the same group.

    A layer without such pairs, or with no finite ones (nor any of floating point numbers of 16 bits or more), has None
    for the mean, the quantiles and the shares.

    Attributes:
        name: its name in the model.
        depth: its place among the counted layers, in order of execution, from 0; None if it is not counted.
        selected: whether its kernels are merged.
        reason: why it is not selected, or a remark; empty if there is nothing to say.
        kernels: how many kernels it has.
        row_length: the weights of one kernel.
        groups: the groups of the convolution.
        dead_kernels: the kernels whose norm is below a thousandth of the layer's largest, ascending.
        mean: the mean cosine, in [-1, 1].
        quantiles: cosines by the probabilities QUANTILES, exact to 1e-4.
        threshold: the cosine that the similarity threshold stands for in this layer: tau itself; k/sqrt(d), which may
            be beyond 1; or the quantile over all pairs, exact to 1e-4.
        share_above_threshold: the share of pairs whose cosine is above that, in [0, 1].
        random_share_above_threshold: the same share for random rows of that length; see random_share_above.
        expected_draws: how many kernels a step draws on average; 0 if the layer is not selected.
        expected_merges: how many of them it merges on average, at the weights as they are.
        most_similar: the pairs with the highest cosines, highest first.
        least_similar: the pairs with the lowest cosines, lowest first.
        histogram: the counts of cosines in HISTOGRAM_BINS bins of equal width from -1 to 1, each pair once.
    """

    name: str
    depth: int | None
    selected: bool
    reason: str
    kernels: int
    row_length: int
    groups: int
    dead_kernels: tuple[int, ...]
    mean: float | None
    quantiles: dict[float, float] | None
    threshold: float | None
    share_above_threshold: float | None
    random_share_above_threshold: float | None
    expected_draws: float
    expected_merges: float
    most_similar: tuple[KernelPair, ...]
    least_similar: tuple[KernelPair, ...]
    histogram: npt.NDArray[np.int64] = field(repr=False, compare=False)


def kernel_similarity(weight: Tensor, groups: int = 1) -> Tensor:
    """Return the cosine of every pair of kernels that can be merged (Algorithm 1, the comparison with tau).

    The result is what takes the memory, n^2 numbers: 64 MiB for 4096 kernels in float32. It is filled block by block,
    and all else that is allocated is a few copies of the weight. To look at wider layers, use similarity_profile, which
    keeps no more than a block at once.

    Args:
        weight: floating point, of any shape, with the n kernels on dim 0: (output channels, ...).
        groups: the groups of the convolution; it divides n.

    Returns:
        (n, n) cosines in [-1, 1], symmetric, on the weight's device, in at least float32. The cosine of a zero kernel
        is 0. NaN stands for what is never merged: kernels of different groups, and non-finite ones.

    Raises:
        TypeError: the weight is not of floating point numbers of 16 bits or more.
        ValueError: ``groups`` does not divide its kernels.

    Example:
        >>> kernel_similarity(torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, -1.0], [2.0, -2.0, 2.0, -2.0]]))
        tensor([[1.0000, 0.5000, 0.0000],
                [0.5000, 1.0000, 0.5000],
                [0.0000, 0.5000, 1.0000]])
    """
    rows = _unit_rows(weight, groups)
    size = rows.shape[1]
    cosines = rows.new_full((groups, size, groups, size), math.nan)
    for group, row, block in _blocks(rows):
        square = block[..., : block.shape[1]]  # a product of rows by rows, which is not symmetric to the bit
        square.copy_(square.triu() + square.triu(1).mT)
        for place in range(group, group + block.shape[0]):
            end = row + block.shape[1]
            cosines[place, row:end, place, row:] = block[place - group]
            cosines[place, row:, place, row:end] = block[place - group].mT
    return cosines.reshape(groups * size, groups * size)


def random_share_above(threshold: float, row_length: int) -> float:
    """Return how likely two random rows have a cosine above ``threshold``.

    Rows of random direction (such as independent normal weights) have cosines c of which (1 + c) / 2 follows the beta
    distribution with both parameters (d - 1) / 2. So c / sqrt((1 - c^2) / (d - 1)) follows Student's t with d - 1
    degrees of freedom, for which Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4, give a
    finite sum.

    Args:
        threshold: tau, in [-1, 1].
        row_length: d, from 1.

    Returns:
        The probability, with an error of about 1e-15.

    Example:
        >>> f"{random_share_above(0.3, 32):.4f} {random_share_above(0.3, 128):.6f}"
        '0.0449 0.000276'
    """
    if row_length == 1:  # the cosines are 1 and -1
        return 0.5 if threshold < 1 else 0.0
    sine, degrees = abs(threshold), row_length - 1
    squared_cosine = 1 - sine * sine
    angle, cosine = math.asin(sine), math.sqrt(squared_cosine)
    # The share of cosines from -|threshold| to |threshold|. Each term of the sum has its factor over the one before.
    if degrees % 2:
        steps = np.arange(2, degrees - 1, 2)
        terms = cosine * np.cumprod(np.concatenate(([1.0], squared_cosine * steps / (steps + 1))))
        within = 2 / math.pi * (angle + sine * (float(terms.sum()) if degrees > 1 else 0.0))
    else:
        steps = np.arange(1, degrees - 2, 2)
        within = sine * float(np.cumprod(np.concatenate(([1.0], squared_cosine * steps / (steps + 1)))).sum())
    beyond = max(0.0, (1 - within) / 2)
    return beyond if threshold >= 0 else 1 - beyond


def random_density(cosines: npt.NDArray[np.float64], row_length: int) -> npt.NDArray[np.float64]:
    """Return the probability density of the cosines of two random rows; see random_share_above.

    Args:
        cosines: of any shape, each between -1 and 1.
        row_length: d, from 2 (rows of one number have no density).

    Returns:
        The densities, of the same shape; they integrate to 1 from -1 to 1.
    """
    log_scale = math.lgamma(row_length / 2) - math.lgamma((row_length - 1) / 2) - math.log(math.pi) / 2
    density: npt.NDArray[np.float64] = np.exp(log_scale + (row_length - 3) / 2 * np.log1p(-cosines * cosines))
    return density


def similarity_profile(
    model: nn.Module,
    skip_layers: float = 0.6,
    *,
    merge_prob: float = 0.3,
    similarity_threshold: float | str = 0.3,
    names: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    layer_types: LayerTypes = CONVOLUTIONS,
    example_inputs: Any = None,
    pairs: int = 5,
) -> list[LayerProfile]:
    """Describe how similar the kernels of each layer are, and how many of them a step would merge.

    All layers of kernel_layers are described, in its order, those too that are not selected. The cosines are computed
    block by block where the weights are, and not kept: beside a few copies of one weight, memory is bounded, however
    many kernels a layer has. A step's expected merges are exact for the weights as they are: training changes them.

    Args:
        model: any module with real weights.
        skip_layers: L_s, as for kernel_layers, like ``names``, ``exclude``, ``layer_types`` and ``example_inputs``.
        merge_prob: p, in [0, 1].
        similarity_threshold: tau, in [-1, 1], or a text such as "4sd" or "q0.9", as for InMergeOptimizer.
        names: the layers to select outright.
        exclude: the layers to leave out; they are described all the same.
        layer_types: the classes of layers to look at.
        example_inputs: what to call a model with that has no size of its own: (channels, height, width), say.
        pairs: how many most and least similar pairs to keep per layer, from 0.

    Returns:
        A profile per layer.

    Raises:
        ValueError: a setting out of range, or weights on the meta device; and what kernel_layers raises.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 3, 1, bias=False), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.Flatten())
        >>> _ = model[0].weight.data.copy_(torch.tensor([1.0, 2.0, -1.0]).view(3, 1, 1, 1))
        >>> first, second = similarity_profile(model, skip_layers=0, merge_prob=0.5)
        >>> round(first.mean, 2), round(first.expected_merges, 2), first.most_similar[0]
        (-0.33, 0.5, KernelPair(first=0, second=1, cosine=1.0))
    """
    check_setting("merge_prob", merge_prob)
    threshold = parse_threshold(similarity_threshold)
    layers = kernel_layers(
        model, skip_layers, layer_types=layer_types, example_inputs=example_inputs, names=names, exclude=exclude
    )
    modules = layer_modules(model, layers)
    return [_profile(layer, cast(Tensor, modules[layer.name].weight), merge_prob, threshold, pairs) for layer in layers]


def threshold_for_rate(profiles: Sequence[LayerProfile], rate: float) -> float | None:
    """Return the absolute similarity threshold at which a share of all drawn pairs would be merged.

    Args:
        profiles: of a model's layers; those that are not selected are left out.
        rate: the share of draws that are to merge, above 0 and below 1.

    Returns:
        The threshold, exact to 1e-4, or None if no layer is selected.

    Raises:
        ValueError: the rate is out of range.
    """
    if not 0 < rate < 1:
        raise ValueError(f"rate is {rate!r}, but it must be a number above 0 and below 1")
    draws = sum(profile.expected_draws for profile in profiles)
    counts = np.zeros(HISTOGRAM_BINS)
    for profile in profiles:
        if profile.expected_draws and profile.histogram.any():
            counts += profile.histogram * (profile.expected_draws / draws / profile.histogram.sum())
    return _quantile(counts, 1 - rate) if counts.any() else None


def check_kernels(weight: Tensor, groups: int) -> None:
    """Refuse a weight whose kernels can't be compared, with a TypeError, or a ValueError about ``groups``."""
    if not _has_cosines(weight):
        raise TypeError(
            f"the weight is {weight.dtype}, but kernels of floating point numbers of 16 bits or more are compared"
        )
    if weight.dim() == 0 or groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups is {groups}, but it must divide the kernels of a weight of {tuple(weight.shape)}")


def _has_cosines(weight: Tensor) -> bool:
    return weight.is_floating_point() and weight.dtype.itemsize > 1  # those of 8 bits have no arithmetic


def _unit_rows(weight: Tensor, groups: int) -> Tensor:
    """Return the kernels scaled to length 1, (groups, kernels of a group, row length); non-finite ones as NaN."""
    check_kernels(weight, groups)
    rows = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).flatten(1)
    largest = rows.abs().amax(1, keepdim=True)
    rows = rows / torch.where(largest > 0, largest, 1)  # so that squares stay in range; inf / inf is NaN
    norms = rows.norm(dim=1, keepdim=True)
    return (rows / torch.where(norms > 0, norms, 1)).reshape(groups, -1, rows.shape[1])


def _blocks(rows: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Yield the cosines on and above the diagonal, in blocks: the first group, the first row, and the cosines.

    A block of (groups, r, c) holds rows from the first one on, against the kernels from the same one on. They are
    multiplied in float64, since torch may be set to multiply float32 with fewer bits.
    """
    groups, size, _ = rows.shape
    groups_at_once, rows_at_once = max(1, _BLOCK // size**2), max(1, _BLOCK // size)
    with torch.autocast(rows.device.type, enabled=False):
        for group in range(0, groups, groups_at_once):
            part = rows[group : group + groups_at_once].to(rows.dtype if rows.is_mps else torch.float64)
            for row in range(0, size, rows_at_once):
                cosines = part[:, row : row + rows_at_once] @ part[:, row:].mT
                yield group, row, cosines.clamp(-1, 1).to(rows.dtype)


def _profile(layer: KernelLayer, weight: Tensor, merge_prob: float, threshold: Threshold, pairs: int) -> LayerProfile:
    if weight.is_meta:
        raise ValueError(f"the weight of {layer.name} is on the meta device: kernels without values have no cosines")
    if weight.is_mps:  # where no float64 is
        weight = weight.cpu()
    if not _has_cosines(weight):
        weight = torch.full(weight.shape, math.nan)
    rows = _unit_rows(weight, layer.groups)
    _, size, row_length = rows.shape
    drawable = layer.kernels * (size - 1) // 2
    tau = threshold.value / math.sqrt(row_length) if threshold.kind == "sd" else threshold.value
    counts = np.zeros(HISTOGRAM_BINS, np.int64)
    total, above = 0.0, 0.0
    most: list[KernelPair] = []
    least: list[KernelPair] = []
    for group, row, block in _blocks(rows) if drawable else ():
        valid = block.isfinite() & torch.ones_like(block, dtype=torch.bool).triu(1)
        cosines = block[valid]
        bins = ((cosines + 1) * (HISTOGRAM_BINS / 2)).long().clamp(max=HISTOGRAM_BINS - 1)
        counts += bins.bincount(minlength=HISTOGRAM_BINS).cpu().numpy()
        total += float(cosines.double().sum())
        above += int((cosines > tau).sum())
        first = group * size + row
        most = heapq.nlargest(pairs, most + _extreme_pairs(block, valid, first, size, pairs, 1), key=_cosine)
        least = heapq.nsmallest(pairs, least + _extreme_pairs(block, valid, first, size, pairs, -1), key=_cosine)
    finite = int(counts.sum())
    draws = merge_prob * layer.kernels if layer.selected else 0.0
    if threshold.kind == "quantile" and finite:
        tau, above = _quantile(counts, threshold.value), (1 - threshold.value) * finite
    return LayerProfile(
        name=layer.name,
        depth=layer.depth,
        selected=layer.selected,
        reason=layer.reason,
        kernels=layer.kernels,
        row_length=row_length,
        groups=layer.groups,
        dead_kernels=_dead_kernels(weight),
        mean=total / finite if finite else None,
        quantiles={share: _quantile(counts, share) for share in QUANTILES} if finite else None,
        threshold=tau if finite else None,
        share_above_threshold=above / drawable if finite else None,
        random_share_above_threshold=random_share_above(min(max(tau, -1), 1), row_length) if finite else None,
        expected_draws=draws,
        expected_merges=draws * above / drawable if drawable else 0.0,
        most_similar=tuple(most),
        least_similar=tuple(least),
        histogram=counts,
    )


def _cosine(pair: KernelPair) -> float:
    return pair.cosine


def _extreme_pairs(block: Tensor, valid: Tensor, first: int, size: int, pairs: int, sign: int) -> list[KernelPair]:
    """Return the pairs of a block with the highest (sign 1) or lowest (-1) cosines."""
    signed, found = torch.where(valid, sign * block, -math.inf).flatten().topk(min(pairs, int(valid.sum())))
    groups, rows, columns = np.unravel_index(found.cpu().numpy(), block.shape)
    starts = first + groups * size
    ends = zip((starts + rows).tolist(), (starts + columns).tolist(), signed.tolist(), strict=True)
    return [KernelPair(one, other, sign * cosine) for one, other, cosine in ends]


def _dead_kernels(weight: Tensor) -> tuple[int, ...]:
    norms = weight.detach().flatten(1).double().norm(dim=1)
    return tuple((norms <= _DEAD * norms.nan_to_num().amax()).nonzero().flatten().tolist())


def _quantile(counts: npt.NDArray[np.int64] | npt.NDArray[np.float64], share: float) -> float:
    """Return where a share of the counts lies below, taking the counts of a bin as evenly spread over it."""
    cumulated = np.concatenate(([0.0], np.cumsum(counts) / counts.sum()))
    filled = np.flatnonzero(counts) + 1
    place = int(np.clip(np.searchsorted(cumulated, share, side="left"), filled[0], filled[-1]))
    inside = (share - cumulated[place - 1]) / (cumulated[place] - cumulated[place - 1])
    return float((place - 1 + inside) * 2 / HISTOGRAM_BINS - 1)
