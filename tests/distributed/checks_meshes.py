"""FSDP2 over four ranks: fewer kernels than ranks, replicas of shards (HSDP), two-dimensional splits."""

from __future__ import annotations

import re
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from checks_fsdp2 import merge, shard, sharded_pair, tensor_parallel, tensor_parallel_pair, train
from one_process import SETTINGS, OneProcess, make_model, selected_names
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from inmerge_optim import InMergeOptimizer, check_replicas


def replicated_shards() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


def check_fewer_kernels_than_ranks() -> None:
    model, optimizer, one = sharded_pair()
    assert model[6].weight.to_local().shape[0] == (1, 1, 1, 0)[dist.get_rank()]
    train(model, optimizer, one, steps=3)


def check_replicated_shards() -> None:
    model, optimizer, one = sharded_pair(sharding={"mesh": replicated_shards()})
    assert model[2].weight.placements == (Replicate(), Shard(0))
    train(model, optimizer, one, steps=3)
    assert check_replicas(optimizer) == ["2", "4", "6"]


def check_replicated_shards_are_not_gathered() -> None:
    optimizer = tensor_parallel(make_model(), (Replicate(), Shard(0)), replicated_shards())
    with mock.patch.object(DTensor, "full_tensor", side_effect=AssertionError("gathered")):
        optimizer.step()


def check_differing_replicas_of_a_shard_are_named_on_every_rank() -> None:
    model, optimizer, _ = sharded_pair(sharding={"mesh": replicated_shards()})
    if dist.get_rank() == 3:
        with torch.no_grad():
            model[4].weight.to_local()[0] += 1
            model[6].weight.to_local()[0] += 1
    with pytest.raises(RuntimeError, match=re.escape("the weight of 4 differs between rank 1 and rank 3")):
        check_replicas(optimizer)


def check_kernels_split_over_both_dimensions() -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    for layout in ((Shard(0), Shard(0)), (Shard(0), Shard(1)), (Shard(0), Replicate())):
        merge(*tensor_parallel_pair(layout, mesh=mesh), steps=3)


def check_fsdp2_of_tensor_parallel_weights() -> None:
    """FSDP2 splits the part that tensor parallelism left to each rank: strided shards."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model, plain = make_model(channels=(8, 12, 4)), make_model(channels=(8, 12, 4))
    names = selected_names(model)
    for name in names:
        module = model.get_submodule(name)
        module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh["tensor"], (Shard(0),)))
    shard(model, mesh=mesh["data"])
    optimizer = InMergeOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), model, **{**SETTINGS, "names": names})
    one = OneProcess(plain, optimizer)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        one.check()
