"""Augmentation: what each kind does, and that it depends on the image's row, seed, stage and epoch alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from finetune.training.augment import AUGMENTATIONS, augment, draw_augmentations
from PIL import Image, ImageFilter
from safetensors.torch import load_file
from small_runs import run_digits
from torchvision.transforms import v2

ALL = tuple(AUGMENTATIONS)


def pictures(count: int = 8, channels: int = 1, side: int = 40) -> torch.Tensor:
    """Smooth enough that interpolation has something to go by."""
    noise = np.random.default_rng(0).integers(0, 256, (count * channels, side, side), dtype=np.uint8)
    smooth = [np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(3))) for image in noise]
    return torch.from_numpy(np.stack(smooth)).view(count, channels, side, side)


@pytest.mark.parametrize("channels", [1, 3])
def test_flips_and_quarter_turns_move_pixels_and_change_none(channels: int) -> None:
    images = pictures(8, channels)
    draws = draw_augmentations(("quarter-turns", "flips"), 8, 0, "arm", 3)
    found = augment(images, draws)
    assert found.dtype == torch.uint8
    for image, got, (across, down), turns in zip(images, found, draws["flips"], draws["quarter-turns"], strict=True):
        expected = np.asarray(image)
        expected = np.flip(expected, -1) if across else expected
        expected = np.flip(expected, -2) if down else expected
        np.testing.assert_array_equal(got, np.rot90(expected, int(turns), (1, 2)))
    many = draw_augmentations(("quarter-turns", "flips"), 4000, 0, "arm", 0)
    shares = [many["flips"][:, axis].float().mean() for axis in (0, 1)]
    shares += [(many["quarter-turns"] == turns).float().mean() * 2 for turns in range(4)]
    np.testing.assert_allclose(shares, 0.5, atol=0.05)


def test_rotations_are_torchvisions() -> None:
    images = pictures()
    draws = draw_augmentations(("rotations",), 8, 0, "arm", 0)
    assert -10 <= draws["rotations"].min() < -1
    assert 1 < draws["rotations"].max() <= 10
    found = augment(images, draws)
    for image, got, degrees in zip(images, found, draws["rotations"], strict=True):
        expected = v2.functional.rotate(image.float(), float(degrees), v2.InterpolationMode.BILINEAR)
        torch.testing.assert_close(got, expected, atol=0.05, rtol=0)


def test_crops_enlarge_a_part() -> None:
    """A crop of 32 of 40 pixels from row 6 and column 2, against interpolation, but for the part's edge."""
    images = pictures()
    drawn = torch.tensor([[0.8, 2 / 8, 6 / 8]]).repeat(8, 1)
    part = images[:, :, 6:38, 2:34].float()
    expected = F.interpolate(part, size=(40, 40), mode="bilinear", align_corners=False)
    found = AUGMENTATIONS["crops"].apply(images, drawn)
    torch.testing.assert_close(found[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], atol=1e-3, rtol=0)
    draws = draw_augmentations(("crops",), 4000, 0, "arm", 0)["crops"]
    assert draws[:, 0].min() >= 0.8
    np.testing.assert_allclose(draws.mean(dim=0), [0.9, 0.5, 0.5], atol=0.02)
    whole = AUGMENTATIONS["crops"].apply(images, torch.tensor([[1.0, 0.3, 0.9]]).repeat(8, 1))
    torch.testing.assert_close(whole, images.float(), atol=1e-3, rtol=0)


def test_brightness_and_contrast_are_torchvisions() -> None:
    images = pictures(channels=1)
    for name, reference in (
        ("brightness", v2.functional.adjust_brightness),
        ("contrast", v2.functional.adjust_contrast),
    ):
        draws = draw_augmentations((name,), 8, 0, "arm", 0)
        assert 0.8 <= draws[name].min() < draws[name].max() <= 1.2
        for image, got, factor in zip(images, augment(images, draws), draws[name], strict=True):
            expected = reference(image.float() / 255, float(factor)) * 255
            torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)


def test_values_stay_between_black_and_white() -> None:
    images = torch.cat([torch.zeros(4, 1, 16, 16), torch.full((4, 1, 16, 16), 255)]).to(torch.uint8)
    images[:, :, :8] = 128
    for epoch in range(5):
        found = augment(images, draw_augmentations(ALL, 8, 0, "arm", epoch))
        assert 0 <= found.min() <= found.max() <= 255


def test_what_is_drawn_depends_on_row_seed_stage_and_epoch_alone() -> None:
    """So an image is changed alike in whatever batch, process and arm it is, and with whatever others are asked for."""
    key = {"seed": 0, "stage": "arm", "epoch": 1}
    first = draw_augmentations(ALL, 50, **key)
    torch.manual_seed(5)
    for names in (ALL, ALL[::-1], ALL[2:4]):
        for name, drawn in draw_augmentations(names, 50, **key).items():
            assert torch.equal(drawn, first[name])
    for other in ({"seed": 1}, {"stage": "backbone"}, {"epoch": 2}):
        for name, drawn in draw_augmentations(ALL, 50, **{**key, **other}).items():
            assert not torch.equal(drawn, first[name])
    images = pictures(50)
    whole = augment(images, first)
    for rows in (torch.arange(10), torch.tensor([49, 3, 7])):
        torch.testing.assert_close(
            augment(images[rows], {name: drawn[rows] for name, drawn in first.items()}), whole[rows]
        )


def test_arms_stay_paired_and_learn_something_else_than_without(tmp_path: Path) -> None:
    weights = {}
    for name, options in (("plain", []), ("augmented", ["--aug", *ALL]), ("again", ["--aug", *ALL])):
        run = run_digits(tmp_path / name, "--merge-prob", "0", "--epochs", "1", "--inmerge-epochs", "1", *options)
        arms = [load_file(run / f"seed_0/{arm}/model.safetensors") for arm in ("baseline", "inmerge")]
        assert all(torch.equal(arms[0][key], arms[1][key]) for key in arms[0])
        weights[name] = arms[0]
    assert all(torch.equal(weights["augmented"][key], weights["again"][key]) for key in weights["again"])
    assert any(not torch.equal(weights["augmented"][key], weights["plain"][key]) for key in weights["plain"])


@pytest.mark.parametrize(
    ("names", "expected"),
    [(["flip"], "--aug names the unknown augmentation 'flip': did you mean flips"), (["flips", "flips"], "names an")],
)
def test_bad_names_are_refused(
    names: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_digits(tmp_path / "run", "--aug", *names)
    assert expected in capsys.readouterr().err
