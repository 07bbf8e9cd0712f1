"""Which layers are a model's outputs, whatever it returns them in."""

from __future__ import annotations

import types
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
import torchvision
from small_nets import Net, trace
from torch import nn
from torch.nn.utils import prune


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


def test_a_model_that_says_it_has_no_classes_has_no_classifier():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    assert trace(model).classifiers == {"1"}
    model.num_classes = 0
    assert not trace(model).classifiers


def test_a_side_output_of_one_class_is_known_beside_scores_without_a_dimension_of_channels():
    model = nn.ModuleDict({"side": nn.Conv2d(3, 1, 3), "deep": nn.Conv2d(1, 8, 3), "head": nn.Conv2d(8, 1, 1)})

    def forward(image):
        side = model["side"](image)
        return model["head"](model["deep"](side)).mean((2, 3)).flatten(), side

    model.forward = forward
    assert trace(model).classifiers == {"side", "head"}
