"""The method on a GPU, in Triton: one upload and three launches for all layers together; nothing waits for the device.

The pairs are judged, the accepted ones blended into a buffer, and the buffer is written back, so that no row changes
while another pair may read it. One program of a launch handles one pair. The arithmetic is the reference's.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from inmerge_optim.drawing import Indices
from inmerge_optim.merging import COSINE_UNIT, DrawnLayer, to_device

# The rows of the table, which has a column per pair: the address of the kernel that is merged, those of the two that
# are blended (the nearer one and the farther), and where the blend begins in the buffer; then, alike for all pairs of a
# layer, the length of a kernel, the bits of tau and of the farther kernel's share, the layer's row in the tallies, and
# whether the pairs that are not above tau are merged instead.
_OWN, _NEAR, _FAR, _START = (tl.constexpr(row) for row in range(4))
_LENGTH, _TAU, _SHARE, _TALLY, _DISSIMILAR, _ROWS = (tl.constexpr(row) for row in range(4, 10))

_BLOCK = tl.constexpr(512)  # weights that a program handles at a time
_UNIT = tl.constexpr(COSINE_UNIT)
_ROUNDER = tl.constexpr(1.5 * 2.0**52)  # added and taken away, it rounds a float64 below 2**51, halves to even


def merge_on_gpu_(layers: Mapping[int, DrawnLayer], tallies: Tensor) -> None:
    """Merge weights of one dtype on one device in place.

    Args:
        layers: by their row in ``tallies``, with kernels as rows, (n, d), and rules that need no order.
        tallies: what is merged is added to it; int64, (layers, 2), on the device.
    """
    weights = [layer.weight for layer in layers.values()]
    dtype, device = weights[0].dtype, tallies.device
    pairs = _describe_pairs(layers)
    (table,) = to_device([pairs.ravel()], device)
    buffer = torch.empty(int(pairs[_LENGTH.value].sum()), dtype=dtype, device=device)
    accepted = torch.empty(pairs.shape[1], dtype=torch.int8, device=device)
    grid, wide = (pairs.shape[1],), dtype == torch.float64
    with torch.cuda.device_of(tallies):
        _judge[grid](table, buffer, accepted, tallies, WIDE=wide)
        # Fused, a multiplication and an addition would be rounded once where the reference rounds twice.
        _blend[grid](table, buffer, accepted, WIDE=wide, enable_fp_fusion=False)
        _write_back[grid](table, buffer, accepted)
    torch.autograd.graph.increment_version(weights)


def _describe_pairs(layers: Mapping[int, DrawnLayer]) -> npt.NDArray[np.int64]:
    """Return the table of the pairs of all layers."""
    addresses, alike, sizes = [], [], []
    for index, (weight, pairs, rule, others, _) in layers.items():
        own, donors = _addresses(weight, pairs.picked), _addresses(weight if others is None else others, pairs.partners)
        own_is_near, length = rule.merge_weight >= 0.5, weight.shape[1]
        addresses.append([own, own, donors] if own_is_near else [own, donors, own])
        share = 1 - rule.merge_weight if own_is_near else rule.merge_weight
        tau, share_bits = np.array([rule.threshold.cosine(length), share]).view(np.int64).tolist()
        alike.append([length, tau, share_bits, index, int(rule.criterion == "dissimilar")])
        sizes.append(own.size)
    table = np.empty((_ROWS.value, sum(sizes)), np.int64)
    table[_LENGTH.value :] = np.repeat(np.array(alike, np.int64).T, sizes, axis=1)
    table[: _START.value] = np.concatenate(addresses, axis=1)
    table[_START.value] = np.cumsum(table[_LENGTH.value]) - table[_LENGTH.value]
    return table


def _addresses(rows: Tensor, indices: Indices) -> Indices:
    return rows.data_ptr() + indices * (rows.stride(0) * rows.element_size())


@triton.jit
def _judge(table, buffer, accepted, tallies, WIDE: tl.constexpr):
    """Say of each pair whether it is to be merged, and count it (merging.pair_cosines, merging.accept_pairs)."""
    pair, pairs = tl.program_id(0), tl.num_programs(0)
    near = tl.load(table + _NEAR * pairs + pair).to(buffer.dtype)
    far = tl.load(table + _FAR * pairs + pair).to(buffer.dtype)
    length = tl.load(table + _LENGTH * pairs + pair)
    near_scale, far_scale = tl.full([], 1, tl.float64), tl.full([], 1, tl.float64)
    if WIDE:  # the squares of narrower types stay in the range of float64
        near_scale, far_scale = _largest(near, length), _largest(far, length)
    dots = tl.zeros([_BLOCK], tl.float64)
    near_squares, far_squares = tl.zeros([_BLOCK], tl.float64), tl.zeros([_BLOCK], tl.float64)
    for start in range(0, length, _BLOCK):
        columns = start + tl.arange(0, _BLOCK)
        a = tl.load(near + columns, columns < length, 0).to(tl.float64)
        b = tl.load(far + columns, columns < length, 0).to(tl.float64)
        if WIDE:
            a, b = a / near_scale, b / far_scale
        dots, near_squares, far_squares = dots + a * b, near_squares + a * a, far_squares + b * b
    norms = tl.sqrt(tl.sum(near_squares) * tl.sum(far_squares))
    units = tl.sum(dots) / tl.where(norms > 0, norms, 1) / _UNIT + _ROUNDER - _ROUNDER
    above = units * _UNIT > tl.load(table + _TAU * pairs + pair).to(tl.float64, bitcast=True)
    dissimilar = tl.load(table + _DISSIMILAR * pairs + pair) != 0
    merged = (above != dissimilar) & (units == units)  # a pair with a non-finite kernel has NaN
    tl.store(accepted + pair, merged.to(tl.int8))
    tally = tallies + 2 * tl.load(table + _TALLY * pairs + pair)
    tl.atomic_add(tally, 1, merged)
    tl.atomic_add(tally + 1, units.to(tl.int64), merged)


@triton.jit
def _largest(row, length):
    """Return the largest absolute value of a row, or 1 where that is 0."""
    largest = tl.zeros([_BLOCK], tl.float64)
    for start in range(0, length, _BLOCK):
        columns = start + tl.arange(0, _BLOCK)
        largest = tl.maximum(largest, tl.abs(tl.load(row + columns, columns < length, 0).to(tl.float64)))
    scale = tl.max(largest)
    return tl.where(scale > 0, scale, 1)


@triton.jit
def _blend(table, buffer, accepted, WIDE: tl.constexpr):
    """Blend the accepted pairs into the buffer (merging.blend_rows)."""
    pair, pairs = tl.program_id(0), tl.num_programs(0)
    if tl.load(accepted + pair) != 0:
        near = tl.load(table + _NEAR * pairs + pair).to(buffer.dtype)
        far = tl.load(table + _FAR * pairs + pair).to(buffer.dtype)
        merged = buffer + tl.load(table + _START * pairs + pair)
        share = tl.load(table + _SHARE * pairs + pair).to(tl.float64, bitcast=True)
        length = tl.load(table + _LENGTH * pairs + pair)
        for start in range(0, length, _BLOCK):
            columns = start + tl.arange(0, _BLOCK)
            a = tl.load(near + columns, columns < length, 0).to(tl.float64)
            b = tl.load(far + columns, columns < length, 0).to(tl.float64)
            blend = (b * share - a * share) + a
            if not WIDE:  # torch rounds float64 to the half types by way of float32
                blend = blend.to(tl.float32)
            tl.store(merged + columns, blend.to(buffer.dtype.element_ty), columns < length)


@triton.jit
def _write_back(table, buffer, accepted):
    """Copy the blends of the accepted pairs to their kernels."""
    pair, pairs = tl.program_id(0), tl.num_programs(0)
    if tl.load(accepted + pair) != 0:
        own = tl.load(table + _OWN * pairs + pair).to(buffer.dtype)
        merged = buffer + tl.load(table + _START * pairs + pair)
        length = tl.load(table + _LENGTH * pairs + pair)
        for start in range(0, length, _BLOCK):
            columns = start + tl.arange(0, _BLOCK)
            tl.store(own + columns, tl.load(merged + columns, columns < length), columns < length)
