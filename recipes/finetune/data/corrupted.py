"""Corrupted images kept on disk: made once, shared by all models that are scored on them.

They lie in files of BLOCK images. Each is named by a hash of what it was made from, written whole or not at all, and
holds a checksum; a damaged one is made anew. So making them goes on where it was killed.
"""

import hashlib
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..errors import CheckpointWarning
from ..files import storage_errors, write_bytes
from . import corruptions

BLOCK = 512


@dataclass(frozen=True)
class Block:
    """Some clean images as the model sees them, uint8 (N, 1 or 3, H, H), and what names them."""

    start: int
    images: np.ndarray
    cases: Sequence[str]

    @property
    def digest(self) -> str:
        """What the corrupted images depend on, beside the corruption."""
        digest = hashlib.sha256("\n".join([_definitions(), str(self.images.shape), *self.cases]).encode())
        digest.update(np.ascontiguousarray(self.images).data)
        return digest.hexdigest()


def blocks(rows: int) -> Iterator[range]:
    """The rows of each block."""
    for start in range(0, rows, BLOCK):
        yield range(start, min(start + BLOCK, rows))


@cache
def _definitions() -> str:
    """How corruptions are made: their source, and the versions of what they use."""
    source = hashlib.sha256(Path(corruptions.__file__).read_bytes()).hexdigest()
    return " ".join([source, *(version(package) for package in ("numpy", "pillow", "scipy", "torch", "torchvision"))])


def corrupted(block: Block, name: str, parameter: Any, folder: Path | None) -> np.ndarray:
    """The images of a block after a corruption.

    Args:
        folder: where corrupted images are kept; None: nowhere, they are made each time.
    """
    if folder is None:
        return corruptions.corrupt(block.images, block.cases, name, parameter)
    made_from = hashlib.sha256(f"{block.digest} {name} {parameter}".encode()).hexdigest()
    path = folder / f"{name}-{block.start:07d}-{made_from[:20]}.safetensors"
    found = _read(path, block.images.shape)
    if found is None:
        with storage_errors(path):
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / "making.lock"):
                found = _read(path, block.images.shape)  # whoever had the lock may have made it
                if found is None:
                    found = corruptions.corrupt(block.images, block.cases, name, parameter)
                    write_bytes(path, _encoded(found))
    return found


def _encoded(images: np.ndarray) -> bytes:
    return save(
        {"images": torch.from_numpy(np.ascontiguousarray(images))}, {"crc32": str(zlib.crc32(images.tobytes()))}
    )


def _read(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The images of a file; None where there is none, or a damaged one."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="np") as file:
            images, checksum = file.get_tensor("images"), file.metadata()["crc32"]
        if images.shape == shape and images.dtype == np.uint8 and str(zlib.crc32(images.tobytes())) == checksum:
            return images
    except (SafetensorError, OSError, KeyError, TypeError):
        pass
    warnings.warn(f"{path} is damaged: its images are made anew", CheckpointWarning, stacklevel=2)
    return None
