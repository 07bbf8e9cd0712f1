"""Parameter groups that change after wrapping, with the wrapper's knowledge or behind its back."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from toy import loss_of, merge_step, network, sgd, train, weights, wrapped

EVERYTHING = {"merge_prob": 1.0, "similarity_threshold": -1.0}


def group_per_layer(model):
    """Return SGD without momentum and a rate so small that only merging moves the weights."""
    groups = [{"params": list(part.parameters())} for part in model.children() if list(part.parameters())]
    return torch.optim.SGD(groups, lr=1e-30)


def changed_by_a_step(model, optimizer):
    """Return which parameters a step changes."""
    before = weights(model)
    optimizer.zero_grad()
    loss_of(model, 0).backward()
    optimizer.step()
    return {name for name, value in weights(model).items() if not torch.equal(value, before[name])}


def test_a_removed_group_leaves_the_other_layers_bound_to_their_own_weights():
    model = network()
    optimizer = wrapped(model, group_per_layer(model), **EVERYTHING)
    del optimizer.param_groups[0]  # of the stem
    assert changed_by_a_step(model, optimizer) == {"deep.weight", "grouped.weight"}
    assert {name: count["merged"] for name, count in optimizer.merge_counts().items()} == {"deep": 8, "grouped": 8}


def test_a_layer_whose_group_is_removed_is_left_alone_and_reported():
    model = network()
    optimizer = wrapped(model, group_per_layer(model), **EVERYTHING)
    del optimizer.param_groups[1]  # of deep, whose place another weight of its shape then has: it is merged as its own
    with pytest.warns(UserWarning, match="1 of the 2 layers selected for merging are not in the optimizer.*: deep;"):
        assert changed_by_a_step(model, optimizer) == {"grouped.weight"}
    assert {layer.name: layer.reason for layer in optimizer.layers}["deep"] == "not in the optimizer"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once
        changed_by_a_step(model, optimizer)


@pytest.mark.parametrize("build", [network, lambda: network().double()])
def test_groups_may_be_cleared_and_added_anew(build):
    """The idiom of unfreezing: other parameters come to stand in the old places, the layers' own among them."""
    model = build()
    optimizer = wrapped(model, sgd(model, lr=1e-30, momentum=0), **EVERYTHING)
    optimizer.param_groups.clear()
    optimizer.add_param_group({"params": [model.head.weight, model.grouped.weight, model.stem.weight], "lr": 1e-30})
    with pytest.warns(UserWarning, match="not in the optimizer.*: deep;"):
        assert changed_by_a_step(model, optimizer) == {"grouped.weight"}
    optimizer.add_param_group({"params": [model.deep.weight], "lr": 1e-30})
    assert changed_by_a_step(model, optimizer) == {"deep.weight", "grouped.weight"}


def test_a_new_head_in_a_bound_place_is_no_flattened_parameter():
    model = network()
    optimizer = wrapped(model, sgd(model, momentum=0), **EVERYTHING)
    model.head = torch.nn.Linear(8, 4)
    optimizer.param_groups.clear()
    optimizer.add_param_group({"params": list(model.head.parameters()) + [torch.nn.Parameter(torch.zeros(2, 2))] * 1})
    with pytest.warns(UserWarning, match="2 of the 2 layers selected"):
        train(model, optimizer, 1)


def test_a_weight_that_the_model_has_elsewhere_is_never_taken_for_a_replaced_one():
    model = network()
    extra = torch.nn.Conv2d(8, 8, 3, padding=1)
    model.add_module("extra", extra)  # of the model, of deep's shape, in no group yet
    base = torch.optim.SGD([model.deep.weight, model.grouped.weight], lr=1e-30)
    optimizer = wrapped(model, base, **EVERYTHING)
    optimizer.param_groups[0]["params"][0] = extra.weight
    extra.weight.grad = torch.zeros_like(extra.weight)
    before = extra.weight.detach().clone()
    with pytest.warns(UserWarning, match="not in the optimizer.*: deep;"):
        optimizer.step()
    assert torch.equal(before, extra.weight)


def test_groups_in_another_order_keep_each_layer_its_weight():
    model = network()
    optimizer = wrapped(model, group_per_layer(model), **EVERYTHING)
    optimizer.param_groups.reverse()
    drawn = wrapped(twin := network(), group_per_layer(twin), **EVERYTHING)
    assert changed_by_a_step(model, optimizer) == changed_by_a_step(twin, drawn) == {"deep.weight", "grouped.weight"}
    assert all(torch.equal(value, weights(twin)[name]) for name, value in weights(model).items())


def add_to_the_base(optimizer, group):
    optimizer.base_optimizer.add_param_group(group)


def append_to_the_groups(optimizer, group):
    optimizer.param_groups.append({**optimizer.param_groups[0], **group})
    optimizer.param_groups[-1].pop("inmerge_step", None)


def set_the_groups(optimizer, group):
    fresh = {name: value for name, value in optimizer.param_groups[0].items() if not name.startswith("inmerge")}
    optimizer.param_groups = [*optimizer.param_groups, {**fresh, **group}]


@pytest.mark.parametrize("add", [add_to_the_base, append_to_the_groups, set_the_groups])
def test_groups_added_behind_the_wrapper_are_merged_and_counted(add):
    model = network()
    with pytest.warns(UserWarning, match="not in the optimizer"):
        optimizer = wrapped(model, torch.optim.SGD([model.deep.weight], lr=0.1), **EVERYTHING)
    train(model, optimizer, 2)
    add(optimizer, {"params": [model.grouped.weight]})
    train(model, optimizer, range(2, 4))
    assert merge_step(optimizer) == 4
    assert {name: count["drawn"] for name, count in optimizer.merge_counts().items()} == {"deep": 32, "grouped": 16}


def test_a_bare_checkpoint_loaded_behind_the_wrapper_starts_at_step_0():
    model = network()
    bare = sgd(network()).state_dict()
    optimizer = wrapped(model)
    train(model, optimizer, 2)
    optimizer.base_optimizer.load_state_dict(bare)
    train(model, optimizer, range(2, 4))
    assert merge_step(optimizer) == 2


class Counting(torch.optim.SGD):
    """A base that says how often it stepped."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        return super().step(closure)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda opt: opt.param_groups[0].update(merge_prob=1.5),
            "merge_prob is 1.5, but it must be a number from 0 to 1",
        ),
        (lambda opt: opt.param_groups[0].update(similarity_threshold="much"), "similarity_threshold is 'much'"),
        (
            lambda opt: opt.param_groups[0].update(params=[torch.nn.Parameter(torch.zeros(9999))]),
            r"flattened or replaced.*use DDP or FSDP2",
        ),
    ],
)
def test_what_can_be_known_is_raised_before_the_base_steps(spoil, message):
    model = network()
    base = Counting(model.parameters(), lr=0.1)
    optimizer = wrapped(model, base)
    spoil(optimizer)
    loss_of(model, 0).backward()
    with pytest.raises((ValueError, RuntimeError), match=message):
        optimizer.step()
    assert base.steps == 0


def test_a_rank_s_part_of_flattened_parameters_is_known_by_the_number_of_ranks(monkeypatch):
    optimizer = wrapped(network())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    optimizer.param_groups[0]["params"] = [torch.nn.Parameter(torch.zeros(300))]  # half of deep's 576 and a little
    with pytest.raises(RuntimeError, match="the weight of deep had shape"):
        optimizer.step()


def test_the_order_in_which_layers_are_bound_does_not_matter():
    early, late = network(), network()
    settings = {"merge_prob": 0.5, "similarity_threshold": -1.0}
    first = wrapped(early, torch.optim.SGD([early.deep.weight, early.grouped.weight], lr=0.1), **settings)
    with pytest.warns(UserWarning, match="not in the optimizer"):
        second = wrapped(late, torch.optim.SGD([late.grouped.weight], lr=0.1), **settings)
    second.add_param_group({"params": [late.deep.weight]})
    train(early, first, 3)
    train(late, second, 3)
    assert all(torch.equal(value, weights(late)[name]) for name, value in weights(early).items())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_takes_the_places_and_binds_no_other_layers(duplicate):
    model = network()
    with pytest.warns(UserWarning, match="not in the optimizer"):
        optimizer = wrapped(model, torch.optim.SGD([model.deep.weight], lr=1e-30), **EVERYTHING)
    model_copy, copied = duplicate((model, optimizer))
    copied.add_param_group({"params": [model_copy.grouped.weight]})
    assert changed_by_a_step(model_copy, copied) == {"deep.weight"}
    del copied.param_groups[0]
    with pytest.warns(UserWarning, match="not in the optimizer.*: deep;"):
        assert changed_by_a_step(model_copy, copied) == set()
