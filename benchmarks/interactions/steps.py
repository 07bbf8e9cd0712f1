"""Compiled steps, copies and hooks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.testing import CompileCounter
from torch.optim import Optimizer, lr_scheduler

from interactions.peers import NotApplicable, Peer, backward, expect, expect_same, row, train, trained


def compiled_graphs(peer: Peer, within: float = 0.0, **options: Any) -> str:
    peer.plain("its step is compiled with the closure")
    torch.compiler.reset()
    counter = CompileCounter()
    model, optimizer = peer.build(**options)
    compiled = torch.compile(optimizer.step, backend=counter)
    frames = []
    for step in range(10):
        backward(model, optimizer, step)
        compiled()
        frames.append(counter.frame_count)
    expect_same(model, trained(peer, 10, **options), "against the eager step", within)
    expect(frames[1] == frames[-1], f"{frames[1]} graphs after two steps, {frames[-1]} after ten")
    return f"{frames[-1]} graphs"


@row("torch.compile of the step: graphs, and none after the second step")
def _(peer: Peer) -> str:
    return compiled_graphs(peer)


@row("torch.compile of the step with a learning rate in a tensor")
def _(peer: Peer) -> str:
    # Compiled, such a rate is applied in another order: the weights are not the same to the bit.
    return compiled_graphs(peer, within=1e-6, lr=torch.tensor(0.1), momentum=0.9)


@row("step counts beyond 2**31")
def _(peer: Peer) -> None:
    model, optimizer = peer.build()
    counts = [(group, name) for group in optimizer.param_groups for name in group if name.endswith("step")]
    if not counts:
        raise NotApplicable("it counts no steps in the groups")
    for group, name in counts:
        group[name] = 2**31 - 2
    train(peer, model, optimizer, 4)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    expect(all(group[name] == 2**31 + 2 for group, name in counts), f"{[group[name] for group, name in counts]}")


def copied_with_a_scheduler(peer: Peer, duplicate: Callable[[Any], Any]) -> None:
    model, optimizer = peer.build()
    train(peer, model, optimizer, 3)
    if not isinstance(optimizer, Optimizer):
        raise NotApplicable("it takes no scheduler")
    lr_scheduler.StepLR(optimizer, 100)
    before = copy.deepcopy(model)
    model_copy, copied = duplicate((model, optimizer))
    train(peer, model_copy, copied, range(3, 6))
    expect_same(model, before, "the copy stepped the original")
    train(peer, model, optimizer, range(3, 6))
    expect_same(model_copy, model, "against the original's steps")


@row("deepcopy with a scheduler attached")
def _(peer: Peer) -> None:
    copied_with_a_scheduler(peer, copy.deepcopy)


@row("pickle with a scheduler attached")
def _(peer: Peer) -> None:
    copied_with_a_scheduler(peer, lambda pair: pickle.loads(pickle.dumps(pair)))


@row("a step hook of the wrapper fires once, sees the final weights, and is copied")
def _(peer: Peer) -> None:
    model, optimizer = peer.build()
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(copy.deepcopy(model)))
    train(peer, model, optimizer, 2)
    expect(len(seen) == 2, f"{len(seen)} calls in 2 steps")
    expect_same(seen[1], model, "in the hook")
    model_copy, copied = copy.deepcopy((model, optimizer))
    train(peer, model_copy, copied, 1)
    expect(len(seen) == 3, "lost in a deep copy")
