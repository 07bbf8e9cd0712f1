"""What a stage's weights said of changed test images, kept in the run folder: robustness/seed_<s>/<arm>/<change>."""

import warnings
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..errors import CheckpointWarning
from ..files import write_bytes
from .layout import ROBUSTNESS, stage_folder


def logits_file(run: Path, seed: int, arm: str, change: str) -> Path:
    return stage_folder(run / ROBUSTNESS, seed, arm) / f"{change}.safetensors"


def write_logits(path: Path, logits: torch.Tensor, made_from: str) -> None:
    """Keep logits of any shape, with what they were made from, by which they are known again."""
    about = f"{made_from} {_checksum(logits)}"  # in one entry, since safetensors writes several in any order
    write_bytes(path, save({"logits": logits.contiguous()}, {"made_from_and_crc32": about}))


def read_logits(path: Path, made_from: str) -> torch.Tensor | None:
    """Logits that were made from just that; None where there are none, or damaged ones."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            about, logits = file.metadata()["made_from_and_crc32"], file.get_tensor("logits")
        kept, _, checksum = about.partition(" ")
        if checksum != _checksum(logits):
            raise ValueError("another checksum")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        warnings.warn(f"{path} is damaged: these images are scored anew", CheckpointWarning, stacklevel=2)
        return None
    return logits if kept == made_from else None


def _checksum(logits: torch.Tensor) -> str:
    return str(zlib.crc32(logits.contiguous().numpy().tobytes()))
