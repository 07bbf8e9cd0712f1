"""From uint8 arrays to what the model takes.

Batches travel as uint8 and are cropped, flipped, expanded and normalised on the device, which is several times faster
than doing so image by image on the host.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from ..data.images import Split
from .randomness import keyed_generator


class ImageDataset(Dataset[Any]):
    """A split whose batches are cut out of its arrays in one piece, with the row of each image."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        return {
            "images": torch.from_numpy(self.split.images[rows]),
            "labels": torch.from_numpy(self.split.labels[rows]),
            "rows": torch.tensor(rows),
        }


class EpochOrder(Sampler[int]):
    """The first `length` rows of a permutation keyed by seed, stage and epoch: the same for every arm."""

    def __init__(self, rows: int, length: int, seed: int, stage: str) -> None:
        self.rows, self.length, self.seed, self.stage = rows, length, seed, stage
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = keyed_generator(self.seed, "order", self.stage, self.epoch).permutation(self.rows)
        return iter(order[: self.length].tolist())

    def __len__(self) -> int:
        return self.length


def train_loader(
    split: Split, *, batch_size: int, grad_accum_steps: int, seed: int, stage: str, **loading: Any
) -> DataLoader[Any]:
    """Whole optimizer steps only: what is left of the epoch's order at its end is dropped, and differs by epoch."""
    steps = len(split) // batch_size
    order = EpochOrder(len(split), steps * batch_size, seed, stage)
    batches = BatchSampler(order, batch_size // grad_accum_steps, drop_last=True)
    return DataLoader(ImageDataset(split), batch_sampler=batches, collate_fn=_as_is, **loading)


def eval_loader(split: Split, *, batch_size: int, **loading: Any) -> DataLoader[Any]:
    """Every case once, in order."""
    return DataLoader(ImageDataset(split), batch_size=batch_size, shuffle=False, collate_fn=_as_is, **loading)


def _as_is(batch: Any) -> Any:
    return batch


def flip_mask(rows: int, probability: float, seed: int, stage: str, epoch: int) -> torch.Tensor:
    """Which rows of the training split are flipped in this epoch; a row's mask depends on no batch or process."""
    return torch.from_numpy(keyed_generator(seed, "flip", stage, epoch).random(rows) < probability)


def crop_corners(rows: int, margin: int, seed: int, stage: str, epoch: int) -> torch.Tensor:
    """Top and left, int64 (rows, 2) from 0 to `margin`, of each row's crop in this epoch; keyed as the flips are."""
    return torch.from_numpy(keyed_generator(seed, "crop", stage, epoch).integers(margin + 1, size=(rows, 2)))


def crop(images: torch.Tensor, size: int, corners: torch.Tensor | None = None) -> torch.Tensor:
    """A square of side `size` out of each image (N, C, H, H): at its corner, or by default in the middle."""
    margin = images.shape[-1] - size
    if not margin:
        return images
    if corners is None:
        middle = slice(margin // 2, margin // 2 + size)
        return images[..., middle, middle]
    windows = images.unfold(2, size, 1).unfold(3, size, 1)
    return windows[torch.arange(len(images), device=images.device), :, corners[:, 0], corners[:, 1]]


def model_input(
    images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, flipped: torch.Tensor | None = None
) -> torch.Tensor:
    """Normalised float images on the device of `images`.

    Args:
        images: from 0 to 255, (N, 1 or 3, H, W).
        mean, std: (C, 1, 1), on the scale of 0 to 1; grey images are expanded to their C channels.
        flipped: bool (N,), the images to mirror left to right.
    """
    if flipped is not None:
        images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
    return (images.float() / 255 - mean).div_(std)


def channel_statistics(model_config: Any, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation that the weights expect, (C, 1, 1); one channel gets the mean of the three."""
    mean, std = np.array(model_config["mean"]), np.array(model_config["std"])
    if channels == 1:
        mean, std = mean.mean(keepdims=True), std.mean(keepdims=True)
    return torch.tensor(mean, dtype=torch.float32)[:, None, None], torch.tensor(std, dtype=torch.float32)[:, None, None]
