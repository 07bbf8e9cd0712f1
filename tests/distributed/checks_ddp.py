"""Replicas under DDP over two ranks: they stay the same to the bit. Each check runs in both processes at once."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from launching import shared_folder
from one_process import SETTINGS, OneProcess, make_batch, make_model, make_normed_model, same_bits
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from inmerge_optim import InMergeOptimizer, check_replicas


def wrap(model: nn.Module, **settings: Any) -> InMergeOptimizer:
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return InMergeOptimizer(base, model, **{**SETTINGS, **settings})


def loss_of(model: nn.Module, step: int) -> Tensor:
    """A loss on data of this rank's own, with noise from this rank's own global generator."""
    batch = make_batch(10 * step + dist.get_rank())
    return model(batch + 0.1 * torch.randn(batch.shape)).square().mean()


def train_one_step(model: nn.Module, optimizer: InMergeOptimizer, step: int) -> None:
    loss_of(model, step).backward()
    optimizer.step()
    optimizer.zero_grad()


def seed_this_rank() -> None:
    torch.manual_seed(dist.get_rank())
    np.random.seed(dist.get_rank())  # noqa: NPY002


def assert_replicas(model: nn.Module) -> None:
    """Assert that both ranks hold the same weights, to the bit."""
    for name, parameter in model.named_parameters():
        both = [torch.empty_like(parameter.detach()) for _ in range(2)]
        dist.all_gather(both, parameter.detach())
        assert same_bits(*both), f"{name} differs between the ranks"


def merged(optimizer: InMergeOptimizer) -> int:
    return sum(count["merged"] for count in optimizer.merge_counts().values())


def check_channels_are_merged_alike() -> None:
    model, plain = make_normed_model(), make_normed_model()
    optimizer = wrap(model, merge_channels=True)
    one = OneProcess(plain, optimizer, merge_channels=True)
    model = DistributedDataParallel(model)
    for step in range(4):
        train_one_step(model, optimizer, step)
        one.check()
        assert_replicas(model)


def check_replicas_stay_identical_for_200_steps() -> None:
    model, plain = make_model(), make_model()
    optimizer = wrap(model)
    one = OneProcess(plain, optimizer)
    replica = DistributedDataParallel(model)
    seed_this_rank()
    for step in range(200):
        train_one_step(replica, optimizer, step)
        if step % 20 == 19:
            assert_replicas(model)
    one.check()
    assert check_replicas(optimizer) == ["2", "4", "6"]


def check_wrapper_of_a_replica_is_that_of_its_model() -> None:
    model = make_model()
    replica = DistributedDataParallel(model)
    optimizer = wrap(replica)
    assert [layer.name for layer in optimizer.layers if layer.selected] == ["2", "4", "6"]
    train_one_step(replica, optimizer, 0)
    assert_replicas(model)


def check_accumulated_gradients_merge_at_their_step_alone() -> None:
    model, plain = make_model(), make_model()
    optimizer = wrap(model)
    one = OneProcess(plain, optimizer)
    replica = DistributedDataParallel(model)
    seed_this_rank()
    for step in range(12):
        last = step % 3 == 2
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with contextlib.nullcontext() if last else replica.no_sync():
            loss_of(replica, step).backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()
            one.check()
            assert_replicas(model)
        else:
            assert all(map(same_bits, before, model.parameters()))
    assert optimizer.param_groups[0]["inmerge_step"] == 4


def check_layer_that_one_rank_does_not_use_is_merged_on_both() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.branch = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, images: Tensor) -> Tensor:
            features = self.stem(images)
            return self.branch(features) if dist.get_rank() == 0 else features

    torch.manual_seed(0)
    model = Branching()
    optimizer = wrap(model, names=["branch"])
    train_one_step(DistributedDataParallel(model, find_unused_parameters=True), optimizer, 0)
    assert merged(optimizer) > 0
    assert_replicas(model)


def check_overflow_on_one_rank_skips_the_step_on_both() -> None:
    model = make_model()
    optimizer = wrap(model)
    replica = DistributedDataParallel(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(3):
        batch = make_batch(10 * step + dist.get_rank())
        if step == 1 and dist.get_rank() == 1:
            batch[0] = float("inf")
        scaler.scale(replica(batch).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert optimizer.param_groups[0]["inmerge_step"] == 2
    assert_replicas(model)


def check_ranks_may_join_and_leave_at_a_resume() -> None:
    """One process saves, two go on, and one of them goes on alone: each resumes at the step that was saved."""
    with shared_folder() as folder:
        if dist.get_rank() == 0:
            alone = make_model()
            optimizer = wrap(alone)
            for step in range(5):
                train_one_step(alone, optimizer, step)
            save(folder / "one.pt", alone, optimizer)
        dist.barrier()
        seed_this_rank()
        model = make_model(seed=dist.get_rank())
        optimizer = load(folder / "one.pt", model)
        one = OneProcess(make_model(), optimizer)
        replica = DistributedDataParallel(model)
        for step in range(5, 10):
            train_one_step(replica, optimizer, step)
            one.check()
            assert_replicas(model)
        assert optimizer.param_groups[0]["inmerge_step"] == 10
        if dist.get_rank() == 0:
            save(folder / "two.pt", model, optimizer)
            alone = make_model(seed=1)
            optimizer = load(folder / "two.pt", alone)
            one = OneProcess(make_model(), optimizer)
            train_one_step(alone, optimizer, 10)
            one.check()
            assert optimizer.param_groups[0]["inmerge_step"] == 11


def save(path: Any, model: nn.Module, optimizer: InMergeOptimizer) -> None:
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)


def load(path: Any, model: nn.Module) -> InMergeOptimizer:
    saved = torch.load(path)
    model.load_state_dict(saved["model"])
    optimizer = wrap(model)
    optimizer.load_state_dict(saved["optimizer"])
    return optimizer


def check_differing_replicas_are_named_on_both_ranks() -> None:
    model = make_model()
    optimizer = wrap(model)
    with torch.no_grad():
        model[0].weight[0] += dist.get_rank()  # not selected: none of its business
        model[4].weight[0, 0, 0, 0] *= 1 + 1e-6 * dist.get_rank()
        model[6].weight[0] += dist.get_rank()
    with pytest.raises(RuntimeError, match="the weight of 4 differs between rank 0 and rank 1"):
        check_replicas(optimizer)


def check_state_sharded_by_zero_redundancy_optimizer() -> None:
    """ZeRO's first stage leaves parameters whole on every rank, so it is a base like any other."""
    model, plain = make_model(), make_model()
    replica = DistributedDataParallel(model)
    base = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9)
    optimizer = InMergeOptimizer(base, model, **SETTINGS)
    one = OneProcess(plain, optimizer)
    for step in range(5):
        train_one_step(replica, optimizer, step)
        one.check()
        assert_replicas(model)
    base.consolidate_state_dict()
    if dist.get_rank() == 0:
        assert optimizer.state_dict()["param_groups"][0]["inmerge_step"] == 5


def check_fsdp1_is_refused_before_and_after_wrapping() -> None:
    """With the flat parameter and with views of it under the old names, for the whole model or layer by layer."""
    whole, by_layer = None, ModuleWrapPolicy({nn.Conv2d})
    for original, policy in ((False, whole), (False, by_layer), (True, whole), (True, by_layer)):
        flatten = {"use_orig_params": original, "auto_wrap_policy": policy, "device_id": torch.device("cpu")}
        with pytest.raises(ValueError, match=re.escape("sharded by FSDP1")):
            wrap(FullyShardedDataParallel(make_model(), **flatten), names="^[246]")
        model = make_model()
        optimizer = wrap(model)
        flat = FullyShardedDataParallel(model, **flatten)
        flat(make_batch(0)).sum().backward()
        optimizer.param_groups[0]["params"] = list(flat.parameters())  # as accelerate does it
        with pytest.raises(RuntimeError, match="flattened or replaced"):
            optimizer.step()
