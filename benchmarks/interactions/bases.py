"""Bases with habits of their own, and wrappers around and inside others."""

from __future__ import annotations

import copy
import functools
from typing import Any

import schedulefree
import timm.optim
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Optimizer

from interactions.peers import (
    MOMENTUM,
    OURS,
    Peer,
    backward,
    expect,
    loss_of,
    row,
    same,
    train,
    weights,
)


@row("a base with closures (LBFGS)")
def _(peer: Peer) -> None:
    peer.around("it steps its base without a closure")
    model, optimizer = peer.build(LBFGS, lr=0.1)
    before = float(loss_of(model, 0))
    for _ in range(3):
        optimizer.step(functools.partial(backward, model, optimizer, 0))
    expect(float(loss_of(model, 0)) < before, "the loss did not fall")


@row("add_param_group reaches the base")
def _(peer: Peer) -> None:
    model, optimizer = peer.build()
    added = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [added], "lr": 0.2})

    def step() -> None:
        def closure() -> torch.Tensor:
            loss = backward(model, optimizer, 0)
            added.grad = torch.ones(3)
            return loss

        closure()
        optimizer.step(*[closure] if peer.needs_closure else [])

    for _ in range(3):
        step()
    expect(bool((added != 1).all()), "its parameters do not move")


def group_per_layer(parameters: Any, **options: Any) -> Optimizer:
    """Return SGD with a group for each layer of the network, whose layers have a weight and a bias."""
    many = list(parameters)
    return SGD([{"params": many[first : first + 2]} for first in range(0, len(many), 2)], **options)


def moved(peer: Peer, model: nn.Module, optimizer: Any) -> set[str]:
    """Return the layers that a step changes."""
    before = weights(model)
    train(peer, model, optimizer, 1)
    return {name.split(".")[0] for name, value in weights(model).items() if not torch.equal(value, before[name])}


@row("a group removed after wrapping: its layer stays, the others move")
def _(peer: Peer) -> None:
    peer.around()
    model, optimizer = peer.build(group_per_layer, lr=0.1)
    del optimizer.param_groups[1]
    expect(moved(peer, model, optimizer) == {"stem", "grouped", "head"}, "others move")


@row("groups cleared, and added anew one by one (unfreezing)")
def _(peer: Peer) -> None:
    peer.around()
    model, optimizer = peer.build(**MOMENTUM)
    optimizer.param_groups.clear()
    unfrozen = set()
    for name in ("head", "grouped", "deep", "stem"):
        optimizer.add_param_group({"params": model.get_submodule(name).parameters(), "lr": 0.1})
        unfrozen.add(name)
        expect(moved(peer, model, optimizer) == unfrozen, f"others move once {name} is added")


class Apex(SGD):
    """SGD whose zero_grad takes no set_to_none, as that of Apex's FusedAdam."""

    def zero_grad(self) -> None:
        super().zero_grad(set_to_none=True)


@row("zero_grad(set_to_none=True) with a base that doesn't take it (Apex)")
def _(peer: Peer) -> None:
    peer.around()
    model, optimizer = peer.build(Apex, lr=0.1)
    train(peer, model, optimizer, 2)
    optimizer.zero_grad(set_to_none=True)
    expect(all(parameter.grad is None for parameter in model.parameters()), "gradients are left")


class Sharpness(SGD):
    """SGD in the two halves of a sharpness-aware step, for loops that call them (davda54/sam)."""

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        self.climbed = [(p, 0.05 * p.grad.sign()) for group in self.param_groups for p in group["params"]]
        for parameter, climb in self.climbed:
            parameter += climb
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for parameter, climb in self.climbed:
            parameter -= climb
        self.step()
        if zero_grad:
            self.zero_grad()


@row("first_step and second_step of a sharpness-aware base")
def _(peer: Peer) -> None:
    peer.around()
    model, optimizer = peer.build(Sharpness, lr=0.1)
    for step in range(3):
        backward(model, optimizer, step)
        optimizer.first_step(zero_grad=True)
        loss_of(model, step).backward()
        optimizer.second_step(zero_grad=True)
    if peer is OURS:
        expect(all(count["merged"] > 0 for count in optimizer.merge_counts().values()), "nothing is merged")


@row("sync_lookahead() of a Lookahead inside, where the optimizer has it (timm's train.py)")
def _(peer: Peer) -> None:
    peer.around()
    peer.plain("timm's loop steps without closures")
    model, optimizer = peer.build(lambda parameters, **o: timm.optim.Lookahead(SGD(parameters, **o), k=5), lr=0.1)
    train(peer, model, optimizer, 6)
    before = copy.deepcopy(model)
    if hasattr(optimizer, "sync_lookahead"):
        optimizer.sync_lookahead()
    expect(not same(model, before), "the weights are not those of the slow copy")


@row("around timm's Lookahead")
def _(peer: Peer) -> None:
    peer.around()

    def lookahead(parameters: Any, **options: Any) -> Optimizer:
        return timm.optim.Lookahead(SGD(parameters, **options), k=2)

    model, optimizer = peer.build(lookahead)
    train(peer, model, optimizer, 4)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(peer, model, optimizer, 4)


@row("inside timm's Lookahead")
def _(peer: Peer) -> None:
    peer.plain("its step needs a closure, which Lookahead hands on without the first gradients")
    model, optimizer = peer.build()
    train(peer, model, timm.optim.Lookahead(optimizer, k=2), 4)


@row("train() and eval() reach a schedule-free base")
def _(peer: Peer) -> None:
    peer.around()
    model, optimizer = peer.build(schedulefree.SGDScheduleFree, lr=0.1)
    optimizer.train()
    train(peer, model, optimizer, 3)
    optimizer.eval()
