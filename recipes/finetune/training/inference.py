"""What kept weights say of images that are given as uint8 arrays."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import nn

from ..data.images import ImageData
from ..options import Options
from .batches import channel_statistics, model_input
from .models import load_model
from .randomness import be_deterministic

_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class KeptModel:
    """Kept weights, ready to predict.

    Attributes:
        as_input: from images (N, 1 or 3, H, H), float or uint8 from 0 to 255, to what the model takes.
        batch_size: images per forward pass and process, as in the run: the same operations give the same bits.
        autocast: the precision that the run was evaluated in.
    """

    model: nn.Module
    as_input: Callable[[torch.Tensor], torch.Tensor]
    batch_size: int
    device: torch.device
    autocast: Callable[[], AbstractContextManager[None]]

    def logits(self, images: np.ndarray) -> torch.Tensor:
        """Float32 (N, outputs) on the host, of uint8 images as the model sees them."""
        with torch.no_grad(), self.autocast():
            return torch.cat([self.model(self.as_input(batch)).float().cpu() for batch in self.batches(images)])

    def batches(self, values: np.ndarray) -> Iterator[torch.Tensor]:
        """The rows of an array in batches on the device."""
        for start in range(0, len(values), self.batch_size):
            yield torch.from_numpy(np.ascontiguousarray(values[start : start + self.batch_size])).to(self.device)


def load_kept_model(
    options: Options, data: ImageData, weights: Path, launch: dict[str, Any], expected: dict[str, Any] | None = None
) -> KeptModel:
    """The model of a stage's weights file.

    Args:
        launch: how the run was launched: its processes, which shared a batch, and its precision; fp16 is none of the
            CPU's.
        expected: mean and std of images, as the run has recorded them; None: what timm says today.
    """
    be_deterministic()
    device, precision = PartialState().device, launch.get("precision", "no")
    memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
    model = load_model(options, data, weights).eval().requires_grad_(False)
    model = model.to(device).to(memory_format=memory_format)
    mean, std = (values.to(device) for values in channel_statistics(expected or model.pretrained_cfg, options.in_chans))
    dtype = _PRECISIONS.get(precision)
    used = dtype is not None and not (precision == "fp16" and device.type == "cpu")
    return KeptModel(
        model,
        partial(_laid_out_input, mean=mean, std=std, memory_format=memory_format),
        max(1, options.batch_size // options.grad_accum_steps // launch.get("processes", 1)),
        device,
        partial(torch.autocast, device.type, dtype=dtype, enabled=used),
    )


def _laid_out_input(
    images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, memory_format: torch.memory_format
) -> torch.Tensor:
    return model_input(images, mean, std).contiguous(memory_format=memory_format)
