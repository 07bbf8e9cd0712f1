"""One epoch of training."""

import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ..errors import Diverged

Batch = dict[str, torch.Tensor]
_SECONDS_BETWEEN_LOOKS = 1.0


def train_epoch(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    loader: DataLoader[Any],
    model_input: Callable[[Batch], torch.Tensor],
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    clip_grad: float | None,
    title: str,
    after_step: Callable[[], None] | None = None,
    merged_pairs: Callable[[], int] | None = None,
) -> float:
    """Train on one pass of the loader and return the mean loss over batches and processes.

    Args:
        after_step: called after each step of the optimizer.
        merged_pairs: how many pairs were merged so far, for the progress bar.
    """
    model.train()
    total = torch.zeros((), device=accelerator.device)
    bar = tqdm(loader, desc=title, leave=False, disable=not sys.stderr.isatty())
    watch = _Watch(accelerator, merged_pairs)
    for batch in bar:
        with accelerator.accumulate(model):
            batch_loss = loss(model(model_input(batch)), batch["labels"])
            accelerator.backward(batch_loss)
            if clip_grad is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            if after_step is not None and accelerator.sync_gradients:
                after_step()
        total += batch_loss.detach()
        if not bar.disable:
            watch.look(bar, len(batch["rows"]), batch_loss, optimizer.param_groups[0]["lr"])
    mean = accelerator.reduce(total, reduction="mean").item() / len(loader)
    if not math.isfinite(mean):
        raise Diverged(f"the training loss of {title} is {mean}")
    return mean


class _Watch:
    """What the progress bar shows: read from the device once a second, since each look waits for it."""

    def __init__(self, accelerator: Accelerator, merged_pairs: Callable[[], int] | None) -> None:
        self._accelerator, self._merged_pairs = accelerator, merged_pairs
        self._start(merged_pairs() if merged_pairs else 0)

    def _start(self, merged: int) -> None:
        self._since, self._images, self._passes, self._merged = time.monotonic(), 0, 0, merged

    def look(self, bar: tqdm, images: int, loss: torch.Tensor, lr: float) -> None:
        self._images += images * self._accelerator.num_processes
        self._passes += 1
        seconds = time.monotonic() - self._since
        if seconds < _SECONDS_BETWEEN_LOOKS:
            return
        shown = {"loss": f"{loss.item():.4f}", "lr": f"{lr:.2g}", "images/s": f"{self._images / seconds:.0f}"}
        merged = 0
        if self._merged_pairs:
            merged, steps = self._merged_pairs(), self._passes / self._accelerator.gradient_accumulation_steps
            shown["merges/step"] = f"{(merged - self._merged) / steps:.1f}"
        bar.set_postfix(shown)
        self._start(merged)
