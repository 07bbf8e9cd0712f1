"""What one look at a model sees of its layers, and that it leaves the model, and all beside it, as they were."""

from __future__ import annotations

import random
import threading
import types
import warnings
from collections import OrderedDict, deque
from dataclasses import dataclass

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import prune, weight_norm
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from inmerge_optim import kernel_layers
from inmerge_optim.selection import CONVOLUTIONS
from inmerge_optim.tracing import trace_layers


def trace(model, example_inputs=None):
    """Trace all convolutions of a model, which must succeed."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, CONVOLUTIONS)}
    found = trace_layers(model, layers, example_inputs)
    assert not found.problem
    return found


class Net(nn.Module):
    """Two convolutions and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.deep = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.deep(self.stem(x)).mean((2, 3)))


# Outputs


@dataclass
class Prediction:
    """What a model may return that torch does not look into."""

    maps: torch.Tensor


class Segmenter(nn.Module):
    """Deep supervision: a head of its own for each depth, of as many kernels as there are classes."""

    def __init__(self, returned):
        super().__init__()
        self.returned = returned
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.early = nn.Conv2d(8, 5, 1)
        self.deep = nn.Conv2d(8, 8, 3, padding=1)
        self.late = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        early = nn.functional.interpolate(self.early(x), scale_factor=2)
        return self.returned(self.late(self.deep(x).relu()).softmax(1), early)


@pytest.mark.parametrize(
    "returned",
    [
        lambda late, early: (late, early),
        lambda late, early: [late, early],
        lambda late, early: {"seg": late, "ds": [early]},
        lambda late, early: OrderedDict(seg=late, deep=OrderedDict(early=early)),
        lambda late, early: types.MappingProxyType({"seg": late, "early": early}),
        lambda late, early: [Prediction(late), Prediction(early)],
        lambda late, early: torch.stack([late, early[..., ::2, ::2]], 1).flatten(0, 1),
        lambda late, early: late,  # the auxiliary head runs in eval mode too, before the last layer, and is dropped
        lambda late, early: late + early[..., ::2, ::2],
    ],
    ids=["tuple", "list", "dict", "ordered", "mapping", "data class", "stacked", "dropped", "summed"],
)
def test_the_layers_of_all_outputs_are_classifiers(returned):
    assert trace(Segmenter(returned)).classifiers == {"early", "late"}


@pytest.mark.parametrize("container", [tuple, list, lambda outputs: {"seg": outputs[0]}])
@pytest.mark.parametrize(
    ("build", "classifier"),
    [
        (lambda: torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None), "classifier.4"),
        (torchvision.models.squeezenet1_1, "classifier.1"),
    ],
    ids=["fcn", "squeezenet"],
)
def test_the_classifier_is_known_whatever_container_the_output_is_in(build, classifier, container):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = build()

        def forward(self, x):
            found = self.model(x)
            return container([found["out"] if isinstance(found, dict) else found])

    assert trace(Wrapped()).classifiers == {f"model.{classifier}"}


@pytest.mark.parametrize(
    "returned",
    [
        lambda *maps: maps,
        lambda fused, *sides: [fused, {"sides": list(sides)}],
        lambda *maps: types.MappingProxyType(dict(enumerate(maps))),
        lambda *maps: [Prediction(single) for single in maps],
    ],
    ids=["tuple", "nested", "mapping", "data class"],
)
def test_side_outputs_that_a_last_layer_fuses_are_classifiers(returned):
    class Fused(Segmenter):
        def __init__(self):
            super().__init__(None)
            self.fuse = nn.Conv2d(10, 5, 1)

        def forward(self, x):
            x = self.stem(x)
            early, late = self.early(x), self.late(self.deep(x))
            return returned(self.fuse(torch.cat([early, late], 1)), early, late)

    assert trace(Fused()).classifiers == {"early", "late", "fuse"}


def test_features_beside_the_classes_do_not_make_classifiers():
    class Both(Net):
        def forward(self, x):
            features = self.deep(self.stem(x)).relu()
            return self.head(features.mean((2, 3))), features

    assert not trace(Both()).classifiers


def test_a_detectors_anchors_times_classes_are_its_outputs():
    class Detector(Net):
        def __init__(self):
            super().__init__()
            self.predict = nn.Conv2d(8, 3 * 7, 1)

        def forward(self, x):
            return self.predict(self.deep(self.stem(x))).unflatten(1, (3, 7)).flatten(3).transpose(2, 3)

    assert trace(Detector()).classifiers == {"predict"}


@pytest.mark.parametrize(
    "head",
    [
        lambda net, x: nn.functional.linear(x, net.head.weight),
        lambda net, x: nn.functional.normalize(x) @ nn.functional.normalize(net.head.weight).t(),
        lambda net, x: x @ net.prototypes,
    ],
    ids=["functional", "cosines", "buffer"],
)
def test_a_classifier_need_not_be_a_layer(head):
    class Functional(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("prototypes", torch.ones(8, 2))

        def forward(self, x):
            return head(self, self.deep(self.stem(x)).mean((2, 3)))

    assert not trace(Functional()).classifiers


def test_what_scales_shifts_and_orders_the_classes_is_no_layer_of_its_own():
    class Calibrated(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
            self.scale = nn.Parameter(torch.ones(2, 1, 1))
            self.register_buffer("mean", torch.zeros(1, 2, 1, 1))
            self.register_buffer("order", torch.tensor([1, 0]))

        def forward(self, x):
            return ((self.body(x) - self.mean) * self.scale)[:, self.order]

    assert trace(Calibrated()).classifiers == {"body.2"}


def test_sources_are_followed_through_changes_in_place():
    class InPlace(Segmenter):
        def forward(self, x):
            x = self.stem(x).relu_()
            maps = torch.zeros(x.shape[0], 10, *x.shape[2:])
            maps[:, :5] = self.early(x)
            maps[:, 5:].add_(self.late(self.deep(x)))
            return maps

    assert trace(InPlace(None)).classifiers == {"early", "late"}


def test_a_layer_whose_weight_is_pruned_still_takes_the_features_before_it():
    model = Net()
    prune.l1_unstructured(model.head, "weight", 0.5)
    prune.l1_unstructured(model.deep, "weight", 0.5)
    assert not trace(model).classifiers


def test_a_layer_whose_weight_depends_on_its_input_takes_the_features_before_it():
    class Dynamic(nn.Conv2d):
        def forward(self, x):
            return nn.functional.conv2d(x, self.weight * x.mean())

    model = Net()
    model.deep = Dynamic(8, 8, 3)
    assert not trace(model).classifiers


# The order, and what acts as fully connected


class Gated(nn.Module):
    """A convolution, and a squeeze-excite of two more, in any number of dimensions."""

    def __init__(self, convolution):
        super().__init__()
        self.stem = convolution(2, 16, 3, stride=2)
        self.squeeze = convolution(16, 4, 1)
        self.excite = convolution(4, 16, 1)
        self.deep = convolution(16, 16, 3)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.stem(x)
        space = tuple(range(2, x.dim()))
        x = x * self.excite(self.squeeze(x.mean(space, keepdim=True))).sigmoid()
        return self.head(self.deep(x).mean(space))


@pytest.mark.parametrize("convolution", CONVOLUTIONS)
def test_what_acts_as_fully_connected_is_known_in_any_number_of_dimensions(convolution):
    found = trace(Gated(convolution))
    assert found.executed == ["stem", "squeeze", "excite", "deep"]
    assert found.fully_connected == {"squeeze", "excite"}
    assert not found.classifiers


def test_an_image_without_a_batch_has_its_space_last():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(0), nn.Linear(8 * 222, 2))
    assert not trace(model, torch.zeros(3, 224, 3)).fully_connected
    assert trace(model[:1], torch.zeros(3, 3, 3)).fully_connected == {"0"}


def residual_1d(width, stride):
    return nn.Sequential(
        nn.Conv1d(width // stride, width, 7, stride, 3, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(inplace=True),
        nn.Conv1d(width, width, 7, 1, 3, bias=False),
        nn.BatchNorm1d(width),
    )


class ResNet1d(nn.Module):
    """The usual ResNet for electrocardiograms of 12 leads."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(12, 64, 15, 2, 7), nn.BatchNorm1d(64), nn.ReLU(), nn.MaxPool1d(3, 2))
        self.stages = nn.ModuleList(residual_1d(64 * 2**stage, 2 if stage else 1) for stage in range(4))
        self.head = nn.Linear(512, 5)

    def forward(self, x):
        x = self.stem(x)
        for stage, block in enumerate(self.stages):
            x = block(x).relu() if stage else (x + block(x)).relu()
        return self.head(x.mean(2))


def test_a_residual_network_for_signals_is_traced_at_a_size_of_its_own():
    found = trace(ResNet1d())
    assert len(found.executed) == 9
    assert not found.fully_connected


def test_a_network_for_videos_is_traced_at_a_size_of_its_own():
    found = trace(torchvision.models.video.r3d_18())
    assert len(found.executed) == 20
    assert not found.fully_connected


@pytest.mark.parametrize(
    ("name", "arguments", "classifiers"),
    [
        (
            "UNet",
            {"out_channels": 3, "channels": (8, 16, 32, 64), "strides": (2, 2, 2), "num_res_units": 2},
            {"model.2.1.conv.unit0.conv"},
        ),
        ("DenseNet121", {"out_channels": 3}, set()),
    ],
)
def test_networks_of_monai_for_volumes_are_traced_at_a_size_of_their_own(name, arguments, classifiers):
    nets = pytest.importorskip("monai.networks.nets", reason="MONAI is not installed")
    model = getattr(nets, name)(spatial_dims=3, in_channels=1, **arguments)
    found = trace(model)
    assert len(found.executed) == sum(isinstance(module, nn.Conv3d) for module in model.modules())
    assert not found.fully_connected
    assert found.classifiers == classifiers


# example_inputs


class Two(Net):
    """An image, and a number beside it."""

    def forward(self, image, age=None):
        assert image.shape[1:] == (3, 20, 30)
        assert age is None or age.dtype == torch.int64
        return self.head(self.deep(self.stem(image)).mean((2, 3)) + (0 if age is None else age[:, None]))


class OfDict(Two):
    """Both in one argument."""

    def forward(self, batch):
        return super().forward(batch["image"], batch["age"])


@pytest.mark.parametrize(
    ("model", "example_inputs"),
    [
        (Two, (3, 20, 30)),
        (Two, [3, 20, 30]),
        (Two, torch.Size((3, 20, 30))),
        (Two, tuple(np.array([3, 20, 30]))),
        (Two, torch.zeros(2, 3, 20, 30)),
        (Two, torch.zeros(2, 3, 20, 30, device="meta")),
        (Two, torch.zeros(2, 3, 20, 30, dtype=torch.float64)),
        (Two, ((3, 20, 30),)),
        (Two, (torch.zeros(4, 3, 20, 30), torch.zeros(4, dtype=torch.int64))),
        (Two, ((3, 20, 30), None)),
        (Two, {"age": torch.zeros(1, dtype=torch.int64, device="meta"), "image": (3, 20, 30)}),
        (OfDict, {"age": torch.zeros(4, dtype=torch.int64), "image": torch.zeros(4, 3, 20, 30)}),
        (OfDict, ({"age": torch.zeros(1, dtype=torch.int64), "image": (3, 20, 30)},)),
    ],
)
def test_example_inputs_say_what_a_model_is_called_with(model, example_inputs):
    assert trace(model(), example_inputs).executed == ["stem", "deep"]
    assert trace(model().bfloat16(), example_inputs).executed == ["stem", "deep"]


@pytest.mark.parametrize(
    ("example_inputs", "error", "message"),
    [
        (224, TypeError, "example_inputs is 224, but it must be a size such as"),
        ("3x32x32", TypeError, "example_inputs is '3x32x32', but"),
        ((3, 32.0, 32), TypeError, r"example_inputs is \(3, 32.0, 32\), but"),
        ({}, TypeError, "example_inputs is {}, but"),
        ((), TypeError, r"example_inputs is \(\), but"),
        ((3, 0, 32), ValueError, r"example_inputs has the size \(3, 0, 32\), but each of its lengths"),
    ],
)
def test_example_inputs_of_another_kind_are_refused(example_inputs, error, message):
    with pytest.raises(error, match=message):
        kernel_layers(Net(), example_inputs=example_inputs)


def test_inputs_that_do_not_fit_are_told_of():
    with pytest.warns(
        UserWarning, match=r"Net can't be traced with an input of \(5, 32, 32\) \(RuntimeError: .*channels"
    ):
        kernel_layers(Net(), 0, example_inputs=(5, 32, 32))
    with pytest.warns(UserWarning, match="Net can't be traced with the example_inputs"):
        kernel_layers(Net(), 0, example_inputs=torch.zeros(1, 5, 32, 32))


def test_nothing_is_computed():
    model = nn.Sequential(nn.Conv3d(1, 4096, 3), nn.Conv3d(4096, 8, 3))  # its features would take 180 GB
    assert trace(model, (1, 224, 224, 224)).executed == ["0", "1"]


# What is left behind


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


# Models that need more than an ordinary run


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
