"""FSDP2 over two ranks: every merge is what one process gives. Each check runs in both processes at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from launching import shared_folder
from one_process import (
    SETTINGS,
    OneProcess,
    Still,
    assert_same_counts,
    make_batch,
    make_model,
    make_normed_model,
    same_bits,
    selected_names,
    whole,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from inmerge_optim import InMergeOptimizer, KernelLayer, check_replicas, kernel_layers, kernel_ranks

EVEN = (8, 12, 4)


def shard(model: nn.Module, **options: Any) -> nn.Module:
    """Shard a model by FSDP2, one unit for each convolution and one for the rest."""
    options.setdefault("mesh", all_ranks())
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def all_ranks() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def wrap(model: nn.Module, names: Sequence[str | KernelLayer] | None, **settings: Any) -> InMergeOptimizer:
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return InMergeOptimizer(base, model, **{**SETTINGS, "names": names, **settings})


def sharded_pair(
    channels: tuple[int, ...] = (7, 10, 3),
    dtype: torch.dtype = torch.float32,
    sharding: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[nn.Module, InMergeOptimizer, OneProcess]:
    """Return a sharded model, its optimizer, and what one process makes of it."""
    model, plain = make_model(0, channels, dtype), make_model(0, channels, dtype)
    names = selected_names(model)
    optimizer = wrap(shard(model, **(sharding or {})), names, **settings)
    return model, optimizer, OneProcess(plain, optimizer, **settings)


def train(
    model: nn.Module, optimizer: InMergeOptimizer, one: OneProcess, dtype: torch.dtype = torch.float32, steps: int = 4
) -> None:
    """Train on other data in each rank, and compare after each step."""
    for step in range(steps):
        model(make_batch(10 * step + dist.get_rank(), dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        one.check()


def check_kernels_that_do_not_divide_by_the_ranks() -> None:
    train(*sharded_pair())


def check_weights_split_across_kernels() -> None:
    def across(parameter: nn.Parameter) -> Shard | None:
        return Shard(1) if parameter.dim() == 4 else None

    model, optimizer, one = sharded_pair(EVEN, sharding={"shard_placement_fn": across})
    assert model[2].weight.placements == (Shard(1),)
    train(model, optimizer, one)


def check_weights_kept_whole_after_the_forward() -> None:
    train(*sharded_pair(sharding={"reshard_after_forward": False}))


def check_weights_kept_whole_between_accumulated_backwards() -> None:
    model, optimizer, one = sharded_pair()
    for step in range(4):
        last = step % 2 == 1
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)
        model(make_batch(10 * step + dist.get_rank())).square().mean().backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()
            one.check()
    assert optimizer.param_groups[0]["inmerge_step"] == 2


def check_weights_kept_whole_after_the_backward() -> None:
    model, optimizer, one = sharded_pair()
    model.set_reshard_after_backward(False)
    for step in range(4):
        model(make_batch(10 * step + dist.get_rank())).square().mean().backward()
        assert not isinstance(model[2].weight, DTensor), "the model should hold the whole weight here"
        optimizer.step()
        optimizer.zero_grad()
        one.check()
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def channels_pair(**sharding: Any) -> tuple[nn.Module, InMergeOptimizer, OneProcess]:
    """As sharded_pair, of a model with a batch norm and a depthwise convolution that are merged along."""
    model, plain = make_normed_model(), make_normed_model()
    layers = [layer for layer in kernel_layers(model, 1, merge_channels=True) if layer.selected]
    assert layers[0].per_channel == ("3", "4")
    optimizer = wrap(shard(model, **sharding), layers, merge_channels=True)
    return model, optimizer, OneProcess(plain, optimizer, merge_channels=True)


def check_channels_are_merged_whole() -> None:
    train(*channels_pair())


def check_channels_that_fsdp2_keeps_whole_are_refused_before_the_step() -> None:
    model, optimizer, _ = channels_pair()
    model.set_reshard_after_backward(False)
    model(make_batch(dist.get_rank())).square().mean().backward()
    before = whole(optimizer.param_groups[0]["params"][2]).clone()
    with pytest.raises(RuntimeError, match="let FSDP2 reshard after the backward pass"):
        optimizer.step()
    assert same_bits(before, whole(optimizer.param_groups[0]["params"][2]))


def check_bfloat16_weights() -> None:
    train(*sharded_pair(dtype=torch.bfloat16), dtype=torch.bfloat16)


def check_float64_weights() -> None:
    train(*sharded_pair(dtype=torch.float64), dtype=torch.float64)


def check_weights_of_several_dtypes() -> None:
    optimizer, one = tensor_parallel_pair((Shard(0),), lambda model: model[2].to(torch.bfloat16))
    with mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as exchange:
        merge(optimizer, one)
    travelled = [call.args[1].dtype for call in exchange.call_args_list]
    assert travelled == 4 * [torch.bfloat16, torch.float32], "partners travel as they are stored"


def check_mixed_precision_policy() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    train(*sharded_pair(sharding={"mp_policy": policy}))


def check_dissimilar_kernels() -> None:
    train(*sharded_pair(criterion="dissimilar"))


def check_random_pairs() -> None:
    train(*sharded_pair(criterion="random_pairs"))


def check_thresholds_that_fit_each_layer() -> None:
    train(*sharded_pair(similarity_threshold="0.5sd"))
    train(*sharded_pair(similarity_threshold="4sd", criterion="dissimilar"))
    train(*sharded_pair(similarity_threshold="q0.9", merge_prob=1.0))
    train(*sharded_pair(similarity_threshold="q0.5", criterion="random_pairs"))


def check_extreme_kernels() -> None:
    """NaN, infinite, zero, tiny and huge kernels, and zeros with a sign, on both ranks."""

    def spoil(model: nn.Module) -> None:
        with torch.no_grad():
            model[2].weight[0], model[2].weight[8], model[2].weight[1], model[2].weight[5] = 1e-42, 1e38, 0.0, -0.0
            model[4].weight[0, 0, 0, 0] = float("nan")
            model[4].weight[13, 0, 0, 0] = float("inf")

    dissimilar = {"criterion": "dissimilar", "merge_weight": 0.3}
    for settings in ({}, {"merge_weight": 0.0}, dissimilar, {"similarity_threshold": "q0.5"}):
        optimizer, one = tensor_parallel_pair((Shard(0),), spoil, **settings)
        merge(optimizer, one, steps=10)


def check_compiled_model() -> None:
    model, optimizer, one = sharded_pair()
    train(torch.compile(model, backend="eager"), optimizer, one)


def check_wrapped_before_the_weights_are_replaced() -> None:
    """The wrapper may be made of the plain model, if the base gets the shards in place, as accelerate does it."""
    model, plain = make_model(), make_model()
    optimizer = InMergeOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), model, **SETTINGS)
    optimizer.param_groups[0]["params"] = list(shard(model).parameters())
    train(model, optimizer, OneProcess(plain, optimizer))


def check_overflow_on_one_rank_skips_the_step_on_all() -> None:
    model, optimizer, one = sharded_pair()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
    for step in range(4):
        batch = make_batch(10 * step + dist.get_rank())
        if step == 1 and dist.get_rank() == 1:
            batch[0] = float("nan")
        before = [whole(parameter).clone() for parameter in model.parameters()]
        scaler.scale(model(batch).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved = [not same_bits(whole(now), then) for now, then in zip(model.parameters(), before, strict=True)]
        assert any(moved) == (step != 1)
        one.check()
    assert optimizer.param_groups[0]["inmerge_step"] == 3


def check_checkpoint_leaves_the_weights_and_resumes() -> None:
    """torch.distributed.checkpoint: saving makes no step, and a loaded run goes on as the saved one did."""
    model, optimizer, one = sharded_pair()
    train(model, optimizer, one)
    before = [whole(parameter).clone() for parameter in model.parameters()]
    with shared_folder() as folder:
        dcp.save(
            {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder
        )
        fresh = make_model(seed=1)
        names = selected_names(fresh)
        resumed = wrap(shard(fresh), names)
        initial = [whole(parameter).clone() for parameter in fresh.parameters()]
        held = {"model": fresh.state_dict(), "optimizer": get_optimizer_state_dict(fresh, resumed)}
        assert resumed.param_groups[0]["inmerge_step"] == 0, "initialising the state is no step"
        for then, now in zip(initial, fresh.parameters(), strict=True):
            assert same_bits(then, whole(now)), "initialising the state moved the weights"
        dcp.load(held, checkpoint_id=folder)
    set_optimizer_state_dict(fresh, resumed, held["optimizer"])
    for then, now, loaded in zip(before, model.parameters(), fresh.parameters(), strict=True):
        assert same_bits(then, whole(now)), "saving moved the weights"
        assert same_bits(then, whole(loaded)), "loading lost the weights"
    assert resumed.param_groups[0]["inmerge_step"] == 4
    for net, stepped in ((model, optimizer), (fresh, resumed)):
        net(make_batch(dist.get_rank())).square().mean().backward()
        stepped.step()
    one.check()
    for saved, loaded in zip(model.parameters(), fresh.parameters(), strict=True):
        assert same_bits(whole(saved), whole(loaded))


def check_tensor_parallel_weights() -> None:
    layouts = ((Shard(0),), (Shard(1),), (Shard(2),), (Replicate(),))
    for layout in layouts:
        optimizer, one = tensor_parallel_pair(layout)
        merge(optimizer, one)


def check_partners_travel_once_to_those_who_need_them() -> None:
    """One exchange and one sum for all layers, and no weight is gathered."""
    model = make_model()
    optimizer = tensor_parallel(model, (Shard(0),), merge_prob=1.0)
    with (
        mock.patch.object(DTensor, "full_tensor", side_effect=AssertionError("gathered")),
        mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as exchange,
        mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as total,
    ):
        optimizer.step()
    (_, outbox, _, splits), _ = exchange.call_args
    weights = [model.get_submodule(layer.name).weight for layer in optimizer.layers if layer.selected]
    assert (exchange.call_count, total.call_count) == (1, 1)
    assert outbox.numel() == sum(splits) <= sum(weight.numel() for weight in weights)
    received = torch.tensor(outbox.numel())
    dist.all_reduce(received)
    assert received == sum(weight.numel() for weight in weights), "every kernel has one partner at merge_prob 1"


def check_counts_are_read_without_the_other_ranks() -> None:
    optimizer, one = tensor_parallel_pair((Shard(0),))
    merge(optimizer, one)
    if dist.get_rank() == 0:
        assert_same_counts(optimizer.merge_counts(), one.twin.merge_counts())


def check_effective_ranks_of_shards() -> None:
    model, optimizer, one = sharded_pair()
    found = kernel_ranks(model, optimizer.layers)
    expected = kernel_ranks(one.model, one.twin.layers)
    assert isinstance(model[2].weight, DTensor)
    assert found.keys() == expected.keys()
    assert all(abs(found[layer] - expected[layer]) < 1e-6 for layer in expected)


def check_sharded_model_without_names_is_refused() -> None:
    model = shard(make_model())
    with pytest.raises(ValueError, match="call kernel_layers before sharding"):
        wrap(model, names=None)


def check_wholly_sharded_weights_have_no_replicas_to_compare() -> None:
    _, optimizer, _ = sharded_pair()
    assert check_replicas(optimizer) == []


def tensor_parallel(
    model: nn.Module, layout: tuple[Placement, ...], mesh: DeviceMesh | None = None, **settings: Any
) -> InMergeOptimizer:
    """Replace the weights to merge by DTensors, without FSDP, and return an optimizer whose steps merge only."""
    names = selected_names(model)
    for name in names:
        module = model.get_submodule(name)
        module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh or all_ranks(), layout))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return InMergeOptimizer(Still(model.parameters(), lr=1.0), model, **{**SETTINGS, "names": names, **settings})


def tensor_parallel_pair(
    layout: tuple[Placement, ...],
    prepare: Callable[[nn.Module], Any] = lambda model: None,
    mesh: DeviceMesh | None = None,
    **settings: Any,
) -> tuple[InMergeOptimizer, OneProcess]:
    """Return an optimizer of DTensors without FSDP, and what one process makes of the same weights."""
    model, plain = make_model(), make_model()
    for net in (model, plain):
        prepare(net)
    optimizer = tensor_parallel(model, layout, mesh, **settings)
    return optimizer, OneProcess(plain, optimizer, **settings)


def merge(optimizer: InMergeOptimizer, one: OneProcess, steps: int = 4) -> None:
    for _ in range(steps):
        optimizer.step()
        one.check()
