"""What timm's own tests ask of its optimizers holds for the wrapper around each of them, and around torch's."""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import timm.optim
import torch
from toy import MERGED, loss_of, merge_step, network, same, wrapped

# Not built here, each for its own reason.
BITSANDBYTES, APEX = "bitsandbytes builds on CUDA alone", "Apex builds on CUDA alone"
UNBUILT = {
    **{name: BITSANDBYTES for name in timm.optim.list_optimizers() if name.startswith("bnb")},
    **{name: APEX for name in timm.optim.list_optimizers() if name.startswith("fused")},
    "torch SparseAdam": "takes sparse gradients alone",
    "torch Muon": "takes matrices alone",
}


def builders():
    """Return by name what builds each optimizer on an iterable of parameters or groups."""
    timms = (name for name in timm.optim.list_optimizers() if name not in UNBUILT)
    found = {name: functools.partial(timm.optim.create_optimizer_v2, opt=name) for name in timms}
    for name, kind in vars(torch.optim).items():
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer:
            found[f"torch {name}"] = kind
    found["torch LBFGS"] = functools.partial(torch.optim.LBFGS, max_iter=3)
    return {name: build for name, build in found.items() if name not in UNBUILT}


BUILDERS = builders()


@pytest.fixture(autouse=True)
def eagerly():
    """Leave out the compilation of Kron's functions, which takes minutes."""
    with torch.compiler.set_stance("force_eager"):
        yield


def built(name, wrap, seed=0):
    """Return a network and an optimizer of it."""
    model = network(seed)
    return model, wrap(model, BUILDERS[name](model.parameters(), lr=0.01))


def train(model, optimizer, steps):
    """Train through closures, which every optimizer takes; return the losses before each step."""

    def closure_of(step):
        def closure():
            torch.default_generator.manual_seed(step)  # Kron draws from it
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward(create_graph=getattr(optimizer, "is_second_order", False))
            return loss

        return closure

    return [optimizer.step(closure_of(step)).item() for step in steps]


def assert_alike(left, right):
    """Compare state dicts to the bit."""
    assert left.keys() == right.keys()
    torch.testing.assert_close(left["state"], right["state"], rtol=0, atol=0)
    assert left["param_groups"] == right["param_groups"]


def twin_that_loads_the_state_dict_is_equal_after_each_step(name, wrap):
    model, optimizer = built(name, wrap)
    train(model, optimizer, range(2))
    twin, other = built(name, wrap, seed=1)
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(saved))
    assert_alike(saved, kept)
    for step in range(2, 4):
        train(model, optimizer, [step])
        train(twin, other, [step])
        assert same(model, twin)
    assert_alike(optimizer.state_dict(), other.state_dict())


def deep_copy_is_whole_and_goes_on_like_the_original(name, wrap):
    model, optimizer = built(name, wrap)
    train(model, optimizer, range(2))
    twin, other = copy.deepcopy((model, optimizer))
    assert {key for key in dir(optimizer) if key[0] != "_"} == {key for key in dir(other) if key[0] != "_"}
    assert_alike(optimizer.state_dict(), other.state_dict())
    train(model, optimizer, range(2, 4))
    train(twin, other, range(2, 4))
    assert same(model, twin)


def scheduler_steers_it(name, wrap):
    model, optimizer = built(name, wrap)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    for step in range(2):
        train(model, optimizer, [step])
        scheduler.step()
    assert {group["lr"] for group in optimizer.param_groups} == {0.01 / 4}


def group_keeps_its_options_and_one_that_comes_later_joins(name, wrap):
    model = network()
    groups = [{"params": [*model.stem.parameters()], "lr": 0.0}, {"params": [*model.deep.parameters()], "lr": 0.02}]
    base = BUILDERS[name]([*groups, {"params": [*model.head.parameters()]}], lr=0.01)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* selected for merging are not in the optimizer")  # until it joins
        optimizer = wrap(model, base)
    train(model, optimizer, range(2))
    optimizer.add_param_group({"params": [*model.grouped.parameters()], "lr": 0.03})
    train(model, optimizer, range(2, 4))
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.02, 0.01, 0.03]


def loss_of_a_batch_falls(name, wrap):
    losses = train(*built(name, wrap), [0] * 8)
    assert min(losses[1:]) < losses[0]


CHECKS = [
    twin_that_loads_the_state_dict_is_equal_after_each_step,
    deep_copy_is_whole_and_goes_on_like_the_original,
    scheduler_steers_it,
    group_keeps_its_options_and_one_that_comes_later_joins,
    loss_of_a_batch_falls,
]
# What the bare optimizers do not do either.
EXCEPTIONS = {
    ("adahessian", twin_that_loads_the_state_dict_is_equal_after_each_step): "its generator is not in its state dict",
    ("adahessian", deep_copy_is_whole_and_goes_on_like_the_original): "its Hessians are attributes of the parameters",
    ("adahessian", group_keeps_its_options_and_one_that_comes_later_joins): "it has no Hessians for later parameters",
    ("torch LBFGS", deep_copy_is_whole_and_goes_on_like_the_original): "its copies lose their parameters",
    ("torch LBFGS", group_keeps_its_options_and_one_that_comes_later_joins): "it has one group",
}


def bare(model, base):
    return base


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a(check, name):
    if (name, check) in EXCEPTIONS:
        with pytest.raises(Exception):  # noqa: B017, PT011 - each bare optimizer fails in its own way
            check(name, bare)
    else:
        check(name, wrapped)


@pytest.mark.parametrize("name", BUILDERS)
def test_every_layer_is_merged_and_counted_around(name):
    model, optimizer = built(name, wrapped)
    train(model, optimizer, range(3))
    assert merge_step(optimizer) == 3
    assert optimizer.merge_counts().keys() == set(MERGED)
    assert all(count["merged"] > 0 for count in optimizer.merge_counts().values())
    assert type(optimizer.base_optimizer).__name__ in repr(optimizer)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on CUDA they may be built")
@pytest.mark.parametrize("name", [name for name, reason in UNBUILT.items() if reason in (BITSANDBYTES, APEX)])
def test_what_is_left_out_can_not_be_built_here(name):
    with pytest.raises((AssertionError, ImportError), match=r"CUDA|not available|required"):
        timm.optim.create_optimizer_v2(network(), name)
