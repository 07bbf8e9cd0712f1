"""Schedules of the learning rate."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import timm.scheduler
import torch
from torch.optim import SGD, lr_scheduler

from interactions.peers import MOMENTUM, Peer, expect, expect_same, network, row, train, trained


def follow_schedule(peer: Peer, make: Callable[[Any], Any], advance: Callable[[Any, int], None]) -> None:
    """Compare rates under a scheduler, before and after a load, with those of a bare SGD."""
    bare = SGD(network().parameters(), **MOMENTUM)
    model, optimizer = peer.build()
    schedulers = [make(bare), make(optimizer)]
    for step in range(6):
        if step == 3:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(peer, model, optimizer, range(step, step + 1))
        bare.step()
        for scheduler in schedulers:
            advance(scheduler, step)
        inner = getattr(optimizer, "base_optimizer", getattr(optimizer, "_base_optimizer", optimizer))
        rates = [part.param_groups[0]["lr"] for part in (bare, inner)]
        expect(rates[0] == rates[1], f"step {step}: the base has {rates[1]:.3g}, not {rates[0]:.3g}")


@row("scheduler of torch (StepLR), with a load half-way")
def _(peer: Peer) -> None:
    follow_schedule(peer, lambda o: lr_scheduler.StepLR(o, 1, gamma=0.5), lambda scheduler, _: scheduler.step())


@row("OneCycleLR, with a load half-way")
def _(peer: Peer) -> None:
    make = functools.partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=20)
    follow_schedule(peer, make, lambda scheduler, _: scheduler.step())


@row("scheduler of timm (cosine), with a load half-way")
def _(peer: Peer) -> None:
    make = functools.partial(timm.scheduler.CosineLRScheduler, t_initial=8)
    follow_schedule(peer, make, lambda scheduler, step: scheduler.step(step + 1))


@row("a learning rate in a tensor gives what the number gives")
def _(peer: Peer) -> None:
    model, optimizer = peer.build(lr=torch.tensor(0.1), momentum=0.9)
    train(peer, model, optimizer, 4)
    expect_same(model, trained(peer, 4), "against a number")


@row("warm-up from a rate of 0: the first step changes nothing")
def _(peer: Peer) -> None:
    model, optimizer = peer.build(lr=0.0)
    train(peer, model, optimizer, 4)
    expect_same(model, network(), "after steps at rate 0")
