"""Hugging Face accelerate."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import schedulefree
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from interactions.peers import Peer, expect, expect_same, loss_of, row, same, train


def new_accelerator(**options: Any) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(cpu=True, **options)


@row("accelerate: prepare, accumulate")
def _(peer: Peer) -> None:
    accelerator = new_accelerator(gradient_accumulation_steps=2)
    peer.plain("a closure sees one batch of the accumulated ones")
    model, optimizer = accelerator.prepare(*peer.build())
    for step in range(8):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, step))
            optimizer.step()
            optimizer.zero_grad()
    expected, plain = peer.build()
    for step in range(0, 8, 2):
        plain.zero_grad()
        ((loss_of(expected, step) / 2).backward(), (loss_of(expected, step + 1) / 2).backward())
        plain.step()
    expect_same(accelerator.unwrap_model(model), expected, "against a plain loop")


@row("accelerate: eval() and train() of the prepared optimizer reach a schedule-free base")
def _(peer: Peer) -> None:
    peer.around()
    accelerator = new_accelerator()
    model, optimizer = accelerator.prepare(*peer.build(schedulefree.SGDScheduleFree, lr=0.1))
    optimizer.train()
    train(peer, model, optimizer, 3)
    trained_at = copy.deepcopy(model)
    optimizer.eval()
    expect(not same(model, trained_at), "eval() leaves the weights of training in place")
    optimizer.train()
    train(peer, model, optimizer, 1)


@row("accelerate: save_state, load_state, resumed run")
def _(peer: Peer) -> None:
    with tempfile.TemporaryDirectory() as folder:
        accelerator = new_accelerator()
        model, optimizer = accelerator.prepare(*peer.build())
        train(peer, model, optimizer, 3)
        accelerator.save_state(folder)
        train(peer, model, optimizer, range(3, 7))
        accelerator = new_accelerator()
        resumed, other = accelerator.prepare(*peer.build(seed=1))
        accelerator.load_state(folder)
        train(peer, resumed, other, range(3, 7))
    expect_same(resumed, model, "after the resume")
