"""Copies and pickles of the wrapper step themselves, with their hooks, whatever was attached to the original."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from toy import loss_of, merge_step, network, same, train, trained, weights, wrapped


def by_pickle(pair):
    return pickle.loads(pickle.dumps(pair))


def with_scheduler(model, optimizer):
    torch.optim.lr_scheduler.StepLR(optimizer, 10)


def with_accelerate(model, optimizer):
    Accelerator(cpu=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, 2)).backward()
    AcceleratedOptimizer(optimizer, scaler=scaler).step()  # leaves a bound step on the wrapper


def with_nothing(model, optimizer):
    pass


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle])
@pytest.mark.parametrize("attach", [with_nothing, with_scheduler, with_accelerate])
def test_a_copy_steps_the_copy_as_the_original_would_step(duplicate, attach):
    model, optimizer = trained(2)
    optimizer.zero_grad()
    attach(model, optimizer)
    before, steps = weights(model), merge_step(optimizer)
    model_copy, copied = duplicate((model, optimizer))
    train(model_copy, copied, range(3, 6))
    assert same(before, model)
    assert merge_step(optimizer) == steps

    train(model, optimizer, range(3, 6))
    assert same(model, model_copy)
    assert merge_step(copied) == steps + 3
    assert copied.merge_counts() == optimizer.merge_counts()
    assert repr(copied) == repr(optimizer)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle])
def test_a_copy_has_its_own_settings(duplicate):
    model, optimizer = trained(1)
    _, copied = duplicate((model, optimizer))
    copied.merge_prob = 0.0
    copied.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    assert optimizer.merge_prob == 0.5
    assert len(optimizer.param_groups) == 1


CALLS = []


def record(optimizer, args, kwargs):
    CALLS.append(optimizer)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle])
def test_hooks_of_the_wrapper_are_carried(duplicate):
    CALLS.clear()
    model, optimizer = trained(1)
    optimizer.register_step_pre_hook(record)
    optimizer.register_step_post_hook(record)
    model_copy, copied = duplicate((model, optimizer))
    train(model_copy, copied, 1)
    assert len(CALLS) == 2
    assert all(caller is copied for caller in CALLS)


def test_deepcopy_keeps_all_public_attributes():
    _, optimizer = trained(1)
    copied = copy.deepcopy(optimizer)
    public = {name for name in dir(optimizer) if not name.startswith("_")}
    assert public == {name for name in dir(copied) if not name.startswith("_")}
    for name in ("merge_prob", "merge_weight", "similarity_threshold", "criterion", "seed", "defaults"):
        assert getattr(copied, name) == getattr(optimizer, name)


GO_ON = """
import pickle, sys
from pathlib import Path
import torch
folder = Path(sys.argv[1])
torch.set_num_threads(int(sys.argv[2]))
model, optimizer = pickle.loads((folder / "saved.pkl").read_bytes())
from toy import train
train(model, optimizer, range(2, 5))
torch.save(model.state_dict(), folder / "ended.pt")
"""


def test_a_pickled_wrapper_goes_on_in_another_process(tmp_path):
    model, optimizer = trained(2)
    with_scheduler(model, optimizer)
    (tmp_path / "saved.pkl").write_bytes(pickle.dumps((model, optimizer)))
    command = [sys.executable, "-c", GO_ON, tmp_path, str(torch.get_num_threads())]
    subprocess.run(command, cwd=Path(__file__).parents[1], check=True)
    train(model, optimizer, range(2, 5))
    ended = network(seed=1)
    ended.load_state_dict(torch.load(tmp_path / "ended.pt"))
    assert same(model, ended)


def test_loading_a_state_dict_into_a_twin_keeps_twins_equal_after_each_step():
    model, optimizer = trained(2)
    twin = copy.deepcopy(model)
    other = wrapped(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(2, 6):
        train(model, optimizer, [step])
        train(twin, other, [step])
        assert same(model, twin)
