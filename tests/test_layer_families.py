"""The choice of layers in a model of each family, where a choice by class or by order of definition would be wrong."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
import timm
import torch
import torchvision
from torch import nn

from inmerge_optim import InMergeOptimizer, kernel_layers, similarity_profile
from inmerge_optim.selection import CONVOLUTIONS

FULLY_CONNECTED = "acts as fully connected"
SINGLE = "one kernel per group"


def layers_of(build, **settings):
    """The layers of a model without weights by name, and the warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                model = build()
        except RuntimeError:  # older versions of timm read stochastic depths from tensors
            model = build()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layers = kernel_layers(model, **settings)
    return {layer.name: layer for layer in layers}, [str(warning.message) for warning in caught]


def of_timm(name, **settings):
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    layers, caught = layers_of(lambda: timm.create_model(name), **settings)
    assert not any("can't be traced" in message for message in caught)
    return layers


def of_torchvision(place, name):
    module = getattr(torchvision.models, place)
    return layers_of(lambda: getattr(module, name)(weights=None, weights_backbone=None))


@pytest.mark.parametrize(
    ("model", "counted", "expected"),
    [
        # grouped, and weight-standardised subclasses of Conv2d
        ("resnext50_32x4d", 53, {"layer4.2.conv2": ""}),
        ("nf_resnet26", 29, {"stages.3.1.conv3": ""}),
        # depthwise layers are counted, and never merged
        ("tf_efficientnet_b0", 49, {"blocks.6.0.conv_dw": SINGLE, "blocks.6.0.se.conv_expand": FULLY_CONNECTED}),
        ("mixnet_s", 97, {"blocks.5.2.conv_pwl.1": "", "blocks.5.2.conv_dw.3": SINGLE}),
        # gates
        ("eca_resnet33ts", 38, {"stages.3.1.conv3_1x1.conv": "", "stages.3.1.attn.conv": SINGLE}),
        ("gcresnet33ts", 38, {"stages.3.1.attn.conv_attn": SINGLE, "stages.3.1.attn.mlp_add.fc2": FULLY_CONNECTED}),
        ("skresnet18", 28, {"layer4.1.conv1.attn.fc_select": FULLY_CONNECTED, "layer4.1.conv1.paths.1.conv": ""}),
        # branches that are one convolution in the end
        ("repvgg_a0", 44, {"stages.3.0.conv_kxk.conv": "", "stages.3.0.conv_1x1.conv": ""}),
        ("mobileone_s0", 191, {"stages.3.1.conv_kxk.3.conv": "", "stages.3.0.conv_kxk.3.conv": SINGLE}),
        ("repvit_m0_9", 106, {"stages.3.blocks.1.channel_mixer.conv2.c": ""}),
        # several resolutions or branches at once
        ("hrnet_w18_small", 91, {"final_layer.0": "", "stage4.0.branches.3.1.conv2": "shallow"}),
        ("inception_v3", 94, {"Mixed_7c.branch_pool.conv": ""}),
        ("densenet121", 120, {"features.denseblock4.denselayer16.conv2": ""}),
        ("dla34", 37, {"level5.root.conv": "", "fc": FULLY_CONNECTED}),
        # a BlurPool has no kernels that are learnt
        ("resnetblur18", 20, {"layer4.1.conv2": ""}),
        # what attention takes apart
        ("botnet26t_256", 31, {"stages.3.1.self_attn.qkv": "attention", "stages.3.1.conv3_1x1.conv": ""}),
        ("halonet26t", 34, {"stages.3.1.self_attn.kv": "attention", "stages.3.1.self_attn.q": ""}),
        ("coatnet_nano_cc_224", 60, {"stages.3.blocks.2.attn.qkv": "attention", "stages.3.blocks.2.mlp.fc1": ""}),
        ("mobilevitv2_050", 64, {"stages.4.1.transformer.2.attn.qkv_proj": "attention"}),
        ("levit_conv_128s", 50, {"stages.2.blocks.3.attn.qkv.linear": "attention"}),
        ("efficientvit_m0", 112, {"stages.2.blocks.2.mixer.m.attn.qkvs.3.conv": "attention"}),
        ("lowformer_b0", 56, {"stages.3.4.attn.main.1.pwise": "attention", "in_conv.conv": ""}),
        ("iformer_t", 74, {"stages.3.blocks.4.mixer.module.v_gate.c": "attention"}),
        ("efficientvim_m1", 62, {"stages.2.blocks.1.mixer.BCdt_proj.conv": "attention"}),
        ("focalnet_tiny_srf", 88, {"layers.3.blocks.1.modulation.f": "attention", "layers.3.blocks.1.mlp.fc1": ""}),
        # expert convolutions hold the rows of several kernels in one, and are no Conv2d
        ("efficientnet_cc_b0_4e", 25, {"conv_head": ""}),
    ],
)
def test_the_choice_in_each_family_of_timm(model, counted, expected):
    layers = of_timm(model)
    assert {name: layers[name].reason for name in expected} == expected
    assert all(layer.selected == (not layer.reason) for layer in layers.values())
    assert sum(layer.depth is not None for layer in layers.values()) == counted
    # A gate or a layer that acts as fully connected does not shift the depth of the others.
    assert all(
        layer.depth is None for layer in layers.values() if layer.reason == FULLY_CONNECTED or layer.kernels == 1
    )


def test_gates_of_either_kind_leave_the_count_alone():
    counts = [
        sum(layer.depth is not None for layer in of_timm(name).values()) for name in ("eca_resnet33ts", "seresnet33ts")
    ]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"])
def test_the_outputs_of_segmentation_models_are_left_out(name):
    layers, caught = of_torchvision("segmentation", name)
    assert not caught
    classes = {layer.name: layer.reason for layer in layers.values() if layer.kernels == 21}
    assert classes
    assert set(classes.values()) == {"classifier"}
    assert Counter(layer.reason for layer in layers.values())["classifier"] == len(classes)


def test_an_auxiliary_output_is_left_out():
    layers, _ = layers_of(
        lambda: torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, aux_loss=True)
    )
    assert layers["classifier.4"].reason == layers["aux_classifier.4"].reason == "classifier"
    assert layers["classifier.0"].selected
    assert layers["aux_classifier.0"].selected


def test_a_layer_as_wide_as_the_classes_is_no_classifier():
    layers, _ = layers_of(lambda: torchvision.models.squeezenet1_1(num_classes=256))
    assert [layer.name for layer in layers.values() if layer.reason == "classifier"] == ["classifier.1"]
    assert layers["features.12.expand3x3"].kernels == 256
    assert layers["features.12.expand3x3"].selected


@pytest.mark.parametrize(
    ("name", "predictors", "kept"),
    [
        ("fasterrcnn_mobilenet_v3_large_320_fpn", ["rpn.head.cls_logits", "rpn.head.bbox_pred"], "rpn.head.conv.0.0"),
        ("maskrcnn_resnet50_fpn", ["roi_heads.mask_predictor.mask_fcn_logits"], "roi_heads.mask_head.3.0"),
        ("retinanet_resnet50_fpn", ["head.classification_head.cls_logits"], "head.regression_head.conv.3.0"),
        ("ssdlite320_mobilenet_v3_large", ["head.regression_head.module_list.0.1"], "backbone.extra.3.0.0"),
    ],
)
def test_the_outputs_of_detectors_are_left_out(name, predictors, kept):
    layers, caught = of_torchvision("detection", name)
    assert len(caught) == 1
    assert "can't be traced" in caught[0]
    assert {layers[predictor].reason for predictor in predictors} == {"classifier"}
    assert layers[kept].selected
    # What ran before boxes had to be chosen is known in its order, squeeze-excite among it.
    gates = [layer for layer in layers.values() if layer.name.endswith(".fc2")]
    assert bool(gates) == ("mobilenet" in name)
    assert {layer.reason for layer in gates} <= {FULLY_CONNECTED}


def test_three_dimensional_convolutions_are_kernels_too():
    layers, _ = layers_of(lambda: torchvision.models.video.r3d_18())
    assert sum(layer.depth is not None for layer in layers.values()) == 20
    assert layers["layer4.1.conv2.0"].kernel_size == (3, 3, 3)


@pytest.mark.parametrize(
    ("model", "first", "qkv"),
    [
        ("vit_tiny_patch16_224", "blocks.11.mlp.fc1", "blocks.11.attn.qkv"),
        ("swin_tiny_patch4_window7_224", "layers.3.blocks.1.mlp.fc1", "layers.3.blocks.1.attn.qkv"),
        ("convnext_tiny", "stages.3.blocks.2.mlp.fc1", None),
        ("mixer_s16_224", "blocks.7.mlp_channels.fc1", None),
        ("levit_128s", "stages.2.blocks.3.mlp.ln1.linear", "stages.2.blocks.3.attn.qkv.linear"),
        ("vit_pwee_patch16_reg1_gap_256", "blocks.15.mlp_out_proj", "blocks.15.in_proj"),
    ],
)
def test_rows_of_linear_layers_can_be_merged(model, first, qkv):
    layers = of_timm(model, layer_types=(nn.Linear,))
    assert layers[first].selected
    assert qkv is None or layers[qkv].reason == "attention"
    assert {layer.reason for layer in layers.values() if layer.kernels == 1000} == {"classifier"}


@pytest.mark.parametrize("model", ["test_vit", "test_mambaout", "test_convnext"])
def test_the_first_layers_of_mlps_are_merged_by_name(model):
    model = timm.create_model(model)
    names = [name for name, _ in model.named_modules() if name.endswith("fc1")][-2:]
    types = (*CONVOLUTIONS, nn.Linear)
    settings = {"names": names, "layer_types": types, "merge_prob": 1.0, "similarity_threshold": 0.0}
    optimizer = InMergeOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, **settings)
    expected = {profile.name: profile.expected_merges for profile in similarity_profile(model, **settings)}
    for name in names:
        model.get_submodule(name).weight.grad = torch.zeros_like(model.get_submodule(name).weight)
    before = {name: model.get_submodule(name).weight.detach().clone() for name in names}
    optimizer.step()
    for name, counts in optimizer.merge_counts().items():
        assert counts["drawn"] == len(before[name])
        assert counts["merged"] == pytest.approx(expected[name], abs=4.5 * expected[name] ** 0.5)
        changed = (model.get_submodule(name).weight != before[name]).any(1)
        assert changed.sum() == counts["merged"] > 0
