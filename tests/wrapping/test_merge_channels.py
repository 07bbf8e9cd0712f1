"""merge_channels: what else a channel has is blended along with its kernel, so that merged ones are equal channels."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict

import pytest
import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from inmerge_optim import InMergeOptimizer, compact, kernel_layers
from inmerge_optim.drawing import draw_layers
from inmerge_optim.optimizer import _generator

FOLLOWING = ("norm", "spatial", "spatial_norm")
PER_CHANNEL = ("weight", "bias", "running_mean", "running_var")


def network(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    model = nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(3, 8, 3),
            act=nn.ReLU(),
            deep=nn.Conv2d(8, 16, 3),
            norm=norm(16) if norm is not None else nn.Identity(),
            act2=nn.ReLU(),
            spatial=nn.Conv2d(16, 16, 3, padding=1, groups=16),
            spatial_norm=nn.BatchNorm2d(16),
            act3=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(16, 2),
        )
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in filter(lambda held: held is not None, (getattr(module, name) for name in PER_CHANNEL)):
                nn.init.uniform_(values, 0.5, 1.5)
    return model


def wrap(model, **settings):
    settings = {"skip_layers": 1, "merge_prob": 0.5, "similarity_threshold": -0.05, "merge_channels": True} | settings
    return InMergeOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, **settings)


def per_channel(model):
    return {
        "deep.weight": model.deep.weight,
        "deep.bias": model.deep.bias,
        **{f"norm.{name}": getattr(model.norm, name) for name in PER_CHANNEL},
        "spatial.weight": model.spatial.weight,
        "spatial.bias": model.spatial.bias,
        **{f"spatial_norm.{name}": getattr(model.spatial_norm, name) for name in PER_CHANNEL},
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "settings", [{}, {"criterion": "random_pairs"}, {"similarity_threshold": "q0.4"}, {"merge_weight": 0.3}], ids=str
)
def test_all_that_a_channel_has_is_blended_by_the_same_pairs(dtype, layout, settings):
    """Against plain loops: the pairs that the kernels show to be merged are those of all that follows."""
    model = network().to(dtype).to(memory_format=layout)
    optimizer = wrap(model, **settings)
    before = {name: values.detach().clone() for name, values in per_channel(model).items()}
    (pairs,) = draw_layers([(16, 1)], [0.5], _generator(0, "round", 0, "deep"), [optimizer._rule({}).needs_order])
    optimizer.merge()
    alpha, merged = optimizer.merge_weight, 0
    for i, j in zip(pairs.picked.tolist(), pairs.partners.tolist(), strict=True):
        changed = not torch.equal(model.deep.weight[i], before["deep.weight"][i])
        merged += changed
        for name, values in per_channel(model).items():
            old = before[name].double()
            expected = (alpha * old[i] + (1 - alpha) * old[j]).to(dtype) if changed else before[name][i]
            torch.testing.assert_close(values[i].detach(), expected, msg=lambda text, name=name: f"{name}: {text}")
    assert 0 < merged == optimizer.merge_counts()["deep"]["merged"] < len(pairs.picked)
    untouched = sorted(set(range(16)) - set(pairs.picked.tolist()))
    assert all(torch.equal(values[untouched], before[name][untouched]) for name, values in per_channel(model).items())


def test_by_default_nothing_but_kernels_is_merged():
    model = network()
    before = copy.deepcopy(model.state_dict())
    wrap(model, merge_channels=False).merge(5)
    assert [name for name, values in model.state_dict().items() if not torch.equal(values, before[name])] == [
        "deep.weight"
    ]


def test_merged_kernels_become_equal_channels_that_compact_takes_out():
    model = network()
    optimizer = wrap(model, merge_prob=0.9, similarity_threshold=-1, merge_weight=0.5)
    optimizer.merge(200)
    smaller, report = compact(model.eval(), torch.randn(2, 3, 9, 9))
    assert smaller.deep.out_channels == smaller.spatial.out_channels == 1
    assert report.largest_difference < 1e-3 * report.largest_output

    kernels_alone = network()
    wrap(kernels_alone, merge_prob=0.9, similarity_threshold=-1, merge_weight=0.5, merge_channels=False).merge(200)
    assert compact(kernels_alone.eval(), torch.randn(2, 3, 9, 9))[1].removed == []


class Shared(nn.Module):
    """A norm of two layers' channels, one of a layer's own, and a layer scale."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm, self.own, self.last = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 1)
        self.own_norm, self.scale, self.head = nn.BatchNorm2d(4), nn.Parameter(torch.ones(4, 1, 1)), nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x).relu()
        x = self.norm(torch.cat([self.left(x), self.right(x)], 1)).relu()
        x = self.own_norm(self.own(x)).relu()
        return self.head((self.last(x) * self.scale).mean((2, 3)))


def test_layers_are_left_out_whose_channels_something_else_scales():
    layers = kernel_layers(Shared(), 0, merge_channels=True)
    assert {layer.name: layer.per_channel for layer in layers} == {
        "stem": (),
        "left": None,
        "right": None,
        "own": ("own_norm",),
        "last": None,
    }
    assert {layer.name: layer.reason for layer in layers if not layer.selected} == dict.fromkeys(
        ("left", "right", "last"), "channels scaled elsewhere"
    )
    assert [layer.name for layer in kernel_layers(Shared(), 0) if not layer.selected] == []


class Repeated(nn.Module):
    """A depthwise convolution of a sum of two layers, and two that take each other's channels in turn."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.of_both, self.deep = (
            nn.Conv2d(i, 4, 1, groups=g) for i, g in ((3, 1), (3, 1), (4, 4), (4, 1))
        )
        self.one, self.other, self.head = nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(4, 4, 1, groups=4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.deep(self.of_both(self.left(x) + self.right(x)))
        for _ in range(2):
            x = self.other(self.one(x))
        return self.head(x.mean((2, 3)))


def test_layers_are_left_out_whose_channels_a_depthwise_convolution_mixes_with_others():
    layers = kernel_layers(Repeated(), 0)
    assert {layer.name: layer.per_channel for layer in layers} == {
        "left": None,
        "right": None,
        "of_both": (),
        "deep": None,
        "one": None,
        "other": None,
    }


@pytest.mark.parametrize(
    ("name", "layer", "modules"),
    [
        ("resnet18", "layer4.1.conv2", ("layer4.1.bn2",)),
        ("densenet121", "features.denseblock4.denselayer1.conv1", ("features.denseblock4.denselayer1.norm2",)),
        ("densenet121", "features.denseblock4.denselayer1.conv2", None),  # every later norm takes it, with others
        ("efficientnet_lite0", "blocks.6.0.conv_pwl", ("blocks.6.0.bn3",)),
        (
            "efficientnet_lite0",
            "blocks.6.0.conv_pw",
            tuple(f"blocks.6.0.{module}" for module in ("bn1", "conv_dw", "bn2")),
        ),
        ("vgg11_bn", "features.22", ("features.23",)),
        ("vgg11", "features.16", ()),
        ("convnext_atto", "stages.3.downsample.1", None),  # a layer norm and a sum follow
        ("resnetv2_50", "stages.3.blocks.2.conv3", None),  # pre-activation: its norm takes a sum of many
    ],
)
def test_what_acts_on_single_channels_of_known_networks(name, layer, modules):
    assert {layer.name: layer.per_channel for layer in kernel_layers(timm.create_model(name))}[layer] == modules


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_norms_are_known_on_any_device(device):
    """What a batch norm is called in a trace depends on it; without a GPU its tensors are fake ones."""
    with FakeTensorMode(), torch.device(device):
        model = timm.create_model("resnet18")
    layers = kernel_layers(model, merge_channels=True)
    assert {layer.name: layer.per_channel for layer in layers if layer.selected}["layer4.1.conv2"] == ("layer4.1.bn2",)


@pytest.mark.filterwarnings("ignore:only 0 of the 3 counted layers")
@pytest.mark.parametrize("norm", [nn.GroupNorm, nn.InstanceNorm2d, nn.PReLU])
def test_other_norms_leave_a_layer_out(norm):
    made = {"GroupNorm": lambda n: nn.GroupNorm(2, n), "InstanceNorm2d": lambda n: nn.InstanceNorm2d(n, affine=True)}
    model = network(made.get(norm.__name__, norm))
    with pytest.raises(ValueError, match="1 channels scaled elsewhere"):
        wrap(model)
    wrap(model, merge_channels=False)


def test_a_norm_without_affine_parameters_or_statistics_is_blended_as_far_as_it_goes():
    for options in ({"affine": False}, {"track_running_stats": False}):
        model = network(lambda channels, options=options: nn.BatchNorm2d(channels, **options))
        before = copy.deepcopy(model.state_dict())
        wrap(model).merge()
        changed = {name for name, values in model.state_dict().items() if not torch.equal(values, before[name])}
        held = {name for name, values in per_channel(model).items() if values is not None}
        assert changed == held


@pytest.mark.parametrize("module", ["norm", "spatial", "spatial_norm"])
def test_a_layer_is_left_alone_while_what_follows_it_is_frozen(module):
    model = network()
    model.get_submodule(module).requires_grad_(False)
    optimizer = wrap(model)
    before = copy.deepcopy(model.state_dict())
    optimizer.merge()
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    model.get_submodule(module).requires_grad_(True)
    optimizer.merge()
    assert not torch.equal(model.deep.weight, before["deep.weight"])


def test_named_layers_are_looked_at_too():
    model = network()
    assert [layer.name for layer in kernel_layers(model, names=iter(["deep"])) if layer.selected] == ["deep"]
    assert kernel_layers(model, names="deep", merge_channels=True)[0].per_channel == FOLLOWING
    assert kernel_layers(model, names="deep")[0].per_channel is None
    given = [layer for layer in kernel_layers(model, 1) if layer.selected]
    optimizer = wrap(model, names=given)
    assert [layer.name for layer in optimizer.layers if layer.selected] == ["deep"]
    assert optimizer.layers[0].per_channel == FOLLOWING


def test_resumed_training_goes_on_to_the_bit():
    def steps(model, optimizer, numbers):
        for number in numbers:
            generator = torch.Generator().manual_seed(number)
            model(torch.randn(4, 3, 9, 9, generator=generator)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    model = network()
    optimizer = wrap(model)
    steps(model, optimizer, range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    steps(model, optimizer, range(3, 6))
    resumed = network()
    again = wrap(resumed)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    steps(resumed, again, range(3, 6))
    assert all(torch.equal(values, resumed.state_dict()[name]) for name, values in model.state_dict().items())


def test_a_copy_says_before_the_step_that_it_does_not_know_the_norms():
    model = network()
    optimizer = wrap(model)
    assert "merge_channels=True" in repr(optimizer)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.merge_channels
        before = [parameter.detach().clone() for parameter in other.param_groups[0]["params"]]
        for parameter in other.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)
        with pytest.raises(
            RuntimeError, match="which a copied or unpickled optimizer doesn't know: wrap the base anew"
        ):
            other.step()
        assert all(torch.equal(*pair) for pair in zip(before, other.param_groups[0]["params"], strict=True))
    with pytest.raises(AttributeError):
        optimizer.merge_channels = False
