"""A look at a model leaves it, and all beside it, as they were."""

from __future__ import annotations

import random
import threading
import types
import warnings
from collections import deque

import numpy as np
import pytest
import timm
import torch
from small_nets import Net, trace
from torch import nn
from torch.nn.utils import weight_norm

from inmerge_optim import kernel_layers


def state_of(model):
    """Every attribute of every module in its order, and what the containers among them hold."""
    state = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, dict):
                held = [part for item in value.items() for part in item]
            else:
                held = list(value) if isinstance(value, (list, set, deque)) else [value]
            state[name, key] = [value, *held]
    return state


def assert_as_before(model, before):
    after = state_of(model)
    assert list(after) == list(before)
    for place, held in after.items():
        assert len(held) == len(before[place]), place
        assert all(left is right for left, right in zip(held, before[place], strict=True)), place


class Keeper(Net):
    """A model whose forward leaves something in every place that there is."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.count = torch.zeros(2)
        self.cached = None
        self.by_name = {"first": torch.ones(3), "nested": {}}
        self.listed, self.seen, self.last = [[]], set(), deque(maxlen=2)
        self.helper = types.SimpleNamespace(cache=None, held={})
        self.inner = nn.Sequential(nn.Identity())

    def forward(self, x):
        assert isinstance(self.deep.weight, nn.Parameter)
        assert not self.training
        assert not self.deep.training
        assert not torch.is_grad_enabled()
        self.calls += 1
        self.count.add_(1)
        self.stem.weight.data.mul_(2)
        self.cached = self.new = self.inner[0].kept = x
        self.by_name["second"] = self.by_name["nested"]["x"] = self.listed[0] = x
        self.by_name["first"] = x
        self.listed.append(x)
        self.seen.add(x)
        self.last.append(x)
        self.helper.cache = self.helper.held["x"] = x
        self.register_buffer("late", x)
        self.added = nn.Linear(2, 2)
        del self.inner[0]
        self.deep.weight.requires_grad_(False)
        return super().forward(x)


@pytest.mark.parametrize("fails", [False, True])
def test_a_forward_leaves_nothing_in_the_model(fails):
    class Model(Keeper):
        def forward(self, x):
            found = super().forward(x)
            if fails:
                raise KeyError("late")
            return found

    model = Model().train()
    model.deep.eval()
    before, weights = state_of(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    versions = [tensor._version for tensor in (*model.parameters(), *model.buffers(), model.count)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if fails else "error")  # one tells of the failure
        kernel_layers(model, 1)
    assert_as_before(model, before)
    assert (model.training, model.stem.training, model.deep.training) == (True, True, False)
    assert model.by_name["nested"] == model.helper.held == {}
    assert model.listed == [[]]
    assert model.helper.cache is None
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert versions == [tensor._version for tensor in (*model.parameters(), *model.buffers(), model.count)]


def test_what_cannot_be_copied_is_no_hindrance():
    class Uncopied(torch.Tensor):
        def __deepcopy__(self, memo):
            raise AssertionError("this tensor was copied")

    model = Net()
    model.lock = threading.Lock()
    model.graph = (model.stem.weight * 2).sum()
    model.tables = {"large": torch.zeros(3).as_subclass(Uncopied)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still in use
        weight_norm(model.deep)  # leaves a weight that is part of a graph
    before = state_of(model)
    assert trace(model).executed == ["stem", "deep"]
    assert_as_before(model, before)


def test_caches_of_levit_stay_empty():
    model = timm.create_model("levit_128s", num_classes=3).train()
    caches = [module.attention_bias_cache for module in model.modules() if hasattr(module, "attention_bias_cache")]
    trace(model)
    assert caches
    assert not any(caches)


@pytest.fixture
def calls():
    """What was called, with all of torch's global hooks in place."""
    found = []
    module = nn.modules.module
    handles = [
        module.register_module_forward_pre_hook(lambda *args: found.append("global pre-hook")),
        module.register_module_forward_hook(lambda *args: found.append("global hook")),
        module.register_module_full_backward_pre_hook(lambda *args: found.append("global backward pre-hook")),
        module.register_module_full_backward_hook(lambda *args: found.append("global backward hook")),
        module.register_module_buffer_registration_hook(lambda *args: found.append("buffer registration")),
        module.register_module_module_registration_hook(lambda *args: found.append("module registration")),
        module.register_module_parameter_registration_hook(lambda *args: found.append("parameter registration")),
    ]
    yield found
    for handle in handles:
        handle.remove()


def test_no_hook_is_called_and_all_are_kept(calls):
    model = Keeper()
    for module in (model, model.deep):
        module.register_forward_pre_hook(lambda *args: calls.append("pre-hook"))
        module.register_forward_pre_hook(lambda *args, **kwargs: calls.append("pre-hook"), with_kwargs=True)
        module.register_forward_hook(lambda *args: calls.append("hook"), always_call=True)
        module.register_full_backward_pre_hook(lambda *args: calls.append("backward pre-hook"))
        module.register_full_backward_hook(lambda *args: calls.append("backward hook"))
    calls.clear()
    before = state_of(model)
    assert trace(model).executed == ["stem", "deep"]
    assert not calls
    assert_as_before(model, before)
    Net()(torch.zeros(1, 3, 8, 8, requires_grad=True)).sum().backward()
    assert {"global pre-hook", "global hook", "global backward hook", "parameter registration"} <= set(calls)
    calls.clear()
    model.deep(torch.zeros(1, 8, 8, 8))
    assert {"pre-hook", "hook"} <= set(calls)


def test_compiled_models_are_run_as_they_were_written():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    class Function(Net):
        def forward(self, x):
            return super().forward(torch.compile(torch.relu, backend=backend, fullgraph=True)(x))

    model = Function()
    model.compile(backend=backend)
    model.stem._compiled_call_impl = compiled.append  # of another compiler
    model.deep = torch.compile(model.deep, backend=backend)
    before = state_of(model)
    assert trace(model).executed == ["stem", "deep._orig_mod"]
    assert not compiled
    assert_as_before(model, before)


def test_random_states_are_kept():
    class Random(Net):
        def forward(self, x):
            torch.manual_seed(random.randrange(100) + int(np.random.randint(100)))  # noqa: NPY002
            return super().forward(x + torch.rand(x.shape))

    def states():
        name, keys, *rest = np.random.get_state()  # noqa: NPY002
        return torch.get_rng_state().tolist(), random.getstate(), (name, keys.tolist(), *rest)

    model = Random()
    before = states()
    trace(model)
    assert states() == before


def test_gradients_and_graphs_are_kept():
    model = Net()
    loss = model(torch.zeros(1, 3, 8, 8)).sum()
    trace(model)
    assert torch.is_grad_enabled()
    loss.backward()
    gradient = model.deep.weight.grad
    trace(model)
    assert model.deep.weight.grad is gradient
