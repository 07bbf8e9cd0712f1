"""When kernels are merged: every k-th step, from one step to another, and in rounds without a step."""

from __future__ import annotations

import copy

import pytest
import torch
from toy import merge_step, network, same, sgd, train, weights, wrapped


def steps_with_merges(steps, **settings):
    """Return after which steps, from 0, kernels were drawn."""
    model = network()
    optimizer = wrapped(model, **{"merge_prob": 1.0, **settings})
    found, before = [], 0
    for step in range(steps):
        train(model, optimizer, [step])
        drawn = sum(count["drawn"] for count in optimizer.merge_counts().values())
        found += [step] if drawn > before else []
        before = drawn
    assert merge_step(optimizer) == steps
    return found


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6]),
        ({"every": 3}, [2, 5]),
        ({"merge_start": 4}, [4, 5, 6]),
        ({"merge_stop": 2}, [0, 1]),
        ({"merge_stop": 0}, []),
        ({"merge_start": 1, "merge_stop": 6, "every": 2}, [2, 4]),
    ],
)
def test_kernels_are_merged_at_the_steps_that_the_settings_name(settings, expected):
    assert steps_with_merges(7, **settings) == expected


def test_a_checkpoint_goes_on_in_the_cadence_where_it_was():
    settings = {"every": 3, "merge_start": 2, "merge_stop": 9}
    straight, resumed = network(), network()
    train(straight, wrapped(straight, **settings), 10)
    first = wrapped(resumed, **settings)
    train(resumed, first, 4)
    second = wrapped(resumed, **settings)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(resumed, second, range(4, 10))
    assert same(straight, resumed)
    assert not same(straight, trained_without(10))


def trained_without(steps):
    model = network()
    train(model, sgd(model), steps)
    return model


def test_what_is_merged_at_a_step_does_not_depend_on_the_steps_between():
    models = {}
    for every in (1, 2):
        model = network()
        optimizer = wrapped(model, sgd(model, lr=1e-30, momentum=0), every=every, merge_start=2 if every == 1 else 1)
        train(model, optimizer, 3)  # both merge at step 2 alone
        models[every] = model
    assert same(models[1], models[2])


def test_rounds_merge_without_gradients_rates_or_steps():
    model = network()
    optimizer = wrapped(model, sgd(model, lr=0.0), every=5, merge_start=100, merge_prob=1.0)
    before = weights(model)
    optimizer.merge(rounds=3)
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert changed == {"deep.weight", "grouped.weight"}
    assert {name: count["drawn"] for name, count in optimizer.merge_counts().items()} == {"deep": 24, "grouped": 24}
    assert {(group["inmerge_step"], group["inmerge_rounds"]) for group in optimizer.param_groups} == {(0, 3)}


def test_rounds_skip_frozen_layers():
    model = network()
    optimizer = wrapped(model, merge_prob=1.0)
    model.deep.weight.requires_grad_(False)
    optimizer.merge()
    assert {name: count["drawn"] for name, count in optimizer.merge_counts().items()} == {"deep": 0, "grouped": 8}


def test_rounds_are_numbered_so_that_a_checkpoint_goes_on_with_the_next():
    straight, resumed = network(), network()
    wrapped(straight).merge(rounds=4)
    first = wrapped(resumed)
    first.merge()
    first.merge(rounds=0)
    second = wrapped(resumed)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.merge(rounds=3)
    assert same(straight, resumed)


def test_rounds_and_steps_draw_apart():
    rounds, steps = network(), network()
    wrapped(rounds, sgd(rounds, lr=1e-30, momentum=0)).merge()
    train(steps, wrapped(steps, sgd(steps, lr=1e-30, momentum=0)), 1)
    assert not same(rounds, steps)


@pytest.mark.parametrize("rounds", [-1, 1.5, True])
def test_rounds_that_are_no_count_are_refused(rounds):
    with pytest.raises(ValueError, match=rf"rounds is {rounds}, but it must be an int from 0"):
        wrapped(network()).merge(rounds=rounds)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("every", 0, "every is 0, but it must be an int from 1"),
        ("merge_start", -1, "merge_start is -1, but it must be an int from 0"),
        ("merge_stop", 2.5, "merge_stop is 2.5, but it must be an int from 0"),
    ],
)
def test_settings_that_are_no_count_are_refused(setting, value, message):
    with pytest.raises(ValueError, match=message):
        wrapped(network(), **{setting: value})
    optimizer = wrapped(network())
    with pytest.raises(ValueError, match=message):
        setattr(optimizer, setting, value)
