"""The pointing game on models and boxes whose geometry is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from finetune.data.images import BoxedFinding, ImageData, Split
from finetune.data.tasks import Task
from finetune.files import write_weights
from finetune.options import Options
from finetune.reports.localisation import (
    Target,
    feature_map_layer,
    grad_cam,
    hit,
    in_boxes,
    localisation_section,
    maximum,
    targets,
)
from finetune.runs.finished import FinishedRun
from PIL import Image
from small_runs import make_run
from torch import nn

SIDE, SIZE, CELL = 40, 32, 4  # prepared, seen (4 px are cut off all round), and a cell of the models' maps
ARMS, SEEDS = ("baseline", "inmerge"), (0, 1)


class BlockMeans(nn.Module):
    """Its map of label k is the mean of each block times weight k, plus bias k; its logits are the maps' means."""

    pretrained_cfg = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, CELL, stride=CELL)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(images).mean(dim=(2, 3))

    def looks_for(self, weights: list[float], bias: list[float]) -> BlockMeans:
        self.conv.weight.data = torch.tensor(weights)[:, None, None, None].expand(2, 1, CELL, CELL) / CELL**2
        self.conv.bias.data = torch.tensor(bias)
        return self


@pytest.fixture
def data() -> ImageData:
    """Grey images, each with a bright block at 12, 20 of what is seen and a dark one at 24, 4."""
    images = np.full((3, 1, SIDE, SIDE), 128, dtype=np.uint8)
    images[:, :, 24:28, 16:20] = 255
    images[:, :, 8:12, 28:32] = 0
    split = Split(images, np.array([[1, 0], [1, 1], [0, 1]]), ["a", "b", "c"])
    return ImageData("made", Task("multi-label", ("Mass", "Nodule")), split, split, split, image_size=SIZE)


def box(left: float, top: float, side: float = CELL) -> list[float]:
    """A box from its corner in what is seen, as shares of the whole image."""
    corner = np.array([left, top]) + (SIDE - SIZE) / 2
    return [*(corner / SIDE), *((corner + side) / SIDE)]


BRIGHT, DARK, ELSEWHERE = box(12, 20), box(24, 4), box(4, 4)


def test_grad_cam_of_a_linear_head_is_the_map_of_its_label(data: ImageData) -> None:
    model = BlockMeans().looks_for([1.0, -1.0], [0.0, 1.0])
    inputs = torch.from_numpy(data.test.images[:2, :, 4:36, 4:36]).float() / 255
    layer = feature_map_layer(model, inputs)
    assert layer is model.conv
    found = grad_cam(model, layer, inputs, torch.tensor([0, 1]))
    means = F.avg_pool2d(inputs, CELL)[:, 0].numpy()
    np.testing.assert_allclose(found[0], means[0] / 64, rtol=1e-5)
    np.testing.assert_allclose(found[1], (1 - means[1]) / 64, rtol=1e-5, atol=1e-7)
    assert maximum(found[0], SIZE) == (14, 22)
    assert maximum(found[1], SIZE) == (26, 6)


def test_the_maximum_is_that_of_the_upsampled_map() -> None:
    """With seven pixels a cell its centre is a pixel's centre; at the border the first of those that tie is not it."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        cam = rng.random((3, 5)).astype(np.float32)
        upsampled = F.interpolate(torch.from_numpy(cam)[None, None], (35, 35), mode="bilinear")[0, 0].numpy()
        x, y = maximum(cam, 35)
        assert upsampled[int(y), int(x)] == pytest.approx(upsampled.max(), abs=1e-6)
        assert (x / 35 * 5) % 1 == pytest.approx(0.5)


def test_a_map_that_is_positive_nowhere_points_nowhere() -> None:
    everywhere = Target(row=0, label=0, boxes=np.array([[0, 0, SIZE, SIZE]]), share=1.0)
    assert hit(np.eye(8), everywhere, SIZE)
    assert not hit(np.zeros((8, 8)), everywhere, SIZE)


def test_boxes_are_cut_at_the_border_of_what_is_seen(data: ImageData) -> None:
    findings = [
        BoxedFinding("b", 1, np.array([BRIGHT])),
        BoxedFinding("a", 0, np.array([[0.0, 0.0, 8 / SIDE, 12 / SIDE]])),  # 4 by 8 pixels of it are seen
        BoxedFinding("a", 1, np.array([[0.0, 0.0, 4 / SIDE, 1.0]])),  # all of it is cut off
        BoxedFinding("not in test", 0, np.array([BRIGHT])),
        BoxedFinding("c", 1, np.array([BRIGHT, DARK, DARK])),
    ]
    found = targets(data, findings)
    assert [(target.row, target.label) for target in found] == [(0, 0), (1, 1), (2, 1)]
    assert found[0].boxes.tolist() == [[0, 0, 4, 8]]
    assert [target.share * SIZE**2 for target in found] == [32, 16, 32]
    points = np.array([3.9, 4.0]), np.array([7.9, 7.9])
    assert in_boxes(found[0].boxes, *points).tolist() == [True, False]


def test_hit_rates_per_label_and_arm(data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The baseline's first seed looks for what is bright, its second for what is dark; inmerge sees nothing."""
    models = {
        ("baseline", 0): BlockMeans().looks_for([1.0, 1.0], [0.0, 0.0]),
        ("baseline", 1): BlockMeans().looks_for([-1.0, -1.0], [1.0, 1.0]),
        **{("inmerge", seed): BlockMeans().looks_for([-1.0, -1.0], [0.0, 0.0]) for seed in SEEDS},
    }
    make_run(tmp_path, data, {arm: [np.full((3, 2), 0.25) for _ in SEEDS] for arm in ARMS}, SEEDS)
    for (arm, seed), model in models.items():
        write_weights(tmp_path / f"seed_{seed}/{arm}/model.safetensors", model.state_dict())
    monkeypatch.setattr("finetune.training.models.create_model", lambda *_, **__: BlockMeans())
    findings = [
        BoxedFinding("a", 0, np.array([BRIGHT])),
        BoxedFinding("b", 0, np.array([ELSEWHERE, BRIGHT])),
        BoxedFinding("b", 1, np.array([ELSEWHERE])),
        BoxedFinding("c", 1, np.array([DARK])),
    ]
    section = localisation_section(FinishedRun(tmp_path), Options(in_chans=1), data, findings)
    assert section.header == ["label", "images", "chance", "baseline", "inmerge"]
    assert section.rows == [
        ["Mass", "2", "0.023", "0.500 ± 0.707", "0.000 ± 0.000"],
        ["Nodule", "2", "0.016", "0.250 ± 0.354", "0.000 ± 0.000"],
        ["all", "4", "0.020", "0.375 ± 0.177", "0.000 ± 0.000"],
    ]
    assert "Of 4 findings with boxes, 4 are of images in this test set." in section.text
    assert "positive nowhere count as misses: 8 of 16." in section.text
    assert [path for path, _ in section.figures] == ["plots/grad_cam_Mass.png", "plots/grad_cam_Nodule.png"]
    for path, words in section.figures:
        assert "baseline and inmerge" in words
        with Image.open(tmp_path / path) as picture:
            assert picture.width > 2 * picture.height  # three panels in a row
    assert not list(tmp_path.rglob("*.partial"))


def test_no_box_in_the_test_set_is_said(data: ImageData, tmp_path: Path) -> None:
    run = FinishedRun(make_run(tmp_path, data, {"baseline": [np.full((3, 2), 0.25)]}, seeds=[0]))
    section = localisation_section(run, Options(), data, [BoxedFinding("elsewhere", 0, np.array([BRIGHT]))])
    assert section.text.endswith("So there is nothing to score.")
    assert not section.rows


@pytest.mark.parametrize(
    ("name", "layer", "cells", "smaller"),
    [
        # After the last convolution, ahead of the pooling that ends its features.
        ("vgg19", "features.35", 4, {"mlp_ratio": 0.01}),
        ("vgg16", "features.29", 4, {"mlp_ratio": 0.01}),
        ("resnet34", "layer4", 2, {}),
        ("efficientnet_lite0", "bn2", 2, {}),
        ("densenet121", "features", 2, {}),
        ("mobilenetv3_small_100", "blocks", 2, {}),  # its head's convolution comes after the pooling to 1 x 1
    ],
)
def test_the_last_feature_map_of_timms_families(name: str, layer: str, cells: int, smaller: dict[str, float]) -> None:
    model = timm.create_model(name, num_classes=14, **smaller).eval()
    inputs = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = feature_map_layer(model, inputs)
    assert [key for key, module in model.named_modules() if module is found] == [layer]
    assert grad_cam(model, found, inputs, torch.tensor([3, 11])).shape == (2, cells, cells)
