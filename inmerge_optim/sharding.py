"""The method on DTensor weights (FSDP2, tensor parallel): what one process gives, from the shards of several.

Every rank makes the same draws, so every rank knows which kernels go where. Where kernels are split over one
dimension of the mesh (FSDP2, also with replicas), each drawn partner travels to the rank of the kernel that it is
drawn for, those of all layers in one exchange. Any other layout (shards across kernels, kernels split over two
dimensions) is gathered layer by layer, merged, and split again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from inmerge_optim.merging import DrawnLayer, merge_layer_, merge_rows_, take_rows, to_device

if dist.is_available():
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor


def is_sharded(weight: Tensor) -> bool:
    """Say whether a weight is a DTensor, of which this process holds a part."""
    return dist.is_available() and isinstance(weight, DTensor)


def merge_sharded_layers_(layers: Sequence[DrawnLayer]) -> list[Tensor]:
    """Merge the drawn pairs of several DTensor weights in place; every rank of their meshes must call it.

    Returns:
        The tally of each, on all ranks together, as merge_layer_ has it.
    """
    tallies: dict[int, Tensor] = {}
    by_rows: dict[tuple[DeviceMesh, int, torch.dtype], list[int]] = {}
    for index, layer in enumerate(layers):
        weight = cast("DTensor", layer.weight)
        axis = _kernel_axis(weight)
        # "random_pairs" permutes acceptances over the ranks, and a quantile is one of all ranks' cosines.
        if axis is None or layer.rule.criterion == "random_pairs" or layer.rule.threshold.kind == "quantile":
            tallies[index] = _merge_gathered_(layer)
        else:
            by_rows.setdefault((weight.device_mesh, axis, weight.dtype), []).append(index)
    for (_, axis, _), indices in by_rows.items():
        tallies.update(zip(indices, _merge_by_rows_([layers[index] for index in indices], axis), strict=True))
    return [tallies[index] for index in range(len(layers))]


def _kernel_axis(weight: DTensor) -> int | None:
    """Return the dimension of the mesh over which whole kernels are split, or None for any other layout."""
    axes = [axis for axis, placement in enumerate(weight.placements) if not placement.is_replicate()]
    placement = weight.placements[axes[0]] if len(axes) == 1 else None
    # The subclass for strided shards lays kernels out otherwise.
    return axes[0] if type(placement) is Shard and placement.dim == 0 else None


def _merge_gathered_(layer: DrawnLayer) -> Tensor:
    weight = cast("DTensor", layer.weight)
    whole = weight.full_tensor().clone()
    tally = merge_layer_(layer._replace(weight=whole))
    # Every rank has the same whole, so each takes its part of it without asking rank 0 (src_data_rank None).
    parts = distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None)
    weight.to_local().copy_(parts.to_local())
    return tally


def _merge_by_rows_(layers: Sequence[DrawnLayer], axis: int) -> list[Tensor]:
    """Merge weights whose kernels are split over one dimension of their mesh; only the drawn partners travel."""
    mesh = cast("DTensor", layers[0].weight).device_mesh
    group, rank, ranks = mesh.get_group(axis), mesh.get_local_rank(axis), mesh.size(axis)
    parts = [cast("DTensor", layer.weight).to_local() for layer in layers]
    arrays, outgoing, incoming = [], [], []
    for layer in layers:
        length = layer.weight.shape[1:].numel()
        share = -(-layer.weight.shape[0] // ranks)  # kernels per rank, as torch.chunk splits them
        givers, takers = layer.pairs.partners // share, layer.pairs.picked // share
        given, taken = np.flatnonzero(givers == rank), np.flatnonzero(takers == rank)
        taken = taken[np.argsort(givers[taken], kind="stable")]  # as they arrive; ``given`` has its takers in order
        arrays += [layer.pairs.partners[given] - rank * share, layer.pairs.picked[taken] - rank * share]
        outgoing.append(np.bincount(takers[given], minlength=ranks) * length)
        incoming.append(np.bincount(givers[taken], minlength=ranks) * length)
    indices = to_device(arrays, parts[0].device)
    sent = [
        part.index_select(0, rows).flatten().split(sizes.tolist())
        for part, rows, sizes in zip(parts, indices[0::2], outgoing, strict=True)
    ]
    outbox = torch.cat([piece for pieces in zip(*sent, strict=True) for piece in pieces])  # by rank, then by layer
    inbox = outbox.new_empty(int(np.sum(incoming)))
    dist.all_to_all_single(
        inbox, outbox, np.sum(incoming, axis=0).tolist(), np.sum(outgoing, axis=0).tolist(), group=group
    )
    pieces = inbox.split(np.stack(incoming, axis=1).flatten().tolist())
    tallies, no_order = [], indices[0].new_empty(0)
    for place, (layer, part, rows) in enumerate(zip(layers, parts, indices[1::2], strict=True)):
        own = take_rows(part, rows)
        donors = torch.cat(pieces[place :: len(layers)]).view(own.shape).to(own.dtype)
        tallies.append(merge_rows_(part, rows, own, donors, layer.rule, layer.pairs.rounding, no_order))
    together = torch.stack(tallies)
    dist.all_reduce(together, group=group)
    return list(together)
