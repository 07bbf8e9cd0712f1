"""The order of execution, and what acts as fully connected, at a size that suits the model."""

from __future__ import annotations

import pytest
import torch
import torchvision
from small_nets import trace
from torch import nn

from inmerge_optim.selection import CONVOLUTIONS


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


def test_a_model_is_traced_at_the_size_of_its_own():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 38 * 38, 2))
    model.pretrained_cfg = {"input_size": (3, 40, 40)}
    assert not trace(model).problem


def test_the_convolution_that_sees_the_image_need_not_be_defined_first():
    model = nn.ModuleDict({"deep": nn.Conv2d(8, 8, 3), "stem": nn.Conv2d(3, 8, 3)})
    model.forward = lambda image: model["deep"](model["stem"](image))
    assert trace(model).executed == ["stem", "deep"]


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
