"""Augmentation of training images, on the device. One is added to AUGMENTATIONS, and nowhere else.

What happens to an image is drawn for all rows of the training split at once, keyed by seed, stage and epoch: it depends
on no batch or process, is the same for every arm, and for a resumed run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import check_names
from .randomness import keyed_generator

ROTATION = 10.0  # degrees, at most, either way
SMALLEST_CROP = 0.8  # of the side
SHADES = 0.2  # of brightness and contrast, at most, either way

Draws = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Augmentation:
    """What is drawn for each image, and what it does.

    Attributes:
        draw: from a generator and the number of rows, an array with a first axis of that length.
        apply: from images, float or uint8 (N, C, H, H) from 0 to 255, and what was drawn for each, the images after it.
    """

    draw: Callable[[np.random.Generator, int], np.ndarray]
    apply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def draw_augmentations(names: Sequence[str], rows: int, seed: int, stage: str, epoch: int) -> Draws:
    """What happens to each row of the training split in an epoch, per augmentation of AUGMENTATIONS' names."""
    return {
        name: torch.from_numpy(AUGMENTATIONS[name].draw(keyed_generator(seed, name, stage, epoch), rows))
        for name in AUGMENTATIONS
        if name in names
    }


def augment(images: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Apply what was drawn for these images, in the order of AUGMENTATIONS."""
    for name, drawn in draws.items():
        images = AUGMENTATIONS[name].apply(images, drawn)
    return images


def check_augmentations(names: Sequence[str]) -> None:
    """Refuse unknown and repeated names."""
    check_names("--aug", "augmentation", names, AUGMENTATIONS)


def _flip(images: torch.Tensor, flipped: torch.Tensor) -> torch.Tensor:
    for axis, mask in ((-1, flipped[:, 0]), (-2, flipped[:, 1])):
        images = torch.where(mask[:, None, None, None], images.flip(axis), images)
    return images


def _turn(images: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    turned = images
    for quarters in (1, 2, 3):
        turned = torch.where((turns == quarters)[:, None, None, None], images.rot90(quarters, (2, 3)), turned)
    return turned


def _rotate(images: torch.Tensor, degrees: torch.Tensor) -> torch.Tensor:
    angles = degrees.deg2rad()
    zeros = torch.zeros_like(angles)
    rows = [torch.stack([angles.cos(), -angles.sin(), zeros], 1), torch.stack([angles.sin(), angles.cos(), zeros], 1)]
    return _sampled(images, torch.stack(rows, 1))


def _crop(images: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Cut out a part and enlarge it: of side `drawn[:, 0]`, at the place `drawn[:, 1:]` between both ends."""
    side, places = drawn[:, 0], drawn[:, 1:]
    zeros = torch.zeros_like(side)
    centers = (1 - side)[:, None] * (2 * places - 1)
    rows = [torch.stack([side, zeros, centers[:, 0]], 1), torch.stack([zeros, side, centers[:, 1]], 1)]
    return _sampled(images, torch.stack(rows, 1))


def _sampled(images: torch.Tensor, affine: torch.Tensor) -> torch.Tensor:
    """Images seen through a map of their coordinates, (N, 2, 3); bilinear, and black beyond their edges."""
    images = images.float()
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _brighten(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    return (images * factors[:, None, None, None]).clamp_(0, 255)


def _contrast(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Around the mean of each image."""
    mean = images.float().mean(dim=(1, 2, 3), keepdim=True)
    return ((images - mean) * factors[:, None, None, None] + mean).clamp_(0, 255)


def _factors(rng: np.random.Generator, rows: int) -> np.ndarray:
    return rng.uniform(1 - SHADES, 1 + SHADES, rows).astype(np.float32)


AUGMENTATIONS = {
    "flips": Augmentation(lambda rng, rows: rng.random((rows, 2)) < 0.5, _flip),
    "quarter-turns": Augmentation(lambda rng, rows: rng.integers(4, size=rows), _turn),
    "rotations": Augmentation(lambda rng, rows: rng.uniform(-ROTATION, ROTATION, rows).astype(np.float32), _rotate),
    "crops": Augmentation(lambda rng, rows: rng.uniform((SMALLEST_CROP, 0, 0), 1, (rows, 3)).astype(np.float32), _crop),
    "brightness": Augmentation(_factors, _brighten),
    "contrast": Augmentation(_factors, _contrast),
}
