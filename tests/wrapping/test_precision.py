"""Mixed precision: whatever the weights are and whatever autocast does around it, the merge is in double precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toy import MERGED, loss_of, merge_step, network, same, sgd, train, trained, wrapped

from inmerge_optim import kernels, merging

NARROW = [torch.bfloat16, torch.float16]


def step_without_change(optimizer):
    """Step with zero gradients: plain SGD leaves the weights, and the merge follows."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


def merge_alone(model, **settings):
    """Return a wrapper around stateless SGD, to merge weights that nothing else changes."""
    return wrapped(model, sgd(model, momentum=0), **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *NARROW])
@pytest.mark.parametrize("merge_weight", [0.8, 0.7, 0.5, 0.3])
def test_equal_kernels_stay_equal_to_the_bit(dtype, merge_weight):
    model = network().to(dtype)
    with torch.no_grad():
        for name in MERGED:
            weight = model.get_submodule(name).weight
            weight.copy_(weight[:1].expand_as(weight))
    before = {name: model.get_submodule(name).weight.clone() for name in MERGED}
    optimizer = merge_alone(model, merge_weight=merge_weight, merge_prob=1.0)
    for _ in range(3):
        step_without_change(optimizer)
    assert all(count["merged"] == 24 for count in optimizer.merge_counts().values())
    assert all(torch.equal(before[name], model.get_submodule(name).weight) for name in MERGED)


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
def test_weights_are_merged_in_double_precision_and_rounded_once(dtype):
    model, before = network().to(dtype), network().to(dtype)
    optimizer = merge_alone(model, merge_prob=1.0, similarity_threshold=-1.0)
    step_without_change(optimizer)
    for name in MERGED:
        wide, after = (net.get_submodule(name).weight.detach().double() for net in (before, model))
        blends = 0.8 * wide[:, None] + (1 - 0.8) * wide  # of each kernel with each
        distances = (blends - after[:, None]).abs().flatten(2).amax(2).masked_fill(torch.eye(8, dtype=torch.bool), 9)
        nearest = blends[torch.arange(8), distances.argmin(1)]
        assert ((after - nearest).abs() <= torch.finfo(dtype).eps / 2 * nearest.abs() * (1 + 1e-6)).all()


@pytest.mark.parametrize("dtype", NARROW)
def test_a_step_inside_autocast_merges_with_autocast_off(dtype, monkeypatch):
    """Here by the reference, as on a device without a faster way."""
    seen = []
    pair_cosines = merging.pair_cosines

    def spy(own, donors):
        seen.append((own.dtype, torch.is_autocast_enabled("cpu")))
        return pair_cosines(own, donors)

    monkeypatch.setattr(merging, "pair_cosines", spy)
    monkeypatch.setattr(kernels, "_as_rows", lambda layer: None)
    model = network()
    optimizer = wrapped(model)

    with torch.autocast("cpu", dtype):
        train(model, optimizer, 2)
    assert seen == [(torch.float64, False)] * 4


def test_merging_inside_autocast_gives_what_it_gives_outside():
    inside, outside = network(), network()
    optimizer = merge_alone(inside)
    with torch.autocast("cpu", torch.bfloat16):
        step_without_change(optimizer)
    step_without_change(merge_alone(outside))
    assert same(inside, outside)
    assert not same(inside, network())


@pytest.mark.parametrize("dtype", [torch.float64, *NARROW])
def test_a_model_of_another_dtype_trains_and_keeps_its_dtype(dtype):
    model = network().to(dtype)
    optimizer = wrapped(model, sgd(model, lr=0.01))
    train(model, optimizer, 4)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert all(count["merged"] > 0 for count in optimizer.merge_counts().values())


def test_the_draws_of_a_narrow_model_are_those_of_the_wide_one():
    model = network().to(torch.bfloat16)
    optimizer = wrapped(model)
    train(model, optimizer, 3)
    drawn = [{name: count["drawn"] for name, count in opt.merge_counts().items()} for opt in (optimizer, trained(3)[1])]
    assert drawn[0] == drawn[1]


def test_float16_autocast_with_a_scaler_skips_overflows_and_merges_the_other_steps():
    model = network()
    optimizer = wrapped(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # float16 overflows until the scale has come down
    steps = 60
    for step in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(model, step)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    skipped = 40 - int(np.log2(scaler.get_scale()))
    assert 0 < skipped < steps
    assert merge_step(optimizer) == steps - skipped
    assert all(parameter.isfinite().all() for parameter in model.parameters())
