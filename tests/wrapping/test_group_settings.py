"""Merge settings that a param group has of its own, as it may have its own weight decay."""

from __future__ import annotations

import copy

import pytest
import torch
from toy import network, sgd, train, wrapped

EVERYTHING = {"merge_prob": 1.0, "similarity_threshold": -1.0}


def optimizer_with(model, **deep):
    """Return a wrapper whose group of the layer ``deep`` has settings of its own."""
    groups = [{"params": [model.deep.weight], **deep}, {"params": [model.grouped.weight]}]
    return wrapped(model, torch.optim.SGD(groups, lr=0.1), **EVERYTHING)


@pytest.mark.parametrize(
    ("setting", "drawn", "merged"),
    [
        ({"merge_prob": 0.0}, 0, 0),
        ({"similarity_threshold": 1.0}, 16, 0),
        ({"similarity_threshold": "q0.5"}, 16, 8),
        ({}, 16, 16),
    ],
)
def test_a_groups_own_setting_goes_before_the_wrappers(setting, drawn, merged):
    model = network()
    optimizer = optimizer_with(model, **setting)
    train(model, optimizer, 2)
    counts = optimizer.merge_counts()
    assert (counts["deep"]["drawn"], counts["deep"]["merged"]) == (drawn, merged)
    assert (counts["grouped"]["drawn"], counts["grouped"]["merged"]) == (16, 16)


def test_a_groups_own_merge_weight_is_the_share_that_its_kernels_keep():
    kept, merged = network(), network()
    train(kept, optimizer_with(kept, merge_weight=1.0), 1)
    train(merged, optimizer_with(merged), 1)
    bare = network()
    train(bare, torch.optim.SGD([bare.deep.weight, bare.grouped.weight], lr=0.1), 1)
    assert torch.equal(kept.deep.weight, bare.deep.weight)
    assert not torch.equal(merged.deep.weight, bare.deep.weight)
    assert torch.equal(kept.grouped.weight, merged.grouped.weight)


def test_own_settings_stay_when_a_bare_checkpoint_is_loaded():
    model = network()
    optimizer = optimizer_with(model, merge_prob=0.0)
    bare = torch.optim.SGD([{"params": [model.deep.weight]}, {"params": [model.grouped.weight]}], lr=0.2)
    optimizer.load_state_dict(bare.state_dict())
    assert optimizer.param_groups[0]["merge_prob"] == 0.0
    assert "merge_prob" not in optimizer.param_groups[1]
    assert optimizer.param_groups[0]["lr"] == 0.2


def test_own_settings_travel_with_the_wrappers_checkpoint():
    model = network()
    saved = copy.deepcopy(optimizer_with(model, merge_prob=0.25).state_dict())
    optimizer = optimizer_with(model)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["merge_prob"] == 0.25


def test_the_draws_of_other_groups_do_not_depend_on_a_groups_own_probability():
    one, other = network(), network()
    for model, prob in ((one, 0.1), (other, 0.9)):
        train(model, optimizer_with(model, merge_prob=prob), 1)
    assert torch.equal(one.grouped.weight, other.grouped.weight)
    assert not torch.equal(one.deep.weight, other.deep.weight)


def test_groups_of_the_base_may_have_them_from_the_start():
    model = network()
    optimizer = wrapped(model, sgd(model), **EVERYTHING)
    optimizer.param_groups[0]["merge_prob"] = 0.0  # as a scheduler of one's own would set it
    train(model, optimizer, 1)
    assert all(count["drawn"] == 0 for count in optimizer.merge_counts().values())
