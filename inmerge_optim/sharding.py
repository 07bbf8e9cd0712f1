"""The method on DTensor weights (FSDP2): what one process gives, from the shards of several.

Every rank makes the same draws, so every rank knows which kernels are wanted from which others. Where kernels are
split over a one-dimensional mesh, the wanted rows of all layers travel in one all-reduce; any other layout (HSDP,
shards across kernels, two-dimensional meshes) is gathered layer by layer, merged, and split again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from inmerge_optim.merging import (
    DrawnLayer,
    Rule,
    accept_pairs,
    blend_rows,
    merge_layers_,
    put_rows_,
    take_rows,
    to_device,
)

if dist.is_available():
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor


def is_sharded(weight: Tensor) -> bool:
    """Say whether a weight is a DTensor, of which this process holds a part."""
    return dist.is_available() and isinstance(weight, DTensor)


def merge_sharded_layers_(layers: Sequence[DrawnLayer], rule: Rule) -> list[Tensor]:
    """Merge the drawn pairs of several DTensor weights in place; every rank of their meshes must call it.

    Returns:
        How many kernels were merged in each, on all ranks together, as merge_pairs_ does.
    """
    counts: dict[int, Tensor] = {}
    by_rows: dict[object, list[int]] = {}
    for place, layer in enumerate(layers):
        weight = cast("DTensor", layer.weight)
        # "any" hands acceptances from pair to pair, and so from rank to rank.
        if weight.device_mesh.ndim == 1 and _splits_kernels(weight) and rule.criterion != "any":
            by_rows.setdefault((weight.device_mesh, weight.dtype), []).append(place)
        else:
            counts[place] = _merge_gathered_(layer, rule)
    for places in by_rows.values():
        counts.update(zip(places, _merge_by_rows_([layers[place] for place in places], rule), strict=True))
    return [counts[place] for place in range(len(layers))]


def _splits_kernels(weight: DTensor) -> bool:
    placement = weight.placements[0]
    return type(placement) is Shard and placement.dim == 0  # its subclass for strided shards lays rows out otherwise


def _merge_gathered_(layer: DrawnLayer, rule: Rule) -> Tensor:
    weight = cast("DTensor", layer.weight)
    whole = weight.full_tensor().clone()
    (count,) = merge_layers_([layer._replace(weight=whole)], rule)
    # Every rank has the same whole, so each takes its part of it without asking rank 0 (src_data_rank None).
    parts = distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None)
    weight.to_local().copy_(parts.to_local())
    return count


def _merge_by_rows_(layers: Sequence[DrawnLayer], rule: Rule) -> list[Tensor]:
    """Merge weights whose kernels are split over the ranks of one mesh; only the partners' rows travel."""
    mesh = cast("DTensor", layers[0].weight).device_mesh
    group, rank, ranks = mesh.get_group(), mesh.get_local_rank(), mesh.size()
    locals_ = [cast("DTensor", layer.weight).to_local() for layer in layers]
    device, dtype = locals_[0].device, locals_[0].dtype
    arrays = []
    for layer in layers:
        part = -(-layer.weight.shape[0] // ranks)  # kernels per rank, as torch.chunk splits them
        given, changed = (np.flatnonzero(rows // part == rank) for rows in (layer.partners, layer.picked))
        first = rank * part
        arrays += [given, layer.partners[given] - first, changed, layer.picked[changed] - first]
    indices = to_device(arrays, device)
    sizes = [(layer.picked.size, layer.weight.shape[1:].numel()) for layer in layers]
    donated = torch.zeros(sum(pairs * length for pairs, length in sizes), dtype=dtype, device=device)
    blocks = [block.view(size) for block, size in zip(donated.split([m * d for m, d in sizes]), sizes, strict=True)]
    for block, local, places, rows in zip(blocks, locals_, indices[0::4], indices[1::4], strict=True):
        block.index_copy_(0, places, take_rows(local, rows).to(dtype))
    dist.all_reduce(donated, group=group)
    counts = torch.zeros(len(layers), dtype=torch.int64, device=device)
    for count, block, local, places, rows in zip(counts, blocks, locals_, indices[2::4], indices[3::4], strict=True):
        own = take_rows(local, rows)
        donors = block.index_select(0, places).to(own.dtype)
        accepted = accept_pairs(own, donors, rule)
        put_rows_(local, rows, blend_rows(own, donors, rule.merge_weight), accepted)
        count.copy_(accepted.sum())
    dist.all_reduce(counts, group=group)
    return list(counts)
