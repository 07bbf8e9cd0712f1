"""Gradient scaling and low precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from interactions.peers import MOMENTUM, Peer, expect, expect_same, loss_of, network, row, train, trained


def overflowing(peer: Peer, kind: type[Optimizer], overflows: tuple[int, ...], **options: Any) -> None:
    peer.plain("GradScaler takes no closures")
    model, optimizer = peer.build(kind, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        for sound in (False, True) if step in overflows else (True,):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            if not sound:
                for parameter in model.parameters():
                    parameter.grad.fill_(float("inf"))
            scaler.step(optimizer)
            scaler.update()
    expect_same(model, trained(peer, 4, kind=kind, **options), "against a run without the overflows")


@row("GradScaler, steps that overflow")
def _(peer: Peer) -> None:
    overflowing(peer, SGD, (1, 2), **MOMENTUM)


@row("GradScaler, fused AdamW, steps that overflow")
def _(peer: Peer) -> None:
    overflowing(peer, AdamW, (1, 2), lr=0.01, fused=True)


@row("GradScaler, fused SGD, the first step overflows")
def _(peer: Peer) -> None:
    overflowing(peer, SGD, (0,), fused=True, **MOMENTUM)


@row("GradScaler, unscale_ and clip_grad_norm_")
def _(peer: Peer) -> None:
    peer.plain("GradScaler takes no closures")
    models = []
    for scaler in (torch.amp.GradScaler("cpu", init_scale=2.0**10), torch.amp.GradScaler("cpu", enabled=False)):
        model, optimizer = peer.build()
        for step in range(4):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
        models.append(model)
    expect_same(*models, "against unscaled training")


@row("bfloat16 weights")
def _(peer: Peer) -> None:
    model = network().to(torch.bfloat16)
    optimizer = peer.wrap(model, SGD, MOMENTUM)
    train(peer, model, optimizer, 4)
    expect(all(bool(p.isfinite().all()) and p.dtype == torch.bfloat16 for p in model.parameters()), "not finite")
