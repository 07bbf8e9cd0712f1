"""Which layers are counted and selected, and what is said of the others."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

from inmerge_optim import kernel_layers
from inmerge_optim.selection import CONVOLUTIONS, layer_modules, obstacle, unwrap

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
    assert len(selected(kernel_layers(model, 0.55, example_inputs=(3, 64, 64)))) == 9  # .55 * 20 is 11.000000000000002


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
        ({"names": "(first"}, r"names is '\(first', but that is no regular expression"),
        ({"exclude": "layer5"}, "exclude is 'layer5', but no layer matches it"),
        ({"exclude": ["frist"]}, "exclude has 'frist', but the model has no such layer; near ones: first"),
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


def test_the_only_layer_is_not_skipped_and_a_model_without_layers_has_none_to_skip():
    with pytest.raises(ValueError, match="skip_layers is 1, but Sequential has 1 counted layers: skip fewer"):
        kernel_layers(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), 1)
    assert kernel_layers(nn.Sequential(nn.Linear(224, 2)), 1) == []


def test_a_linear_layer_of_one_row_has_no_partners():
    model = nn.Sequential(nn.Linear(224, 1), nn.Linear(1, 2))
    layers = kernel_layers(model, names=["0", "1"], layer_types=(nn.Linear,))
    assert reasons(layers) == {"0": "one kernel per group", "1": ""}


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


def test_pre_logits_are_known_by_name_when_vgg_cannot_be_traced():
    model = on_meta(timm.create_model, "vgg19")
    with pytest.warns(UserWarning, match="VGG can't be traced"):
        layers = kernel_layers(model, 10, example_inputs=(5, 32, 32))
    assert selected(layers) == VGG19_LAST_SIX


class Holder(nn.Module):
    """A model whose parts have the names that wrappers use."""

    def __init__(self):
        super().__init__()
        self.module = nn.Conv2d(3, 8, 3)
        self.decoder = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.decoder(self.module(x)).mean((2, 3)))


def test_an_attribute_called_module_is_no_wrapper():
    model = Holder()
    assert unwrap(model) is model
    assert [layer.name for layer in kernel_layers(model, 0)] == ["module", "decoder"]


@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        nn.DataParallel,
        timm.utils.ModelEmaV2,
        timm.utils.ModelEmaV3,
        torch.optim.swa_utils.AveragedModel,
        lambda model: nn.DataParallel(torch.compile(nn.DataParallel(model))),
        lambda model: pytest.importorskip("accelerate.utils").compile_regions(
            nn.Sequential(nn.ModuleList([model, model]))
        ),
    ],
)
def test_wrappers_are_unwrapped_to_the_models_own_names(wrap):
    inner = unwrap(wrap(Holder()))
    assert not hasattr(type(inner), "_orig_mod")
    names = [name for name, _ in inner.named_modules() if name.endswith("decoder")]
    assert names in (["decoder"], ["0.0.decoder"])


def test_distributed_models_are_unwrapped(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = Holder()
        assert unwrap(nn.parallel.DistributedDataParallel(model)) is model
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("model", [Plain().parameters(), None, Plain])
def test_what_is_no_module_is_refused(model):
    with pytest.raises(TypeError, match=f"model is a {type(model).__name__}, but it must be a torch.nn.Module"):
        kernel_layers(model)


def test_an_attribute_that_raises_is_as_good_as_none():
    class Touchy(Plain):
        @property
        def pretrained_cfg(self):
            raise RuntimeError("the configuration is not loaded")

        num_classes = default_cfg = pretrained_cfg

    assert selected(kernel_layers(Touchy(), 1)) == ["second", "third"]


def test_each_layer_is_described():
    model = on_meta(timm.create_model, "resnext50_32x4d")
    layers = kernel_layers(model)
    layer = next(layer for layer in layers if layer.name == "layer4.2.conv2")
    assert (layer.kernels, layer.kernel_size, layer.groups) == (1024, (3, 3), 32)
    assert next(line for line in str(layers).splitlines() if "layer4.2.conv2" in line).split()[-3:] == [
        "1024",
        "3x3",
        "32",
    ]
    with pytest.raises(AttributeError):
        layer.selected = False
    assert isinstance(layer_modules(nn.DataParallel(model), layers)["layer4.2.conv2"], CONVOLUTIONS)
    assert layer_modules(model, [layer]) == {layer.name: model.layer4[2].conv2}


def test_descriptions_hold_no_module():
    model = Plain()
    model.register_forward_hook(lambda *args: None)  # can't be pickled
    layers = kernel_layers(model, 1)
    assert pickle.loads(pickle.dumps(layers)) == layers
    assert len(pickle.dumps(layers)) < 2000


def test_printed_layers_are_a_table():
    convolutions = [nn.Conv1d(3, 16, 7), nn.Conv1d(16, 16, 3, groups=4), nn.Conv1d(16, 16, 1, groups=16)]
    model = nn.Sequential(*convolutions, nn.Linear(16376, 2))
    layers = kernel_layers(model, 1, layer_types=(*CONVOLUTIONS, nn.Linear))
    assert str(layers) == repr(layers)
    assert str(layers).splitlines() == [
        "depth  layer  kernels  kernel size  groups  remark",
        "    0  0           16            7       1  shallow",
        "    1  1           16            3       4",
        "    2  2           16            1      16  one kernel per group",
        "    -  3            2            -       1  classifier",
        "4 layers, 3 counted, 1 selected.",
    ]
    assert str(kernel_layers(nn.Sequential(nn.Linear(224, 2)))).splitlines()[-1] == "0 layers, 0 counted, 0 selected."


class Attentive(nn.Module):
    """Three convolutions whose names say more than the tracer sees."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.qkv = nn.Conv2d(8, 24, 1)
        self.lora_A = nn.ModuleDict({"default": nn.Conv2d(24, 4, 3)})
        self.lora_B = nn.ModuleDict({"default": nn.Conv2d(4, 8, 1)})
        self.deep = nn.Conv2d(24, 8, 3)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.qkv(self.stem(x))
        return self.head((self.deep(x) + self.lora_B["default"](self.lora_A["default"](x))).mean((2, 3)))


def test_attention_and_adapters_are_left_out_unless_they_are_named():
    layers = {layer.name: layer for layer in kernel_layers(Attentive(), 0)}
    adapters = ["lora_A.default", "lora_B.default"]
    assert layers["qkv"].reason == "attention"
    assert [layers[name].reason for name in adapters] == ["adapter"] * 2
    assert [layers[name].depth for name in ("stem", "qkv", "deep", *adapters)] == [0, 1, 2, None, None]
    assert selected(layers.values()) == ["stem", "deep"]
    assert selected(kernel_layers(Attentive(), names=["qkv", *adapters])) == ["qkv", *adapters]
    assert selected(kernel_layers(Attentive(), names="qkv|lora_B")) == ["qkv", "lora_B.default"]


def test_adapters_of_peft_are_left_out():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = on_meta(timm.create_model, "resnet18")
    depths = {layer.name: layer.depth for layer in kernel_layers(model)}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["conv1", "conv2"]))
    layers = {layer.name: layer for layer in kernel_layers(adapted)}
    adapters = [layer for name, layer in layers.items() if ".lora_" in name]
    assert len(adapters) == 2 * 17
    assert {(layer.reason, layer.depth) for layer in adapters} == {("adapter", None)}
    of_base = {name: layer.depth for name, layer in layers.items() if ".lora_" not in name}
    assert {
        name.removeprefix("base_model.model.").removesuffix(".base_layer"): depth for name, depth in of_base.items()
    } == depths


def test_excluded_layers_are_counted_and_left_out():
    expected = {"first": "shallow", "second": "excluded", "third": "", "auxiliary": "not executed"}
    for exclude in ("sec.nd", ["second"]):
        layers = kernel_layers(Plain(), 1, exclude=exclude)
        assert reasons(layers) == expected
        assert [layer.depth for layer in layers] == [0, 1, 2, None]
    assert set(reasons(kernel_layers(Plain(), 1, exclude="st|aux")).values()) == {"excluded", ""}


def test_of_the_named_layers_the_excluded_are_left_out():
    layers = kernel_layers(Plain(), names="^(first|second)$", exclude=["second", "third"])
    assert reasons(layers) == {"first": "", "second": "excluded", "third": "excluded", "auxiliary": "not named"}


def test_numbers_of_numpy_are_numbers():
    for skip in (np.int64(1), np.uint8(1)):
        assert selected(kernel_layers(Plain(), skip)) == ["second", "third"]
    assert selected(kernel_layers(Plain(), np.float32(0.5))) == ["third"]


def chain(length, skipped):
    """The warnings about a network of so many layers, of which the first ones are skipped."""
    model = nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(length)], nn.BatchNorm2d(3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kernel_layers(model, skipped)
    return [str(warning.message) for warning in caught]


def test_a_warning_is_given_below_a_tenth_and_not_at_it():
    assert chain(10, 9) == []
    assert chain(20, 18) == []
    (message,) = chain(11, 10)
    assert message.startswith("only 1 of the 11 counted layers of Sequential are selected")


def test_obstacles_are_what_a_weight_is_now():
    model = Plain()
    assert obstacle(model.second) == ""
    prune.l1_unstructured(model.second, "weight", 0.5)
    assert obstacle(model.second) == "parametrized"
    prune.remove(model.second, "weight")
    assert obstacle(model.second) == ""
    parametrizations.spectral_norm(model.second)
    assert obstacle(model.second) == "parametrized"
    model.third.weight = nn.Parameter(torch.zeros(8, 8, 3, 3, dtype=torch.complex64))
    assert obstacle(model.third) == "complex64 weight"
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert obstacle(nn.Conv2d(2, 2, 1, dtype=dtype)) == ""


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.int8, torch.uint8])
@pytest.mark.parametrize("settings", [{"skip_layers": 0}, {"names": "second|third"}])
def test_numbers_that_cannot_be_averaged_are_refused_by_name(dtype, settings):
    model = Plain()
    model.third.weight = nn.Parameter(torch.zeros(8, 8, 3, 3).to(dtype), requires_grad=False)
    name = str(dtype).removeprefix("torch.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of them can't be run
        with pytest.raises(TypeError, match=f"^third has a {name} weight, but .* by exclude$"):
            kernel_layers(model, **settings)
        assert "third" not in selected(kernel_layers(model, **settings, exclude=["third"]))


def test_weights_quantised_by_torchao_are_refused_by_name():
    class Int8Tensor(torch.Tensor):
        __module__ = "torchao.dtypes.affine_quantized_tensor"

    model = Plain()
    model.third.weight = nn.Parameter(torch.zeros(8, 8, 3, 3).as_subclass(Int8Tensor))
    with pytest.raises(TypeError, match=r"^third has a Int8Tensor weight"):
        kernel_layers(model, 1)


def test_a_model_of_quantised_modules_is_refused_by_name():
    quantized = pytest.importorskip("torch.ao.nn.quantized", reason="this torch has no quantised modules")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still in use
        model = nn.Sequential(quantized.Conv2d(3, 8, 3))
    with pytest.raises(TypeError, match=r"^0 is a quantised Conv2d, which has no kernels to merge"):
        kernel_layers(model)


def test_lazy_models_are_refused_by_name():
    with pytest.raises(ValueError, match=r"^2\.weight is lazy and has no shape yet: run a batch"):
        kernel_layers(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.LazyLinear(2)))
