"""Adversarial changes of an image: within a few grey levels of each pixel, against the model's own gradient.

FGSM: Goodfellow et al., "Explaining and Harnessing Adversarial Examples" (2015). PGD: Madry et al., "Towards Deep
Learning Models Resistant to Adversarial Attacks" (2018): ten steps from a random start. Both know the model and the
labels. NOISE goes as far in random directions and knows neither: an attack that does no more harm finds nothing.
"""

from collections.abc import Sequence

import numpy as np
import torch

from ..data.corruptions import case_generator
from ..data.tasks import Task, loss
from .inference import KeptModel

FGSM, PGD, NOISE = "fgsm", "pgd", "noise"
ATTACKS = (FGSM, PGD, NOISE)
STEPS = 10
_STRIDE = 2.5  # of PGD's way, so that it can turn back


def attack(
    kept: KeptModel, task: Task, kind: str, levels: float, images: np.ndarray, labels: np.ndarray, cases: Sequence[str]
) -> np.ndarray:
    """Images that differ from the given ones by `levels` of 255 at most, float32 from 0 to 255.

    Args:
        kind: of ATTACKS.
        images: uint8 (N, 1 or 3, H, H).
        labels: what is true of each.
        cases: what names each, which keys what chance decides.
    """
    rows = np.arange(len(images))
    changed = np.empty(images.shape, dtype=np.float32)
    for batch in (rows[start : start + kept.batch_size] for start in range(0, len(rows), kept.batch_size)):
        clean, truth = (torch.from_numpy(values[batch]).to(kept.device) for values in (images, labels))
        signs = torch.from_numpy(_random_signs(kind, [cases[row] for row in batch], images.shape[1:])).to(kept.device)
        changed[batch] = _changed(kept, task, kind, levels, clean.float(), truth, signs).cpu().numpy()
    return changed


def _changed(
    kept: KeptModel,
    task: Task,
    kind: str,
    levels: float,
    clean: torch.Tensor,
    labels: torch.Tensor,
    start: torch.Tensor,
) -> torch.Tensor:
    if kind == NOISE:
        return (clean + levels * start.sign()).clamp(0, 255)
    if kind == FGSM:
        return (clean + levels * _uphill(kept, task, clean, labels)).clamp(0, 255)
    images = (clean + levels * start).clamp(0, 255)
    for _ in range(STEPS):
        images = images + _STRIDE * levels / STEPS * _uphill(kept, task, images, labels)
        images = images.clamp(clean - levels, clean + levels).clamp(0, 255)
    return images


def _uphill(kept: KeptModel, task: Task, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The sign of the loss's gradient in each pixel."""
    images = images.clone().requires_grad_()
    with torch.enable_grad():
        of_batch = loss(task, kept.model(kept.as_input(images)), labels)
        return torch.autograd.grad(of_batch, images)[0].sign()


def _random_signs(kind: str, cases: Sequence[str], shape: tuple[int, ...]) -> np.ndarray:
    """Between -1 and 1, (N, *shape)."""
    return np.stack([case_generator(kind, case).uniform(-1, 1, shape).astype(np.float32) for case in cases])
