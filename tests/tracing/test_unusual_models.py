"""Models that need more than an ordinary run: checkpointed, scripted, without data, watched."""

from __future__ import annotations

import warnings

import pytest
import torch
from small_nets import Net, trace
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from inmerge_optim import kernel_layers


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_models_are_traced(reentrant):
    class Checkpointed(Net):
        def forward(self, x):
            return self.head(checkpoint(self.deep, self.stem(x), use_reentrant=reentrant).mean((2, 3)))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trace(Checkpointed()).executed == ["stem", "deep"]


def test_scripted_parts_are_run_and_keep_their_mode():
    model = Net().train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is on its way out
        model.deep = torch.jit.script(model.deep)
    assert trace(model).executed == ["stem"]
    assert model.deep.training


class Factory(Net):
    """A forward that makes a tensor of its own, where torch makes them by default."""

    def forward(self, x):
        return super().forward(x + torch.arange(x.shape[-1]))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("context", [FakeTensorMode, lambda: torch.device("meta"), torch.inference_mode])
def test_models_without_data_are_traced(context, inside):
    with context():
        model = Factory()
        if inside:
            assert trace(model).executed == ["stem", "deep"]
    if not inside:
        assert trace(model).executed == ["stem", "deep"]


def test_others_who_watch_operations_see_none():
    with FlopCounterMode(display=False) as counter:
        trace(Net())
    assert counter.get_total_flops() == 0


def test_autocast_keeps_no_weights_of_the_trace():
    model = Net()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert trace(model).executed == ["stem", "deep"]
        assert type(model(torch.zeros(1, 3, 8, 8))) is torch.Tensor


def test_the_trace_that_came_furthest_is_told_of():
    class Late(Net):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(1, 8, 3)

        def forward(self, x):
            return self.head(self.deep(self.stem(x)))

    with pytest.warns(UserWarning, match=r"with an input of \(1, 224, 224\) .*: 0 of its 2 layers are taken"):
        kernel_layers(Late(), 0)


def test_a_model_that_depends_on_data_is_told_of():
    class Dependent(Net):
        def forward(self, x):
            return super().forward(x) if x.sum().item() > 0 else x

    with pytest.warns(UserWarning, match=r"Dependent can't be traced with an input of \(3, 224, 224\)") as caught:
        layers = kernel_layers(Dependent(), 0)
    assert len(caught) == 1
    assert [layer.name for layer in layers] == ["stem", "deep"]
