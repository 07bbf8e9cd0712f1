"""The fast paths of the method: judge first, then touch. They merge what merging.py merges, which is the reference.

At the paper's threshold about one pair in a hundred is accepted, so most of a merge is reading. On the host three dot
products in float32 tell how similar two kernels are, to within a known error; the few pairs that lie nearer to the
threshold than that are judged by the reference, and the accepted rows alone are blended and written. On a GPU, Triton
does it for all layers in three launches. The rest (other devices, tensor subclasses, weights whose kernels are no rows
in memory) goes the reference's way.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from inmerge_optim.callers import user_stacklevel
from inmerge_optim.drawing import Indices, Pairs
from inmerge_optim.merging import (
    COSINE_UNIT,
    DrawnLayer,
    accept_pairs,
    blend_rows,
    merge_layer_,
    pair_cosines,
    take_rows,
)
from inmerge_optim.settings import Rule, Threshold

_Floats = npt.NDArray[np.float64]
_Mask = npt.NDArray[np.bool_]

# How many weights are gathered at a time, of either side: twice as many of float32 stay in a core's own cache.
_BLOCK = 2**16
# How many are judged by the reference, or blended, at a time, in float64 and with their intermediate results.
_EXACT_BLOCK = 2**13
# Squared norms between these have lost nothing to underflow or overflow in float32.
_LEAST_SQUARE, _LARGEST_SQUARE = 2.0**-80, 2.0**100


class Tallies:
    """How many pairs of each layer were merged, and the sum of their cosines in COSINE_UNIT, by device."""

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._counts: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """Return the counts of what is merged on a device, to be added to: int64, (layers, 2)."""
        if device not in self._counts:
            self._counts[device] = torch.zeros(self._layers, 2, dtype=torch.int64, device=device)
        return self._counts[device]

    def read(self) -> list[list[int]]:
        """Return the counts of all devices together, by layer; it waits for the devices."""
        total = torch.zeros(self._layers, 2, dtype=torch.int64, device="cpu")  # whatever torch's default device is
        for counts in self._counts.values():
            total += counts.cpu()
        found: list[list[int]] = total.tolist()
        return found

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_layers"])  # type: ignore[misc]
        for counts in state["_counts"].values():  # which may have been loaded to another device than they were on
            self.on(counts.device).add_(counts)


def merge_layers_(layers: Mapping[int, DrawnLayer], tallies: Tallies) -> None:
    """Merge the drawn pairs of several weights in place, as merge_layer_ does one by one.

    Whichever way a weight goes, the same pairs are merged but for those within float64's rounding of the threshold,
    to the same bits. On the host, the cosines that are added up have the rounding of float32.

    Args:
        layers: by their number in ``tallies``.
        tallies: what is merged is added to it.
    """
    on_host: dict[int, DrawnLayer] = {}
    on_gpu: dict[tuple[torch.device, torch.dtype], dict[int, DrawnLayer]] = {}
    for index, layer in layers.items():
        device, rows = layer.weight.device, _as_rows(layer)
        if rows is not None and device.type == "cpu":
            on_host[index] = rows
        elif rows is not None and not layer.rule.needs_order and not layer.channels and _triton_merge(device):
            on_gpu.setdefault((device, layer.weight.dtype), {})[index] = rows
        else:
            tallies.on(device)[index] += merge_layer_(layer)
    if on_host:
        _merge_on_host_(on_host, tallies.on(torch.device("cpu")))
    for (device, _), several in on_gpu.items():
        if merge_on_gpu_ := _triton_merge(device):
            merge_on_gpu_(several, tallies.on(device))


def _as_rows(layer: DrawnLayer) -> DrawnLayer | None:
    """View a layer's kernels, and what goes with them, as rows, (n, d); None where they are none."""
    weight, pairs, rule, donors, channels = layer
    rows = _in_order(weight)
    of_channels = [ordered for values in channels if (ordered := _in_order(values)) is not None]
    if rows is None or len(of_channels) < len(channels):
        return None
    if donors is not None and not weight.is_contiguous():  # they come in the order of the weight's own dimensions
        return None
    donors = donors if donors is None else donors.view(-1, rows.shape[1])
    return DrawnLayer(rows, pairs, rule, donors, tuple(of_channels))


def _in_order(tensor: Tensor) -> Tensor | None:
    """View a tensor as rows, (n, d), in the order in which their numbers lie in memory; None where they are none."""
    if type(tensor) is not Tensor or not tensor.numel():
        return None
    if not tensor.is_contiguous():  # channels_last, for one
        tensor = tensor.permute(0, *sorted(range(1, tensor.dim()), key=tensor.stride, reverse=True))
        if not tensor[0].is_contiguous():
            return None
    return tensor.view(-1, tensor.numel() // tensor.shape[0])


def _merge_on_host_(layers: Mapping[int, DrawnLayer], tallies: Tensor) -> None:
    """Merge weights in the host's memory, seen as rows."""
    indices, drawn = list(layers), list(layers.values())
    ends = np.cumsum([layer.pairs.picked.size for layer in drawn])
    spans = [slice(end - layer.pairs.picked.size, end) for layer, end in zip(drawn, ends.tolist(), strict=True)]
    with np.errstate(all="ignore"):
        cosines, accepted = _judge(drawn, spans)
    for place in np.unique(np.searchsorted(ends, np.flatnonzero(accepted), side="right")).tolist():
        index, layer, span = indices[place], drawn[place], spans[place]
        chosen = np.flatnonzero(accepted[span])
        _blend_(layer, chosen)
        for values in layer.channels:
            _blend_(layer._replace(weight=values, donors=None), chosen)
        tallies.numpy()[index] += chosen.size, int((cosines[span][chosen] / COSINE_UNIT).sum())


def _judge(layers: Sequence[DrawnLayer], spans: Sequence[slice]) -> tuple[_Floats, _Mask]:
    """Return the cosines of the pairs of all layers, which lie in ``spans``, and which of them are to be merged."""
    dots, own_squares, donor_squares = _products(layers, spans)
    units = np.rint(dots / np.sqrt(own_squares * donor_squares) / COSINE_UNIT)
    cosines = units.clip(-1 / COSINE_UNIT, 1 / COSINE_UNIT) * COSINE_UNIT
    least, largest = np.minimum(own_squares, donor_squares), np.maximum(own_squares, donor_squares)
    in_range = (least > _LEAST_SQUARE) & (largest < _LARGEST_SQUARE)
    _ask_reference(layers, spans, ~in_range, cosines)

    sizes = [layer.pairs.picked.size for layer in layers]
    cuts = np.repeat([_cut(layer, cosines[span]) for layer, span in zip(layers, spans, strict=True)], sizes)
    # A dot product of d terms is off by d units of the norms at most, in whatever order it is summed, and a cosine by
    # twice as much; so is a quantile, which is the cosine of another pair.
    margins = np.repeat([(5 * layer.weight.shape[1] + 1) * COSINE_UNIT for layer in layers], sizes)
    _ask_reference(layers, spans, in_range & (np.abs(cosines - cuts) <= margins), cosines)

    accepted = cosines > cuts
    for layer, span in zip(layers, spans, strict=True):
        if layer.rule.needs_order or layer.rule.criterion != "similar":
            own, order = torch.from_numpy(cosines[span]), torch.from_numpy(layer.pairs.order)
            accepted[span] = accept_pairs(own, layer.weight.shape[1], layer.rule, layer.pairs.rounding, order).numpy()
    return cosines, accepted


def _products(layers: Sequence[DrawnLayer], spans: Sequence[slice]) -> tuple[_Floats, _Floats, _Floats]:
    """Return the dot products of the drawn pairs, and the squared norms of their kernels and of the partners."""
    products = np.empty((3, spans[-1].stop))
    # Rows are gathered into the same block again and again, which stays in the cache.
    block = np.empty(2 * max(_BLOCK, *(layer.weight.shape[1] for layer in layers)))
    for (weight, pairs, _, donors, _), span in zip(layers, spans, strict=True):
        length, count = weight.shape[1], pairs.picked.size
        room = max(1, _BLOCK // length)
        typed: npt.NDArray[np.floating]
        typed = block.view(np.float64 if weight.dtype == torch.float64 else np.float32)
        own_rows = _array(weight)
        donor_rows = own_rows if donors is None else _array(donors)
        for start in range(0, count, room):
            picked, partners = pairs.picked[start : start + room], pairs.partners[start : start + room]
            own, others = typed[: 2 * picked.size * length].reshape(2, -1, length)
            _gather(own_rows, picked, own)
            _gather(donor_rows, partners, others)
            found = products[:, span.start + start : span.start + start + picked.size]
            _dots(own, others, out=found[0])
            _dots(own, own, out=found[1])
            _dots(others, others, out=found[2])
    dots, own_squares, donor_squares = products
    return dots, own_squares, donor_squares


def _array(rows: Tensor) -> npt.NDArray[np.floating] | Tensor:
    """Return rows as an array, if NumPy has their type and gathers them without a copy of them all."""
    return rows.numpy() if rows.dtype in (torch.float32, torch.float64) and rows.is_contiguous() else rows


def _gather(rows: npt.NDArray[np.floating] | Tensor, indices: Indices, out: npt.NDArray[np.floating]) -> None:
    """Copy rows into ``out``, which is of float32 at least."""
    if isinstance(rows, Tensor):
        torch.from_numpy(out).copy_(rows.index_select(0, torch.from_numpy(indices)))
    else:
        rows.take(indices, 0, out, "clip")  # any other mode copies once more


def _einsum(left: npt.NDArray[np.floating], right: npt.NDArray[np.floating], out: _Floats) -> None:
    out[:] = np.einsum("ij,ij->i", left, right)


# Of the rows of two matrices, computed in their type; NumPy 1 has no vecdot.
_dots: Callable[..., object] = getattr(np, "vecdot", _einsum)


def _ask_reference(layers: Sequence[DrawnLayer], spans: Sequence[slice], asked: _Mask, cosines: _Floats) -> None:
    """Replace the cosines of those pairs that are asked for."""
    if not asked.any():
        return
    for layer, span in zip(layers, spans, strict=True):
        pairs = np.flatnonzero(asked[span])
        step = max(1, _EXACT_BLOCK // layer.weight.shape[1])
        for block in (pairs[start : start + step] for start in range(0, len(pairs), step)):
            rows, donor_rows = (torch.from_numpy(side[block]) for side in (layer.pairs.picked, layer.pairs.partners))
            own = take_rows(layer.weight, rows)
            donors = take_rows(layer.weight if layer.donors is None else layer.donors, donor_rows)
            cosines[span][block] = pair_cosines(own, donors).numpy()


def _cut(layer: DrawnLayer, cosines: _Floats) -> float:
    """Return the cosine that tells a layer's pairs apart; of a quantile it is that of the lowest pair above it."""
    threshold = layer.rule.threshold
    if threshold.kind != "quantile":
        return threshold.cosine(layer.weight.shape[1])
    ascending = np.sort(cosines[np.isfinite(cosines)])
    not_above = math.floor(threshold.value * ascending.size + layer.pairs.rounding)
    return float(ascending[min(not_above, ascending.size - 1)]) if ascending.size else 0.0


def _blend_(layer: DrawnLayer, chosen: Indices) -> None:
    """Merge the chosen pairs of a layer, some columns at a time: so all reads come from the weights as they were."""
    rows, donor_rows = (torch.from_numpy(side[chosen]) for side in (layer.pairs.picked, layer.pairs.partners))
    width = max(1, _EXACT_BLOCK // chosen.size)
    for left in range(0, layer.weight.shape[1], width):
        own = layer.weight[:, left : left + width]
        donors = own if layer.donors is None else layer.donors[:, left : left + width]
        merged = blend_rows(take_rows(own, rows), take_rows(donors, donor_rows), layer.rule.merge_weight)
        own.index_copy_(0, rows, merged.to(own.dtype))


@cache
def _triton_merge(device: torch.device) -> Callable[[Mapping[int, DrawnLayer], Tensor], None] | None:
    """Return the merge by Triton's kernels, if a device can have them and INMERGE_TRITON=0 doesn't switch them off."""
    if device.type != "cuda" or os.environ.get("INMERGE_TRITON") == "0" or find_spec("triton") is None:
        return None
    from inmerge_optim.triton_kernels import merge_on_gpu_

    try:
        pair, never = (
            Pairs(np.array([0]), np.array([1]), 0.0, np.empty(0, np.int64)),
            Rule(1.0, Threshold("cosine", 1.0)),
        )
        trial = DrawnLayer(torch.ones(2, 1, device=device), pair, never)
        merge_on_gpu_({0: trial}, torch.zeros(1, 2, dtype=torch.int64, device=device))
    except Exception as error:  # whatever Triton, its compilers and the driver raise
        warnings.warn(
            f"Triton can't run on {device} ({type(error).__name__}: {error}), so kernels are merged by torch's own "
            "operations, some thirty per layer; INMERGE_TRITON=0 in the environment chooses them without this warning",
            stacklevel=user_stacklevel(),
        )
        return None
    return merge_on_gpu_
