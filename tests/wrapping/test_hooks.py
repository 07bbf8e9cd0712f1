"""Step hooks and weight averages on the wrapper see merged weights; on the base they see unmerged ones."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.utils import ModelEmaV3
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from toy import network, same, train, trained, weights, wrapped


def recorder(model, seen):
    """Return a hook that keeps what it sees of the weights."""
    return lambda optimizer, args, kwargs: seen.append((optimizer, weights(model)))


def test_a_hook_after_the_wrappers_step_sees_merged_weights_and_one_before_it_the_old_ones():
    model = network()
    optimizer = wrapped(model)
    before, after = [], []
    optimizer.register_step_pre_hook(recorder(model, before))
    optimizer.register_step_post_hook(recorder(model, after))
    train(model, optimizer, 2)
    for step in range(2):
        assert same(before[step][1], trained(step)[0])
        assert same(after[step][1], trained(step + 1)[0])
        assert before[step][0] is after[step][0] is optimizer


def test_a_hook_on_the_base_sees_unmerged_weights():
    model = network()
    optimizer = wrapped(model)
    seen = []
    optimizer.base_optimizer.register_step_post_hook(recorder(model, seen))
    train(model, optimizer, 1)
    unmerged, _ = trained(1, merge_prob=0.0)
    assert same(seen[0][1], unmerged)
    assert not same(unmerged, model)


def test_global_hooks_see_the_step_of_the_base_and_then_that_of_the_wrapper():
    model = network()
    optimizer = wrapped(model)
    before, after = [], []
    handles = [
        register_optimizer_step_pre_hook(recorder(model, before)),
        register_optimizer_step_post_hook(recorder(model, after)),
    ]
    train(model, optimizer, 1)
    for handle in handles:
        handle.remove()
    assert [caller for caller, _ in before] == [optimizer, optimizer.base_optimizer]
    assert [caller for caller, _ in after] == [optimizer.base_optimizer, optimizer]
    assert same(after[1][1], model)
    assert not same(after[0][1], model)


def averaged(model, optimizer, steps, update):
    """Train, and return an exponential average of the weights that ``update(ema)`` arranges to be fed."""
    ema = ModelEmaV3(copy.deepcopy(model), decay=0.5)
    after_step = update(ema)
    train(model, optimizer, steps, after_step=after_step)
    return ema.module


@pytest.mark.parametrize("by_hook", [True, False], ids=["by a hook of the wrapper", "after its step"])
def test_model_ema_averages_merged_weights(by_hook):
    model = network()
    optimizer = wrapped(model)

    def update(ema):
        if not by_hook:
            return lambda step: ema.update(model)
        optimizer.register_step_post_hook(lambda *_: ema.update(model))
        return None

    average = averaged(model, optimizer, 3, update)
    expected = weights(network())
    for step in range(1, 4):
        current = weights(trained(step)[0])
        expected = {name: value.lerp(current[name], 0.5) for name, value in expected.items()}
    torch.testing.assert_close(weights(average), expected)
    assert not same(average, model)
