"""Hugging Face accelerate: prepare, accumulate, clip, save_state and load_state."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from toy import Moded, batch, loss_of, merge_step, network, same, sgd, train, trained, wrapped

from inmerge_optim import InMergeOptimizer


@pytest.fixture
def accelerator():
    """Return a maker of accelerators; each starts as in a new process."""

    def make(**options):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return Accelerator(cpu=True, **options)

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def prepared(accelerator, seed=0, base=sgd):
    """Return a model, its wrapper and a scheduler, prepared."""
    model = network(seed)
    optimizer = wrapped(model, base(model))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    return accelerator.prepare(model, optimizer, scheduler)


def train_prepared(accelerator, model, optimizer, scheduler, steps):
    for step in range(steps) if isinstance(steps, int) else steps:
        optimizer.zero_grad()
        accelerator.backward(loss_of(model, step))
        accelerator.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        scheduler.step()


def test_prepared_it_trains_as_in_a_plain_loop(accelerator):
    accelerator = accelerator()
    model, optimizer, scheduler = prepared(accelerator)
    train_prepared(accelerator, model, optimizer, scheduler, 5)

    plain = network()
    bare = wrapped(plain)
    schedule = torch.optim.lr_scheduler.StepLR(bare, 2, gamma=0.5)
    for step in range(5):
        bare.zero_grad()
        loss_of(plain, step).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        bare.step()
        schedule.step()
    assert same(plain, accelerator.unwrap_model(model))
    assert merge_step(optimizer) == 5
    assert optimizer.optimizer.merge_counts() == bare.merge_counts()


def test_while_gradients_accumulate_nothing_is_merged(accelerator):
    accelerator = accelerator(gradient_accumulation_steps=3)
    model, optimizer, _ = prepared(accelerator)
    for step in range(9):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, step))
            optimizer.step()
            optimizer.zero_grad()

    plain = network()
    bare = wrapped(plain)
    for first in range(0, 9, 3):
        bare.zero_grad()
        for step in range(first, first + 3):
            (loss_of(plain, step) / 3).backward()
        bare.step()
    assert same(plain, accelerator.unwrap_model(model))
    assert merge_step(optimizer) == 3


def test_every_step_of_a_prepared_loader_is_counted(accelerator):
    accelerator = accelerator()
    model = network()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batch(0)), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, wrapped(model), loader)
    for images, labels in loader:
        optimizer.zero_grad()
        accelerator.backward(torch.nn.functional.cross_entropy(model(images), labels))
        optimizer.step()
    assert merge_step(optimizer) == 3


@pytest.mark.parametrize("momentum", [0.9, 0])
def test_a_run_resumed_from_save_state_is_exact_to_the_bit(accelerator, momentum, tmp_path):
    def base(model):
        return sgd(model, momentum=momentum)

    first = accelerator()
    whole = prepared(first, base=base)
    train_prepared(first, *whole, 3)
    first.save_state(tmp_path)
    train_prepared(first, *whole, range(3, 6))

    second = accelerator()
    resumed = prepared(second, seed=1, base=base)
    second.load_state(tmp_path)
    assert merge_step(resumed[1]) == 3
    train_prepared(second, *resumed, range(3, 6))
    assert same(*(second.unwrap_model(model) for model in (whole[0], resumed[0])))
    assert merge_step(resumed[1]) == 6


def test_bf16_autocast_merges_float32_weights_as_ever(accelerator):
    accelerator = accelerator(mixed_precision="bf16")
    model, optimizer, scheduler = prepared(accelerator)
    train_prepared(accelerator, model, optimizer, scheduler, 3)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert merge_step(optimizer) == 3
    assert all(count["merged"] > 0 for count in optimizer.optimizer.merge_counts().values())


def test_modes_of_the_prepared_optimizer_reach_the_base(accelerator):
    model = network()
    base = Moded(model.parameters(), lr=0.1)
    _, optimizer = accelerator().prepare(model, wrapped(model, base))
    optimizer.train()
    assert base.mode == "train"
    optimizer.eval()
    assert base.mode == "eval"


def test_wrapping_a_prepared_optimizer_is_refused(accelerator):
    model, optimizer = accelerator().prepare(network(), sgd(network()))
    with pytest.raises(TypeError, match="wrap first, then prepare"):
        InMergeOptimizer(optimizer, model)


def test_a_prepared_wrapper_can_leave_the_model_unwrapped(accelerator):
    accelerator = accelerator()
    model = network()
    optimizer = accelerator.prepare(wrapped(model))
    train(model, optimizer, 3)
    assert same(model, trained(3)[0])
