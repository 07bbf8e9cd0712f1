"""Checkpoints, of torch and of accelerate."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import SGD

from interactions.peers import MOMENTUM, Peer, backward, expect_same, network, row, train


@row("torch.save, torch.load, resumed run")
def _(peer: Peer) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, optimizer = peer.build()
        train(peer, model, optimizer, 3)
        torch.save([model.state_dict(), optimizer.state_dict()], Path(folder, "saved.pt"))
        train(peer, model, optimizer, range(3, 7))
        resumed, other = peer.build(seed=1)
        for part, state in zip((resumed, other), torch.load(Path(folder, "saved.pt")), strict=True):
            part.load_state_dict(state)
    train(peer, resumed, other, range(3, 7))
    expect_same(resumed, model, "after the resume")


@row("a checkpoint of the bare base loads")
def _(peer: Peer) -> None:
    model = network()
    bare = SGD(model.parameters(), **MOMENTUM)
    for step in range(2):
        backward(model, bare, step)
        bare.step()
    _, optimizer = peer.build()
    optimizer.load_state_dict(bare.state_dict())


@row("torch.distributed.checkpoint: a save moves no weight")
def _(peer: Peer) -> None:
    for options in (MOMENTUM, {"lr": 0.1}):
        model, optimizer = peer.build(**options)
        train(peer, model, optimizer, 3)
        optimizer.zero_grad()
        before = copy.deepcopy(model)
        get_optimizer_state_dict(model, optimizer)
        expect_same(model, before, "SGD with momentum" if "momentum" in options else "stateless SGD")
        fresh, optimizer = peer.build(**options)
        get_optimizer_state_dict(fresh, optimizer)
        expect_same(fresh, network(), "before the first step")


@row("torch.distributed.checkpoint: resumed run")
def _(peer: Peer) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, optimizer = peer.build()
        train(peer, model, optimizer, 3)
        state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.save(state, checkpoint_id=folder, no_dist=True)
        train(peer, model, optimizer, range(3, 7))
        resumed, other = peer.build(seed=1)
        state = {"model": resumed.state_dict(), "optimizer": get_optimizer_state_dict(resumed, other)}
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    resumed.load_state_dict(state["model"])
    set_optimizer_state_dict(resumed, other, state["optimizer"])
    train(peer, resumed, other, range(3, 7))
    expect_same(resumed, model, "after the resume")
