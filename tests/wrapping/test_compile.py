"""torch.compile: the merge stays outside the graphs, and the step number recompiles nothing."""

from __future__ import annotations

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from toy import loss_of, merge_step, network, sgd, train, weights, wrapped

STEPS = 10
BASES = {
    "SGD": sgd,
    "stateless SGD": functools.partial(sgd, momentum=0),
    "SGD, rate in a tensor": functools.partial(sgd, lr=torch.tensor(0.1)),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
    "groups": lambda model: torch.optim.AdamW([{"params": part.parameters()} for part in model.children()], lr=0.01),
}


@pytest.fixture
def counter():
    """Count the graphs that are compiled in a test."""
    torch.compiler.reset()
    yield CompileCounter()
    torch.compiler.reset()


def compiled_frames(iteration, counter):
    """Run compiled iterations, and return how many graphs were compiled by the end of each."""
    frames = []
    for step in range(STEPS):
        iteration(step)
        frames.append(counter.frame_count)
    return frames


def assert_trained_alike(model, base):
    """Compare with training by an eager step; AdamW sums in another order when it is compiled."""
    plain = network()
    train(plain, wrapped(plain, base(plain)), STEPS)
    torch.testing.assert_close(weights(model), weights(plain))


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_a_compiled_step_is_two_graphs_at_most_and_no_more_later(base, counter):
    model = network()
    optimizer = wrapped(model, base(model))
    compiled = torch.compile(optimizer.step, backend=counter)

    def iteration(step):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        compiled()

    frames = compiled_frames(iteration, counter)
    assert frames[1] == frames[-1] <= 2
    assert merge_step(optimizer) == STEPS
    assert_trained_alike(model, base)


@pytest.mark.parametrize("base", [BASES["SGD"], BASES["groups"]], ids=["SGD", "groups"])
def test_a_compiled_train_step_is_one_graph_more(base, counter):
    model = network()
    optimizer = wrapped(model, base(model))

    @torch.compile(backend=counter)
    def iteration(step):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()

    frames = compiled_frames(iteration, counter)
    assert frames[1] == frames[-1] <= 3
    assert merge_step(optimizer) == STEPS
    assert_trained_alike(model, base)


def test_a_compiled_model_is_merged_as_the_model(counter):
    model = network()
    compiled = torch.compile(model, backend=counter)
    train(compiled, wrapped(compiled), STEPS)
    assert counter.frame_count == 1
    assert_trained_alike(model, sgd)
