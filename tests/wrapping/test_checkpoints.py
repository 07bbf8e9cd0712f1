"""Checkpoints are the base's with the step number, in plain files and in torch.distributed.checkpoint."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.distributed.checkpoint as dcp
from timm.optim import create_optimizer_v2
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from toy import merge_step, network, same, sgd, train, trained, weights, wrapped

BASES = {
    "SGD": sgd,
    "stateless SGD": functools.partial(sgd, momentum=0),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
    "tensor rate": lambda model: torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01)),
    "timm groups": lambda model: create_optimizer_v2(model, "lamb", lr=0.01, weight_decay=0.1),
}
every_base = pytest.mark.parametrize("base", BASES.values(), ids=BASES)


def fresh(base, seed=1):
    """Return another model and a wrapper around its base, as a new process builds them."""
    model = network(seed)
    return model, wrapped(model, base(model))


@every_base
def test_a_resumed_run_is_exact_to_the_bit(base, tmp_path):
    model, optimizer = trained(3, base)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "checkpoint.pt")
    train(model, optimizer, range(3, 6))

    resumed, other = fresh(base)
    saved_model, saved_optimizer = torch.load(tmp_path / "checkpoint.pt")
    resumed.load_state_dict(saved_model)
    other.load_state_dict(state_dict=saved_optimizer)
    assert merge_step(other) == 3
    train(resumed, other, range(3, 6))
    assert same(model, resumed)


@every_base
def test_distributed_checkpoint_moves_no_weight_and_counts_no_step(base):
    model, optimizer = fresh(base)
    before = weights(model)
    get_optimizer_state_dict(model, optimizer)
    assert same(before, model)
    assert merge_step(optimizer) == 0
    assert not any(count["drawn"] for count in optimizer.merge_counts().values())


def test_stateless_sgd_keeps_its_weights_at_every_save():
    model, optimizer = trained(3, BASES["stateless SGD"])
    expected, other = trained(3, BASES["stateless SGD"])
    for step in range(3, 6):
        optimizer.zero_grad()
        get_optimizer_state_dict(model, optimizer)
        train(model, optimizer, [step])
        train(expected, other, [step])
    assert same(model, expected)


@every_base
def test_distributed_checkpoint_resumes_to_the_bit(base, tmp_path):
    model, optimizer = trained(3, base)
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    train(model, optimizer, range(3, 6))

    resumed, other = fresh(base)
    state = {"model": resumed.state_dict(), "optimizer": get_optimizer_state_dict(resumed, other)}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    resumed.load_state_dict(state["model"])
    set_optimizer_state_dict(resumed, other, state["optimizer"])
    assert merge_step(other) == 3
    train(resumed, other, range(3, 6))
    assert same(model, resumed)


@every_base
def test_a_checkpoint_of_the_bare_base_loads_and_merging_starts_at_step_0(base):
    model = network()
    bare = base(model)
    train(model, bare, 3)
    other = network()
    optimizer = wrapped(other, base(other))
    train(other, optimizer, 2)
    other.load_state_dict(model.state_dict())
    optimizer.load_state_dict(copy.deepcopy(bare.state_dict()))
    assert merge_step(optimizer) == 0
    train(other, optimizer, range(3, 6))

    wrapped_late = wrapped(model, bare)
    train(model, wrapped_late, range(3, 6))
    assert same(model, other)
    assert merge_step(optimizer) == 3


def test_a_checkpoint_of_the_wrapper_loads_into_the_bare_base():
    model, optimizer = trained(3)
    bare = sgd(model)
    bare.load_state_dict(optimizer.state_dict())
    momenta = [bare.state[parameter]["momentum_buffer"] for parameter in model.parameters()]
    expected = [optimizer.state[parameter]["momentum_buffer"] for parameter in model.parameters()]
    assert all(map(torch.equal, momenta, expected))


@pytest.fixture
def bare_distributed_checkpoint(tmp_path):
    """Save a run of the bare base with torch.distributed.checkpoint; return its model, base and folder."""
    model = network()
    bare = sgd(model)
    train(model, bare, 3)
    dcp.save({"optimizer": get_optimizer_state_dict(model, bare)}, checkpoint_id=tmp_path, no_dist=True)
    return model, bare, tmp_path


def test_a_distributed_checkpoint_of_the_bare_base_lacks_the_step_number(bare_distributed_checkpoint):
    model, _, folder = bare_distributed_checkpoint
    state = {"optimizer": get_optimizer_state_dict(model, wrapped(model))}
    with pytest.raises(dcp.api.CheckpointException, match=r"Missing key.*inmerge_step"):
        dcp.load(state, checkpoint_id=folder, no_dist=True)


@pytest.mark.parametrize("into_the_base", [True, False], ids=["into the base, then wrap", "allow_partial_load"])
def test_a_distributed_checkpoint_of_the_bare_base_loads_in_both_documented_ways(
    bare_distributed_checkpoint, into_the_base
):
    model, bare, folder = bare_distributed_checkpoint
    other = network()
    other.load_state_dict(model.state_dict())
    base = sgd(other)
    optimizer = base if into_the_base else wrapped(other, base)
    state = {"optimizer": get_optimizer_state_dict(other, optimizer)}
    planner = dcp.DefaultLoadPlanner(allow_partial_load=not into_the_base)
    dcp.load(state, checkpoint_id=folder, planner=planner, no_dist=True)
    set_optimizer_state_dict(other, optimizer, state["optimizer"])
    optimizer = wrapped(other, base) if into_the_base else optimizer
    assert merge_step(optimizer) == 0

    train(other, optimizer, range(3, 6))
    train(model, wrapped(model, bare), range(3, 6))
    assert same(model, other)


def test_nothing_of_the_wrapper_is_in_the_state_of_the_base():
    bare = sgd(network())
    _, optimizer = trained(3)
    saved = optimizer.state_dict()
    assert saved.keys() == bare.state_dict().keys()
    assert all(entry.keys() == {"momentum_buffer"} for entry in saved["state"].values())
    assert saved["param_groups"][0].keys() - bare.state_dict()["param_groups"][0].keys() == {
        "inmerge_step",
        "inmerge_rounds",
    }


def test_hooks_of_the_wrapper_see_its_state_dicts():
    model, optimizer = trained(1)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda wrapper: seen.append(wrapper))
    optimizer.register_state_dict_post_hook(lambda wrapper, state: {**state, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(
        lambda wrapper, state: {
            **state,
            "param_groups": [{**group, "inmerge_step": 7} for group in state["param_groups"]],
        }
    )
    optimizer.register_load_state_dict_post_hook(lambda wrapper: seen.append(merge_step(wrapper)))
    saved = optimizer.state_dict()
    assert saved["extra"] == 1
    optimizer.load_state_dict(saved)
    assert seen == [optimizer, 7]
    assert same(model, trained(1)[0])
