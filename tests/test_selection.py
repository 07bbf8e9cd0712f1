"""Which layers are counted and selected, and that looking leaves the model as it was."""

from __future__ import annotations

import copy
import warnings

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

from inmerge_optim import kernel_layers
from inmerge_optim.layers import CONVOLUTIONS

VGG19_LAST_SIX = [f"features.{place}" for place in (23, 25, 28, 30, 32, 34)]


def on_meta(build, *args, **kwargs):
    """Build a model without the time and memory of its weights."""
    try:
        with torch.device("meta"):
            return build(*args, **kwargs)
    except RuntimeError:  # older versions of timm read stochastic depths from tensors
        return build(*args, **kwargs)


def selected(layers):
    return [layer.name for layer in layers if layer.selected]


def counted(layers):
    return sum(layer.depth is not None for layer in layers)


def reasons(layers):
    return {layer.name: layer.reason for layer in layers}


class Plain(nn.Module):
    """Three convolutions defined in another order than they are executed in."""

    def __init__(self):
        super().__init__()
        self.third = nn.Conv2d(8, 8, 3)
        self.first = nn.Conv2d(3, 8, 3)
        self.second = nn.Conv2d(8, 8, 3)
        self.auxiliary = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.third(self.second(self.first(x)))
        if self.training:
            x = x + self.auxiliary(x).mean()
        return self.head(x.mean((2, 3)))


def test_vgg19_of_timm_counts_16_and_skip_10_leaves_its_last_six():
    layers = kernel_layers(on_meta(timm.create_model, "vgg19"), 10)
    assert counted(layers) == 16
    assert selected(layers) == VGG19_LAST_SIX
    assert reasons(layers)["pre_logits.fc1"] == reasons(layers)["pre_logits.fc2"] == "acts as fully connected"


def test_vgg19_of_torchvision_selects_the_same_six():
    layers = kernel_layers(on_meta(torchvision.models.vgg19), 10)
    assert counted(layers) == 16
    assert selected(layers) == VGG19_LAST_SIX


@pytest.mark.parametrize(("name", "convolutions"), [("vgg16", 13), ("resnet34", 36)])
def test_counted_convolutions(name, convolutions):
    assert counted(kernel_layers(on_meta(timm.create_model, name))) == convolutions


@pytest.mark.parametrize(("skip", "left"), [(0, 16), (10, 6), (0.6, 6), (0.5, 8), (0.0, 16), (0.55, 7), (15, 1)])
def test_skip_layers_counts_or_is_a_fraction_rounded_up(skip, left):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(selected(kernel_layers(on_meta(timm.create_model, "vgg19"), skip))) == left


def test_a_fraction_that_is_a_little_more_in_floating_point_is_not_rounded_up():
    model = nn.Sequential(*[nn.Conv2d(3, 3, 3) for _ in range(20)], nn.BatchNorm2d(3))
    assert len(selected(kernel_layers(model, 0.55, input_size=(3, 64, 64)))) == 9  # .55 * 20 is 11.000000000000002


def test_depth_is_the_order_of_execution():
    layers = kernel_layers(Plain(), 1)
    assert [layer.name for layer in layers] == ["first", "second", "third", "auxiliary"]
    assert [layer.depth for layer in layers] == [0, 1, 2, None]
    assert [layer.index for layer in layers] == [0, 1, 2, 3]
    assert reasons(layers) == {"first": "shallow", "second": "", "third": "", "auxiliary": "not executed"}


def test_the_models_own_size_is_traced_whatever_it_is_trained_at():
    layers = kernel_layers(on_meta(timm.create_model, "resnet18", in_chans=1, num_classes=2))
    assert counted(layers) == 20
    assert "acts as fully connected" not in reasons(layers).values()


@pytest.mark.parametrize(
    ("build", "name", "reason"),
    [
        (lambda: timm.create_model("efficientnet_lite0"), "blocks.6.0.conv_dw", "one kernel per group"),
        (lambda: timm.create_model("seresnet50"), "layer4.0.se.fc1", "acts as fully connected"),
        (lambda: timm.create_model("mobilenetv3_large_100"), "conv_head", "acts as fully connected"),
        (lambda: torchvision.models.squeezenet1_1(), "classifier.1", "classifier"),
        (lambda: torchvision.models.googlenet(init_weights=False), "aux1.conv.conv", "not executed"),
        (lambda: timm.create_model("botnet26t_256"), "stages.3.1.self_attn.qkv", "attention"),
        (lambda: timm.create_model("coatnet_0_rw_224"), "stages.3.blocks.0.attn.qkv", "attention"),
    ],
)
def test_layers_are_left_out_for_a_stated_reason(build, name, reason):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = next(layer for layer in kernel_layers(on_meta(build)) if layer.name == name)
    assert not layer.selected
    assert layer.reason == reason


def test_a_backbone_without_a_head_has_no_classifier():
    assert "classifier" not in reasons(kernel_layers(on_meta(timm.create_model, "resnet18", num_classes=0))).values()


def test_parametrized_and_tied_weights_are_left_out():
    model = Plain()
    parametrizations.weight_norm(model.second)
    assert reasons(kernel_layers(model, 1))["second"] == "parametrized"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        weight_norm(model.third)
    model(torch.zeros(1, 3, 16, 16))
    with pytest.warns(UserWarning, match="only 0 of the 3"):
        assert reasons(kernel_layers(model, 1))["third"] == "parametrized"
    model = Plain()
    model.third.weight = model.second.weight
    assert reasons(kernel_layers(model, 1)) == {
        "first": "shallow",
        "second": "",
        "third": "tied to second",
        "auxiliary": "not executed",
    }


def test_names_pick_layers_outright():
    model = Plain()
    assert selected(kernel_layers(model, names="^(first|auxiliary)$")) == ["first", "auxiliary"]
    layers = kernel_layers(model, names=["third", "first"])
    assert [layer.name for layer in layers] == ["third", "first", "second", "auxiliary"]
    assert selected(layers) == ["third", "first"]
    assert reasons(layers)["second"] == "not named"
    assert {layer.depth for layer in layers} == {None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": "layer5"}, "names is 'layer5', but no layer matches it"),
        ({"names": ["secnd"]}, "names has 'secnd', but the model has no such layer; near ones: second"),
        ({"skip_layers": 3}, "skip_layers is 3, but Plain has 3 counted layers"),
        ({"skip_layers": -1}, "skip_layers is -1"),
        ({"skip_layers": 1.0}, "skip_layers is 1.0"),
        ({"skip_layers": True}, "skip_layers is True"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        kernel_layers(Plain(), **arguments)


def test_transposed_convolutions_are_refused():
    with pytest.raises(TypeError, match="ConvTranspose2d"):
        kernel_layers(Plain(), layer_types=(nn.ConvTranspose2d,))


def test_one_warning_when_next_to_nothing_is_selected():
    with pytest.warns(UserWarning, match="only 0 of the 1 counted layers of VisionTransformer") as caught:
        kernel_layers(on_meta(timm.create_model, "vit_tiny_patch16_224"))
    assert len(caught) == 1


def test_linear_layers_can_be_asked_for():
    layers = kernel_layers(on_meta(timm.create_model, "vit_tiny_patch16_224"), layer_types=(nn.Linear,))
    by_name = {layer.name: layer for layer in layers}
    assert by_name["blocks.11.mlp.fc1"].selected
    assert by_name["blocks.11.mlp.fc1"].kernels == 768
    assert by_name["blocks.11.mlp.fc1"].kernel_size == ()
    assert by_name["blocks.11.attn.qkv"].reason == "attention"
    assert by_name["head"].reason == "classifier"


def test_a_model_that_cannot_be_traced_falls_back_to_definition_order_with_one_warning():
    class Stubborn(Plain):
        def forward(self, x):
            return super().forward(x) if x.sum().item() > 0 else x

    with pytest.warns(UserWarning, match="Stubborn can't be run on the meta device") as caught:
        layers = kernel_layers(Stubborn(), 1)
    assert len(caught) == 1
    assert [layer.name for layer in layers] == ["third", "first", "second", "auxiliary"]


def test_pre_logits_are_known_by_name_when_vgg_cannot_be_traced():
    model = on_meta(timm.create_model, "vgg19")
    with pytest.warns(UserWarning, match="can't be run"):
        layers = kernel_layers(model, 10, input_size=(5, 32, 32))
    assert selected(layers) == VGG19_LAST_SIX


def test_wrapped_models_are_unwrapped_to_their_own_names():
    model = Plain()
    assert selected(kernel_layers(torch.compile(model), 1)) == ["second", "third"]
    assert selected(kernel_layers(nn.DataParallel(model), 1)) == ["second", "third"]
    assert selected(kernel_layers(timm.utils.ModelEmaV3(model), 1)) == ["second", "third"]


def test_looking_leaves_the_model_as_it_was():
    model = timm.create_model("levit_128s", num_classes=3).train()  # it caches attention biases when in eval mode
    model.stages[0].eval()
    seen = []
    hook = model.stem.register_forward_hook(lambda *args: seen.append(args))
    before = {name: tensor.clone() for name, tensor in model.state_dict(keep_vars=True).items()}
    attributes = {name: copy.copy(vars(module)) for name, module in model.named_modules()}
    caches = [module.attention_bias_cache for module in model.modules() if hasattr(module, "attention_bias_cache")]
    random_state = torch.get_rng_state()

    kernel_layers(model)

    assert torch.equal(torch.get_rng_state(), random_state)
    assert not seen
    assert caches
    assert not any(caches)
    assert list(model.stem._forward_hooks) == [hook.id]
    assert all(vars(module) == attributes[name] for name, module in model.named_modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_each_layer_is_described():
    layers = kernel_layers(on_meta(timm.create_model, "resnext50_32x4d"))
    layer = next(layer for layer in layers if layer.name == "layer4.2.conv2")
    assert (layer.kernels, layer.kernel_size, layer.groups) == (1024, (3, 3), 32)
    assert isinstance(layer.module, CONVOLUTIONS)
    with pytest.raises(AttributeError):
        layer.selected = False
