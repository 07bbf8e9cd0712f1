"""The method: which kernels are drawn, which pairs are merged, and how (Algorithm 1 of the paper).

In-Model Merging (InMerge), from Wang, Almakky, Ma, Saeed, Yaqub: "In-Model Merging for Enhancing the Robustness of
Medical Imaging Classification Models". A kernel is the weight of one output channel, ``weight[i]``, flattened.

The random choices are made on the host from a NumPy generator, so that they are the same on every rank, device and
dtype; the cosines and the merges are computed where the weight is, and nothing waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeGuard, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Criterion = Literal["similar", "dissimilar", "any"]
Indices = npt.NDArray[np.int64]
Setting = TypeVar("Setting", bound=float | str)

COSINE_UNIT = 2.0**-24  # cosines are summed as whole numbers of it: in any order and on any shard to the same bits
CRITERIA: tuple[Criterion, ...] = ("similar", "dissimilar", "any")


class Threshold(NamedTuple):
    """tau, which the cosine of a pair must exceed, as the user meant it; see parse_threshold.

    Attributes:
        kind: what ``value`` is: the cosine itself, a number of standard deviations of the cosine of two random rows
            (1/sqrt(d) for rows of length d), or a quantile of the cosines that a step draws in a layer.
        value: in [-1, 1], any number, or a share in [0, 1].
    """

    kind: Literal["cosine", "sd", "quantile"]
    value: float


class Rule(NamedTuple):
    """How a drawn pair is judged and merged: alpha, tau and which side of tau is merged."""

    merge_weight: float
    threshold: Threshold
    criterion: Criterion = "similar"


class DrawnLayer(NamedTuple):
    """A weight and the random choices of one step for it.

    Attributes:
        weight: floating point, of any shape, with the kernels on dim 0.
        picked: the kernels to change, each at most once, (m,).
        partners: the kernels that they are pulled towards, (m,).
        shuffle: a permutation of m places, by which the criterion "any" hands the acceptances round.
    """

    weight: Tensor
    picked: Indices
    partners: Indices
    shuffle: Indices


def parse_threshold(value: float | str) -> Threshold:
    """Read a similarity threshold.

    Args:
        value: a cosine in [-1, 1], as in the paper; "4sd" for so many standard deviations of the cosine of two random
            rows, k/sqrt(d) for kernels of d weights; "q0.9" for the quantile, in [0, 1], of the cosines of the pairs
            that a step draws in a layer, by which about a tenth of them merges.

    Raises:
        ValueError: it is none of these.

    Example:
        >>> parse_threshold(0.3), parse_threshold("4sd")
        (Threshold(kind='cosine', value=0.3), Threshold(kind='sd', value=4.0))
    """
    if isinstance(value, str):
        number = value[1:] if value.startswith("q") else value.removesuffix("sd")
        try:
            found = float(number)
        except ValueError:
            found = math.nan
        if value.startswith("q") and 0 <= found <= 1:
            return Threshold("quantile", found)
        if value.endswith("sd") and math.isfinite(found):
            return Threshold("sd", found)
    elif _is_number(value) and -1 <= value <= 1:
        return Threshold("cosine", value)
    raise ValueError(
        f"similarity_threshold is {value!r}, but it must be a number from -1 to 1, '<k>sd' or 'q<share from 0 to 1>'"
    )


def check_setting(name: str, value: Setting) -> Setting:
    """Return ``value`` if the setting ``name`` may have it: a number in [0, 1], or what parse_threshold can read.

    Raises:
        ValueError: it may not.
    """
    if name == "similarity_threshold":
        parse_threshold(value)
    elif not _is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} is {value!r}, but it must be a number from 0 to 1")
    return value


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def check_criterion(criterion: str) -> Criterion:
    """Return ``criterion`` if it is one of CRITERIA.

    Raises:
        ValueError: it is not.
    """
    for known in CRITERIA:
        if criterion == known:
            return known
    raise ValueError(f"criterion is {criterion!r}, but it must be one of {', '.join(CRITERIA)}")


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

    Example:
        >>> picked, partners = draw_pairs(4, groups=2, merge_prob=1.0, rng=np.random.default_rng(0))
        >>> picked.tolist(), partners.tolist()
        ([0, 1, 2, 3], [1, 0, 3, 2])
    """
    group_size = kernels // groups
    if group_size < 2:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    picked = np.flatnonzero(rng.random(kernels) < merge_prob).astype(np.int64, copy=False)
    # Going 1 ... size - 1 places on, round the group, reaches every kernel of it but the picked one.
    places = rng.integers(1, group_size, size=picked.size)
    partners = picked - picked % group_size + (picked + places) % group_size
    return picked, partners


def to_device(arrays: Sequence[Indices], device: torch.device) -> list[Tensor]:
    """Copy arrays of indices to ``device`` in one go, without waiting for it (a GPU reads pinned memory itself)."""
    joined = torch.from_numpy(np.concatenate(arrays))
    if device.type == "cuda":
        joined = joined.pin_memory()
    return list(joined.to(device, non_blocking=True).split([array.size for array in arrays]))


def take_rows(weight: Tensor, rows: Tensor) -> Tensor:
    """Return kernels as rows of shape (len(rows), row length), copied, in at least float32."""
    taken = weight.index_select(0, rows).reshape(rows.numel(), weight.shape[1:].numel())
    return taken.to(torch.promote_types(weight.dtype, torch.float32))


def pair_cosines(own: Tensor, donors: Tensor) -> Tensor:
    """Return the cosines of pairs of rows, (m,), from two tensors of (m, d), float32 or float64.

    The cosine of a zero row is 0; a pair with a non-finite row has NaN.
    """
    # Scaled to a largest entry of 1, neither tiny nor huge kernels leave the range of the squares; inf / inf is NaN.
    own_scale, donor_scale = own.abs().amax(1, keepdim=True), donors.abs().amax(1, keepdim=True)
    a = own / torch.where(own_scale > 0, own_scale, 1)
    b = donors / torch.where(donor_scale > 0, donor_scale, 1)
    norms = (a * a).sum(1).sqrt() * (b * b).sum(1).sqrt()
    return (a * b).sum(1) / torch.where(norms > 0, norms, 1)


def accept_pairs(cosines: Tensor, row_length: int, rule: Rule, shuffle: Tensor | None = None) -> Tensor:
    """Say which pairs are to be merged (Algorithm 1, the comparison with tau).

    Args:
        cosines: of the drawn pairs, (m,), as pair_cosines has them.
        row_length: d, the weights of a kernel.
        rule: "similar" and "any" accept cosines above its threshold, "dissimilar" the others.
        shuffle: a permutation of m places, by which "any" hands the acceptances round among the pairs.

    Returns:
        A mask of m booleans; a pair without a cosine is never accepted.
    """
    accepted = cosines > _cosine_threshold(cosines, row_length, rule.threshold)
    if rule.criterion == "dissimilar":
        accepted = ~accepted
    elif rule.criterion == "any":
        accepted = accepted[shuffle]
    return accepted & cosines.isfinite()


def _cosine_threshold(cosines: Tensor, row_length: int, threshold: Threshold) -> Tensor | float:
    """Return the cosine that a threshold stands for among the drawn pairs of a layer, without reading them."""
    if threshold.kind == "cosine":
        return threshold.value
    if threshold.kind == "sd":
        return threshold.value / math.sqrt(row_length)
    if not cosines.numel():
        return 1.0
    # The closest observation (Hyndman and Fan's type 3): as near to q of the pairs as whole ones allow are not above
    # it, without bias where few are drawn. Sorting puts NaN last.
    not_above = (threshold.value * cosines.isfinite().sum()).round().clamp(min=1).long()
    return cosines.sort().values.index_select(0, not_above.reshape(1) - 1)


def blend_rows(own: Tensor, donors: Tensor, merge_weight: float) -> Tensor:
    """Return ``merge_weight * own + (1 - merge_weight) * donors`` (Algorithm 1, the update of K_i).

    It starts from the nearer end and adds the weighted difference, so that equal rows stay equal to the bit, and in
    single rounded operations, so that the bits don't depend on how the rows lie in memory.
    """
    near, far, share = (own, donors, 1 - merge_weight) if merge_weight >= 0.5 else (donors, own, merge_weight)
    return (far - near) * share + near


def put_rows_(weight: Tensor, rows: Tensor, merged: Tensor, accepted: Tensor) -> None:
    """Write the accepted ones of ``merged`` over the kernels ``rows`` of ``weight``, in place; the others stay."""
    kept = weight.index_select(0, rows)
    mask = accepted.reshape(-1, *[1] * (kept.dim() - 1))
    weight.index_copy_(0, rows, torch.where(mask, merged.reshape(kept.shape).to(weight.dtype), kept))


def merge_rows_(
    weight: Tensor, rows: Tensor, own: Tensor, donors: Tensor, rule: Rule, shuffle: Tensor | None = None
) -> Tensor:
    """Merge the kernels ``rows`` of ``weight``, which are ``own``, with ``donors`` in place.

    Returns:
        The tally: how many kernels were merged, and the sum of their cosines in COSINE_UNIT; int64, (2,), on the
        weight's device.
    """
    cosines = pair_cosines(own, donors)
    accepted = accept_pairs(cosines, own.shape[1], rule, shuffle)
    put_rows_(weight, rows, blend_rows(own, donors, rule.merge_weight), accepted)
    units = (torch.where(accepted, cosines, 0) / COSINE_UNIT).round().long()
    return torch.stack((accepted, units)).sum(1)


def merge_pairs_(weight: Tensor, picked: Tensor, partners: Tensor, shuffle: Tensor, rule: Rule) -> Tensor:
    """Merge drawn pairs of kernels in place; the arguments are those of DrawnLayer, on the weight's device.

    All reads come from the weight as it was, so the order of the pairs does not matter.

    Returns:
        The tally of merge_rows_.
    """
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        own, donors = take_rows(weight, picked), take_rows(weight, partners)
        return merge_rows_(weight, picked, own, donors, rule, shuffle)


def merge_layers_(layers: Sequence[DrawnLayer], rule: Rule) -> list[Tensor]:
    """Merge the drawn pairs of several weights in place, with one copy of indices to each device.

    Returns:
        The tally of each, as merge_rows_ has it.
    """
    tallies: dict[int, Tensor] = {}
    for device in dict.fromkeys(layer.weight.device for layer in layers):
        here = [place for place, layer in enumerate(layers) if layer.weight.device == device]
        indices = iter(to_device([array for place in here for array in layers[place][1:]], device))
        for place in here:
            tallies[place] = merge_pairs_(layers[place].weight, next(indices), next(indices), next(indices), rule)
    return [tallies[place] for place in range(len(layers))]


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
        criterion: "similar" is the paper's; "dissimilar" merges the pairs whose cosine is not above tau; "any"
            merges as many as "similar" does, taken from the drawn pairs whatever their cosine.
        rng: the generator of the random choices; it advances.

    Returns:
        How many kernels were merged: an int64 tensor without dimensions, on the weight's device, not yet read.

    Raises:
        ValueError: a setting out of range, or groups that don't divide the kernels.
        TypeError: a weight that is not floating point.

    Example:
        >>> weight = torch.tensor([[1.0, 0.0], [1.0, 0.2], [0.0, 1.0]])
        >>> settings = dict(merge_prob=1.0, merge_weight=0.5, similarity_threshold=0.3)
        >>> int(merge_kernels_(weight, **settings, rng=np.random.default_rng(1)))
        1
    """
    check_setting("merge_prob", merge_prob)
    check_setting("merge_weight", merge_weight)
    rule = Rule(merge_weight, parse_threshold(similarity_threshold), check_criterion(criterion))
    if not weight.is_floating_point():
        raise TypeError(f"the weight is {weight.dtype}, but kernels of floating point numbers are merged")
    if weight.dim() == 0 or groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups is {groups}, but it must divide the kernels of a weight of {tuple(weight.shape)}")
    picked, partners = draw_pairs(weight.shape[0], groups, merge_prob, rng)
    layer = DrawnLayer(weight, picked, partners, rng.permutation(picked.size))
    return merge_layers_([layer], rule)[0][0]
