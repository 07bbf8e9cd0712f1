"""Gradient scaling: a step that overflowed leaves no trace, and every part is handed the wrapper."""

from __future__ import annotations

import functools

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from toy import loss_of, merge_step, network, same, sgd, train, wrapped

# Scales are powers of two, so that scaling and unscaling are exact and runs can be compared to the bit.
BASES = {
    "SGD": sgd,
    "fused SGD": functools.partial(sgd, fused=True),
    "stateless SGD": functools.partial(sgd, momentum=0),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
    "fused AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, fused=True),
}


def overflow(model):
    """Make the gradients what an overflow of float16 leaves."""
    for parameter in model.parameters():
        parameter.grad.fill_(float("inf"))


def train_scaled(model, optimizer, scaler, overflows=(), *, before_step=None):
    """Train with a scaler for four sound steps; before those in ``overflows`` comes a step that overflows."""
    for step in range(4):
        for sound in [False, True] if step in overflows else [True]:
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            if not sound:
                overflow(model)
            if before_step is not None:
                before_step()
            scaler.step(optimizer)
            scaler.update()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("overflows", [(), (0,), (1, 3)], ids=["none", "the first", "later"])
def test_overflowing_steps_leave_no_trace(base, overflows):
    plain = network()
    expected = wrapped(plain, BASES[base](plain))
    train(plain, expected, 4)
    scaled = network()
    optimizer = wrapped(scaled, BASES[base](scaled))
    train_scaled(scaled, optimizer, torch.amp.GradScaler("cpu", init_scale=2.0**10), overflows)
    assert same(plain, scaled)
    assert optimizer.merge_counts() == expected.merge_counts()
    assert merge_step(optimizer) == 4


def test_unscale_and_clip_work_through_the_wrapper():
    plain, scaled = network(), network()
    optimizer = wrapped(plain)
    for step in range(4):
        optimizer.zero_grad()
        loss_of(plain, step).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        optimizer.step()
    optimizer = wrapped(scaled)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def clip():
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(scaled.parameters(), 0.1)

    train_scaled(scaled, optimizer, scaler, overflows=(1,), before_step=clip)
    assert same(plain, scaled)


def test_a_disabled_scaler_changes_nothing():
    plain, scaled = network(), network()
    train(plain, wrapped(plain), 4)
    train_scaled(scaled, wrapped(scaled), torch.amp.GradScaler("cpu", enabled=False))
    assert same(plain, scaled)


@pytest.mark.parametrize("base", BASES)
def test_accelerates_optimizer_with_a_scaler_reports_the_skipped_steps_and_merges_the_others(base):
    Accelerator(cpu=True)
    plain, scaled = network(), network()
    train(plain, wrapped(plain, BASES[base](plain)), 4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = AcceleratedOptimizer(wrapped(scaled, BASES[base](scaled)), scaler=scaler)
    skipped = []
    for step, sound in [(0, False), (0, True), (1, True), (2, False), (2, True), (3, True)]:
        optimizer.zero_grad()
        scaler.scale(loss_of(scaled, step)).backward()
        if not sound:
            overflow(scaled)
        optimizer.step()
        skipped.append(optimizer.step_was_skipped)
    assert skipped == [True, False, False, True, False, False]
    assert same(plain, scaled)
    assert merge_step(optimizer) == 4
