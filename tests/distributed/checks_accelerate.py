"""accelerate over two ranks: DDP with accumulation, and FSDP2, with its own saving and loading."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from launching import shared_folder
from one_process import SETTINGS, OneProcess, make_batch, make_model, same_bits, whole
from torch import nn
from torch.distributed.tensor import DTensor

from inmerge_optim import InMergeOptimizer, check_replicas


def start(**options: Any) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(cpu=True, **options)


def start_fsdp2() -> Accelerator:
    accelerator = start()
    # accelerate itself takes FSDP for GPUs and their like alone, so it is told here.
    accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=100, cpu_ram_efficient_loading=False
    )
    return accelerator


def wrap(model: nn.Module) -> InMergeOptimizer:
    return InMergeOptimizer(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), model, **SETTINGS)


def train_one_step(accelerator: Accelerator, model: nn.Module, optimizer: Any, step: int) -> None:
    accelerator.backward(model(make_batch(10 * step + dist.get_rank())).square().mean())
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def check_ddp_merges_at_the_accumulated_step_alone() -> None:
    accelerator = start(gradient_accumulation_steps=3)
    model, plain = make_model(), make_model()
    bare = wrap(model)
    one = OneProcess(plain, bare)
    model, optimizer = accelerator.prepare(model, bare)
    for step in range(12):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with accelerator.accumulate(model):
            train_one_step(accelerator, model, optimizer, step)
        moved = not all(map(same_bits, before, model.parameters()))
        assert moved == (step % 3 == 2)
    one.check()
    assert bare.param_groups[0]["inmerge_step"] == 4
    assert check_replicas(optimizer) == ["2", "4", "6"], "it takes accelerate's wrapper as well"


def check_fsdp2_saves_and_resumes() -> None:
    accelerator = start_fsdp2()
    model, plain = make_model(), make_model()
    bare = wrap(model)
    model, optimizer = accelerator.prepare(model, bare)
    assert isinstance(bare.param_groups[0]["params"][0], DTensor)
    one = OneProcess(plain, bare)
    for step in range(4):
        train_one_step(accelerator, model, optimizer, step)
        one.check()
    with shared_folder() as folder:
        before = [whole(parameter).clone() for parameter in model.parameters()]
        accelerator.save_state(str(folder))
        assert all(same_bits(then, whole(now)) for then, now in zip(before, model.parameters(), strict=True))
        train_one_step(accelerator, model, optimizer, 4)
        after = [whole(parameter).clone() for parameter in model.parameters()]

        accelerator = start_fsdp2()
        fresh = make_model(seed=1)
        resumed = wrap(fresh)
        fresh, optimizer = accelerator.prepare(fresh, resumed)
        accelerator.load_state(str(folder))
    assert resumed.param_groups[0]["inmerge_step"] == 4
    train_one_step(accelerator, fresh, optimizer, 4)
    assert all(same_bits(then, whole(now)) for then, now in zip(after, fresh.parameters(), strict=True))
