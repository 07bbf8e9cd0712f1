"""The method on DTensor weights (FSDP2, tensor parallel): what one process gives, from the shards of several.

Every rank makes the same draws, so every rank knows which kernels go where. Where kernels are split over one
dimension of the mesh (FSDP2, also with replicas), each drawn partner travels to the rank of the kernel that it is
drawn for, those of all layers in one exchange. Any other layout (shards across kernels, kernels split over two
dimensions) is gathered layer by layer, merged, and split again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from inmerge_optim.drawing import Pairs
from inmerge_optim.kernels import Tallies, merge_layers_
from inmerge_optim.merging import DrawnLayer, to_device

if dist.is_available():
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor


def is_sharded(weight: Tensor) -> bool:
    """Say whether a weight is a DTensor, of which this process holds a part."""
    return dist.is_available() and isinstance(weight, DTensor)


def merge_sharded_layers_(layers: Mapping[int, DrawnLayer], tallies: Tallies) -> None:
    """Merge the drawn pairs of several DTensor weights in place; every rank of their meshes must call it.

    Args:
        layers: by their number in ``tallies``.
        tallies: what is merged is added to it, on all ranks together.
    """
    by_rows: dict[tuple[DeviceMesh, int, torch.dtype], dict[int, DrawnLayer]] = {}
    for index, layer in layers.items():
        weight = cast("DTensor", layer.weight)
        axis = _kernel_axis(weight)
        # "random_pairs" permutes acceptances over the ranks, a quantile is one of all ranks' cosines, and what else
        # a channel has may be split otherwise.
        if axis is None or layer.rule.needs_order or layer.channels:
            _merge_gathered_(index, layer, tallies)
        else:
            by_rows.setdefault((weight.device_mesh, axis, weight.dtype), {})[index] = layer
    for (_, axis, _), several in by_rows.items():
        _merge_by_rows_(several, axis, tallies)


def _kernel_axis(weight: DTensor) -> int | None:
    """Return the dimension of the mesh over which whole kernels are split, or None for any other layout."""
    axes = [axis for axis, placement in enumerate(weight.placements) if not placement.is_replicate()]
    placement = weight.placements[axes[0]] if len(axes) == 1 else None
    # The subclass for strided shards lays kernels out otherwise.
    return axes[0] if type(placement) is Shard and placement.dim == 0 else None


def _merge_gathered_(index: int, layer: DrawnLayer, tallies: Tallies) -> None:
    held = [layer.weight, *layer.channels]
    whole = [cast("DTensor", tensor).full_tensor().clone() if is_sharded(tensor) else tensor for tensor in held]
    merge_layers_({index: layer._replace(weight=whole[0], channels=tuple(whole[1:]))}, tallies)
    for tensor, values in zip(held, whole, strict=True):
        if is_sharded(tensor):
            sharded = cast("DTensor", tensor)
            # Every rank has the same whole, so each takes its part of it without asking rank 0 (src_data_rank None).
            parts = distribute_tensor(values, sharded.device_mesh, sharded.placements, src_data_rank=None)
            sharded.to_local().copy_(parts.to_local())


def _merge_by_rows_(layers: Mapping[int, DrawnLayer], axis: int, tallies: Tallies) -> None:
    """Merge weights whose kernels are split over one dimension of their mesh; only the drawn partners travel."""
    drawn = list(layers.values())
    mesh = cast("DTensor", drawn[0].weight).device_mesh
    group, rank, ranks = mesh.get_group(axis), mesh.get_local_rank(axis), mesh.size(axis)
    parts = [cast("DTensor", layer.weight).to_local() for layer in drawn]
    given, own, outgoing, incoming = [], [], [], []
    for layer in drawn:
        length = layer.weight.shape[1:].numel()
        share = -(-layer.weight.shape[0] // ranks)  # kernels per rank, as torch.chunk splits them
        givers, takers = layer.pairs.partners // share, layer.pairs.picked // share
        leave, arrive = np.flatnonzero(givers == rank), np.flatnonzero(takers == rank)
        arrive = arrive[
            np.argsort(givers[arrive], kind="stable")
        ]  # by their givers, as those that leave by their takers
        given.append(layer.pairs.partners[leave] - rank * share)
        own.append(layer.pairs.picked[arrive] - rank * share)
        outgoing.append(np.bincount(takers[leave], minlength=ranks) * length)
        incoming.append(np.bincount(givers[arrive], minlength=ranks) * length)
    sent = [
        part.index_select(0, rows).flatten().split(sizes.tolist())
        for part, rows, sizes in zip(parts, to_device(given, parts[0].device), outgoing, strict=True)
    ]
    outbox = torch.cat([piece for pieces in zip(*sent, strict=True) for piece in pieces])  # by rank, then by layer
    inbox = outbox.new_empty(int(np.sum(incoming)))
    dist.all_to_all_single(
        inbox, outbox, np.sum(incoming, axis=0).tolist(), np.sum(outgoing, axis=0).tolist(), group=group
    )
    pieces = inbox.split(np.stack(incoming, axis=1).flatten().tolist())
    arrived: dict[int, DrawnLayer] = {}
    for index, (layer, part, rows) in enumerate(zip(drawn, parts, own, strict=True)):
        if rows.size:
            pairs = Pairs(rows, np.arange(rows.size), layer.pairs.rounding, layer.pairs.order)
            donors = torch.cat(pieces[index :: len(drawn)]).view(rows.size, -1)
            arrived[index] = DrawnLayer(part, pairs, layer.rule, donors)
    here = Tallies(len(drawn))
    merge_layers_(arrived, here)
    together = here.on(parts[0].device)
    dist.all_reduce(together, group=group)
    tallies.on(together.device).index_add_(0, to_device([np.array(list(layers))], together.device)[0], together)
