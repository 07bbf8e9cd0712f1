"""Do the ranks still hold the same weights? A check for runs on mixed hardware."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from inmerge_optim.optimizer import InMergeOptimizer
from inmerge_optim.sharding import is_sharded

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class _Held(NamedTuple):
    """What one rank holds of a weight: which part of it (its place among the shards), and the checksum of its bits."""

    place: tuple[int, ...]
    checksum: int


def check_replicas(optimizer: Optimizer) -> list[str]:
    """Compare the merged layers' weights over the ranks, to the bit, by their checksums.

    Merging keeps the replicas of a weight identical as long as they were identical before it. On mixed hardware they
    may not be: cosines that are rounded differently may fall on two sides of the threshold. A call every epoch or so
    tells; it copies the weights to the host, and every rank must make it.

    Args:
        optimizer: an InMergeOptimizer, or accelerate's wrapper of one.

    Returns:
        The names of the layers that were compared: those of which several ranks hold the same part, as under DDP, and
        under FSDP2 with replicas (HSDP). It is empty for one process, without a process group, and where every rank
        holds a part of its own (plain FSDP2): there is nothing to compare then.

    Raises:
        RuntimeError: two ranks hold different weights, on every rank; it names the first layer that differs.
        TypeError: ``optimizer`` is no InMergeOptimizer.

    Example:
        >>> from torch import nn
        >>> from inmerge_optim import InMergeOptimizer
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten())
        >>> optimizer = InMergeOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), model, names=["2"])
        >>> check_replicas(optimizer)  # one process
        []
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(optimizer, InMergeOptimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}, but it must be an InMergeOptimizer")
    if not dist.is_available() or not dist.is_initialized():
        return []
    weights = optimizer._binding.weights(optimizer.param_groups)
    ours = {optimizer._binding.listed[index].name: _held(weight) for index, weight in weights.items()}
    everyone: list[dict[str, _Held]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, ours)
    compared = []
    for name in dict.fromkeys(name for theirs in everyone for name in theirs):
        holders = [(rank, theirs[name]) for rank, theirs in enumerate(everyone) if name in theirs]
        first: dict[tuple[int, ...], tuple[int, int]] = {}
        for rank, held in holders:
            other, checksum = first.setdefault(held.place, (rank, held.checksum))
            if held.checksum != checksum:
                raise RuntimeError(
                    f"the weight of {name} differs between rank {other} and rank {rank}, which should hold the same: "
                    "start all ranks from one checkpoint, on hardware and libraries of one kind"
                )
        if len(first) < len(holders):
            compared.append(name)
    return compared


def _held(weight: Tensor) -> _Held:
    place: tuple[int, ...] = ()
    if is_sharded(weight):
        sharded = cast("DTensor", weight)
        coordinates = zip(sharded.device_mesh.get_coordinate() or (), sharded.placements, strict=False)
        place = tuple(coordinate for coordinate, placement in coordinates if not placement.is_replicate())
        weight = sharded.to_local()
    return _Held(place, zlib.crc32(weight.detach().cpu().flatten().view(torch.uint8).numpy().data))
