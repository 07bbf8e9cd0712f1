"""Weights that are frozen, shared, made by a parametrization or no longer whole."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils import parametrizations, parametrize, weight_norm
from toy import merge_step, network, sgd, train, weights, wrapped


def remarks(optimizer):
    return {layer.name: layer.reason for layer in optimizer.layers if layer.name in ("deep", "again", "grouped")}


@pytest.mark.parametrize("stale", [False, True], ids=["without gradients", "with gradients left over"])
def test_a_frozen_layer_is_left_alone_until_it_is_unfrozen(stale):
    model = network()
    optimizer = wrapped(model)
    if stale:
        train(model, optimizer, 1)
    model.deep.weight.requires_grad_(False)
    steps = merge_step(optimizer)
    drawn = optimizer.merge_counts()["deep"]["drawn"]
    assert remarks(optimizer)["deep"] == "frozen"
    before = weights(model)
    for _ in range(2):
        if not stale:
            optimizer.zero_grad()
        optimizer.step()
    if not stale:
        assert torch.equal(before["deep.weight"], model.deep.weight)
    assert optimizer.merge_counts()["deep"]["drawn"] == drawn

    model.deep.weight.requires_grad_(True)
    assert remarks(optimizer)["deep"] == ""
    train(model, optimizer, range(2, 5))
    assert optimizer.merge_counts()["deep"]["drawn"] > drawn
    assert merge_step(optimizer) == steps + 5


def test_a_layer_that_was_frozen_when_it_was_wrapped_is_merged_once_it_is_unfrozen():
    model = network()
    model.deep.weight.requires_grad_(False)
    optimizer = wrapped(model)
    assert remarks(optimizer)["deep"] == "frozen"
    train(model, optimizer, 1)
    assert optimizer.merge_counts()["deep"]["drawn"] == 0
    model.deep.weight.requires_grad_(True)
    train(model, optimizer, range(1, 3))
    assert optimizer.merge_counts()["deep"]["merged"] > 0


def test_a_frozen_layer_changes_no_draw_of_the_others():
    model, other = network(), network()
    for_all, for_one = wrapped(model), wrapped(other)
    other.deep.weight.requires_grad_(False)
    train(model, for_all, 3)
    train(other, for_one, 3)
    assert for_all.merge_counts()["grouped"]["drawn"] == for_one.merge_counts()["grouped"]["drawn"]


def test_a_layer_whose_group_has_no_learning_rate_is_left_alone():
    model = network()
    groups = [{"params": model.deep.parameters(), "lr": 0.0}, {"params": model.grouped.parameters()}]
    optimizer = wrapped(model, torch.optim.SGD(groups, lr=0.1), merge_prob=1.0, similarity_threshold=-1.0)
    before = weights(model)
    train(model, optimizer, 1)
    assert torch.equal(model.deep.weight, before["deep.weight"])
    assert {name: counts["drawn"] for name, counts in optimizer.merge_counts().items()} == {"deep": 0, "grouped": 8}


def test_a_shared_weight_is_merged_once_and_reported():
    model = network()
    again = torch.nn.Conv2d(8, 8, 3, padding=1)
    again.weight = model.deep.weight
    model.add_module("again", again)
    model = torch.nn.Sequential(
        *[model.stem, model.act1, model.deep, model.act2, again, model.act3, model.pool, model.flatten, model.head]
    )
    optimizer = wrapped(model, names=["2", "4"], merge_prob=1.0, similarity_threshold=-1.0)
    train(model, optimizer, 1)
    assert {layer.name: layer.reason for layer in optimizer.layers}["4"] == "tied to 2"
    assert {name: count["merged"] for name, count in optimizer.merge_counts().items()} == {"2": 8}


@pytest.mark.parametrize(
    "normalise",
    [
        pytest.param(weight_norm, marks=pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")),
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        lambda layer: parametrize.register_parametrization(layer, "weight", torch.nn.Tanh()),
    ],
    ids=["weight_norm by hooks", "weight_norm", "spectral_norm", "own"],
)
def test_a_parametrized_weight_is_left_alone_and_reported(normalise):
    def build():
        model = network()
        normalise(model.deep)
        return model

    model = build()
    optimizer = wrapped(model)
    assert remarks(optimizer) == {"deep": "parametrized", "grouped": ""}
    train(model, optimizer, 1)
    assert optimizer.merge_counts().keys() == {"grouped"}

    bare = build()
    train(bare, sgd(bare), 1)
    for name, value in weights(bare).items():
        assert name == "grouped.weight" or torch.equal(value, weights(model)[name])


def as_one(parameters):
    """Flatten all parameters into one, as FSDP1 does."""
    return [torch.cat([parameter.detach().flatten() for parameter in parameters]).requires_grad_()]


def each_alone(parameters):
    """Flatten each parameter, as ZeRO does to split it."""
    return [parameter.detach().flatten().requires_grad_() for parameter in parameters]


@pytest.mark.parametrize("flatten", [as_one, each_alone])
def test_flattened_parameters_raise_with_what_to_do(flatten):
    model = network()
    optimizer = wrapped(model)
    flat = flatten(optimizer.param_groups[0]["params"])
    optimizer.param_groups[0]["params"] = flat
    for parameter in flat:
        parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(RuntimeError, match=r"flattened or replaced.*use DDP or FSDP2"):
        optimizer.step()


def test_a_flattened_linear_layer_raises_too():
    model = network()
    optimizer = wrapped(model, names=["head"], layer_types=(torch.nn.Linear,))
    optimizer.param_groups[0]["params"] = each_alone(optimizer.param_groups[0]["params"])
    with pytest.raises(RuntimeError, match=r"the weight of head had shape \(4, 8\) .*flattened or replaced"):
        optimizer.step()


def test_a_parameter_that_was_flattened_and_is_the_same_object_raises_before_the_base_steps():
    """FSDP1 with use_orig_params keeps the parameters, and gives them this rank's part of a flat one as data."""
    model = network()
    optimizer = wrapped(model)
    model.deep.weight.data = model.deep.weight.detach().flatten()[:100].clone()
    before = weights(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(RuntimeError, match=r"flattened or replaced.*use DDP or FSDP2"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_replaced_parameters_of_the_same_shapes_are_merged_in_their_place():
    """Sharding and device moves replace parameters: the optimizer's are what counts, not the module's old ones."""
    model = network()
    optimizer = wrapped(model, sgd(model, momentum=0), merge_prob=1.0, similarity_threshold=-1.0)
    group = optimizer.param_groups[0]
    group["params"] = [torch.nn.Parameter(parameter.detach().clone()) for parameter in group["params"]]
    before = weights(model)
    for parameter in group["params"]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    replaced = dict(zip(before, group["params"], strict=True))
    assert all(torch.equal(value, weights(model)[name]) for name, value in before.items())
    changed = {name for name, value in before.items() if not torch.equal(value, replaced[name])}
    assert changed == {"deep.weight", "grouped.weight"}
