"""Random and middle crops of a batch."""

from __future__ import annotations

import pytest
import torch
from finetune.training.batches import crop, crop_corners


@pytest.mark.parametrize("channels", [1, 3])
def test_each_image_is_cropped_at_its_corner(channels: int) -> None:
    images = torch.randint(0, 256, (9, channels, 20, 20), dtype=torch.uint8)
    corners = crop_corners(9, 6, seed=0, stage="arm", epoch=2)
    assert len(corners.unique(dim=0)) > 5
    for image, cropped, (top, left) in zip(images, crop(images, 14, corners), corners.tolist(), strict=True):
        assert torch.equal(cropped, image[:, top : top + 14, left : left + 14])


def test_without_corners_the_middle_is_cut_out() -> None:
    images = torch.randint(0, 256, (2, 1, 21, 21), dtype=torch.uint8)
    assert torch.equal(crop(images, 14), images[:, :, 3:17, 3:17])
    assert torch.equal(crop(images, 21), images)


def test_corners_depend_on_seed_stage_and_epoch_alone() -> None:
    """All corners are drawn, and drawn again for a resumed epoch."""
    first = crop_corners(500, 3, seed=0, stage="arm", epoch=1)
    torch.manual_seed(5)
    assert torch.equal(crop_corners(500, 3, seed=0, stage="arm", epoch=1), first)
    assert first.unique(dim=0).tolist() == [[top, left] for top in range(4) for left in range(4)]
    for other in ({"seed": 1}, {"stage": "backbone"}, {"epoch": 2}):
        assert not torch.equal(crop_corners(500, 3, **{"seed": 0, "stage": "arm", "epoch": 1, **other}), first)
