"""Schedulers of torch and timm steer the wrapper as they steer its base, and a rate of 0 stops the merging."""

from __future__ import annotations

import copy
import functools

import pytest
import timm.scheduler
import torch
from torch.optim import lr_scheduler
from toy import MERGED, merge_step, network, same, sgd, train, trained, weights, wrapped


def sequential(optimizer):
    parts = [lr_scheduler.LinearLR(optimizer, 0.5, total_iters=2), lr_scheduler.ExponentialLR(optimizer, 0.5)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[2])


TORCH = {
    "StepLR": functools.partial(lr_scheduler.StepLR, step_size=2),
    "MultiStepLR": functools.partial(lr_scheduler.MultiStepLR, milestones=[1, 3]),
    "LambdaLR": functools.partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 0.8**step),
    "MultiplicativeLR": functools.partial(lr_scheduler.MultiplicativeLR, lr_lambda=lambda step: 0.8),
    "CosineAnnealingLR": functools.partial(lr_scheduler.CosineAnnealingLR, T_max=6),
    "CosineAnnealingWarmRestarts": functools.partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=2),
    "PolynomialLR": functools.partial(lr_scheduler.PolynomialLR, total_iters=6),
    "OneCycleLR": functools.partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=20),
    "CyclicLR": functools.partial(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=2),
    "ReduceLROnPlateau": functools.partial(lr_scheduler.ReduceLROnPlateau, patience=1),
    "SequentialLR": sequential,
}
TIMM = {
    "cosine": functools.partial(timm.scheduler.CosineLRScheduler, t_initial=6, warmup_t=2, warmup_lr_init=0.01),
    "tanh": functools.partial(timm.scheduler.TanhLRScheduler, t_initial=6),
    "step": functools.partial(timm.scheduler.StepLRScheduler, decay_t=2, decay_rate=0.5),
    "multistep": functools.partial(timm.scheduler.MultiStepLRScheduler, decay_t=[1, 3], decay_rate=0.5),
    "poly": functools.partial(timm.scheduler.PolyLRScheduler, t_initial=6),
}
SCHEDULERS = {**TORCH, **{f"timm {name}": build for name, build in TIMM.items()}}


def advance(scheduler, step):
    if isinstance(scheduler, timm.scheduler.scheduler.Scheduler):
        scheduler.step(step + 1)
    elif isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(1.0)
    else:
        scheduler.step()


def run_scheduled(model, optimizer, scheduler, steps):
    """Train with a scheduler, and return what the optimizer's groups held after each step."""
    seen = []

    def after_step(step):
        advance(scheduler, step)
        group = optimizer.param_groups[0]
        seen.append((group["lr"], group["momentum"]))

    train(model, optimizer, steps, after_step=after_step)
    return seen


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_on_the_wrapper_or_on_the_base_gives_the_rates_of_the_bare_base(name):
    bare = network()
    optimizer = sgd(bare)
    expected = run_scheduled(bare, optimizer, SCHEDULERS[name](optimizer), 6)
    models = [network(), network()]
    for model, takes_wrapper in zip(models, (True, False), strict=True):
        base = sgd(model)
        optimizer = wrapped(model, base)
        scheduler = SCHEDULERS[name](optimizer if takes_wrapper else base)
        assert run_scheduled(model, optimizer, scheduler, 6) == expected
        assert base.param_groups[0]["lr"] == expected[-1][0]
    assert len(set(expected)) > 1
    assert same(*models)
    assert not same(models[0], bare)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_and_wrapper_resume_together(name):
    whole = network()
    optimizer = wrapped(whole)
    scheduler = SCHEDULERS[name](optimizer)
    run_scheduled(whole, optimizer, scheduler, 3)
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
    expected = run_scheduled(whole, optimizer, scheduler, range(3, 6))

    resumed = network(seed=1)
    optimizer = wrapped(resumed)
    scheduler = SCHEDULERS[name](optimizer)
    for part, state in zip((resumed, optimizer, scheduler), saved, strict=True):
        part.load_state_dict(state)
    assert run_scheduled(resumed, optimizer, scheduler, range(3, 6)) == expected
    assert optimizer.base_optimizer.param_groups[0]["lr"] == expected[-1][0]
    assert same(whole, resumed)


def test_one_cycle_finds_the_momentum_of_the_base():
    model = network()
    optimizer = wrapped(model, torch.optim.AdamW(model.parameters()))
    lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20, base_momentum=0.8)
    assert optimizer.param_groups[0]["betas"][0] == 0.95


@pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0.0)], ids=["int", "float", "tensor"])
def test_a_rate_of_zero_merges_nothing_and_does_not_count(zero):
    model = network()
    optimizer = wrapped(model, sgd(model, lr=torch.tensor(0.1) if isinstance(zero, torch.Tensor) else 0.1))
    before = weights(model)
    optimizer.param_groups[0]["lr"] = zero
    train(model, optimizer, 2)
    assert same(before, model)
    assert merge_step(optimizer) == 0


def test_a_tensor_rate_gives_what_the_number_gives():
    by_number, _ = trained(3)
    by_tensor, _ = trained(3, base=lambda model: sgd(model, lr=torch.tensor(0.1)))
    assert same(by_number, by_tensor)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a capturable base steps on a GPU alone")
def test_a_capturable_base_with_its_rate_on_the_device_is_merged():
    model = network().cuda()
    rate = torch.tensor(1e-3, device="cuda")
    optimizer = wrapped(model, torch.optim.Adam(model.parameters(), lr=rate, capturable=True))
    for _ in range(2):
        model(torch.ones(2, 3, 8, 8, device="cuda")).sum().backward()
        optimizer.step()
    assert merge_step(optimizer) == 2
    assert all(count["merged"] > 0 for count in optimizer.merge_counts().values())


def test_warm_up_from_zero_merges_from_the_first_step_with_a_rate():
    model = network()
    optimizer = wrapped(model)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: min(step, 2) / 2)
    steps = []
    train(model, optimizer, 4, after_step=lambda step: (scheduler.step(), steps.append(merge_step(optimizer))))
    assert steps == [0, 1, 2, 3]


def test_a_layer_whose_group_has_a_rate_of_zero_is_left_alone():
    model = network()
    rates = {"deep": 0.0}
    groups = [{"params": part.parameters(), "lr": rates.get(name, 0.1)} for name, part in model.named_children()]
    optimizer = wrapped(model, torch.optim.SGD(groups))
    before = weights(model)
    train(model, optimizer, 2)
    assert torch.equal(before["deep.weight"], model.deep.weight)
    assert optimizer.merge_counts()["deep"]["drawn"] == 0
    assert optimizer.merge_counts()["grouped"]["merged"] > 0
    assert merge_step(optimizer) == 2


def test_the_step_number_is_one_for_all_groups_and_one_group_decides_like_many():
    model = network()
    named = dict(model.named_parameters())
    groups = [{"params": [named.pop(f"{name}.weight")]} for name in reversed(MERGED)]
    optimizer = wrapped(model, torch.optim.SGD([*groups, {"params": named.values()}], lr=0.1, momentum=0.9))
    train(model, optimizer, 3)
    assert merge_step(optimizer) == 3
    assert [layer.name for layer in optimizer.layers if layer.selected] == MERGED
    assert same(model, trained(3)[0])


def test_settings_that_change_between_steps_count_from_the_next_step():
    model, optimizer = trained(2)
    optimizer.merge_prob = 0.0
    drawn = optimizer.merge_counts()
    train(model, optimizer, range(2, 4))
    assert optimizer.merge_counts() == drawn
    optimizer.merge_prob, optimizer.similarity_threshold, optimizer.merge_weight = 1.0, -1.0, 0.5
    train(model, optimizer, range(4, 5))
    for name, count in optimizer.merge_counts().items():
        assert count["drawn"] - drawn[name]["drawn"] == 8
        assert count["merged"] - drawn[name]["merged"] == 8
    assert merge_step(optimizer) == 5
