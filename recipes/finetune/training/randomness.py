"""Random numbers that depend on named keys alone.

Each use draws from a generator keyed by the seed, the purpose, the kind of stage and the epoch. So a resumed run needs
no snapshot of generators, and the arms of one seed see the same data in the same order with the same dropout.
"""

import os
import random
import zlib

import numpy as np
import torch


def keyed_generator(seed: int, purpose: str, stage: str, epoch: int) -> np.random.Generator:
    """A generator for one purpose ("order", "flip") in one epoch of a stage ("backbone", or "arm" for every arm)."""
    return np.random.default_rng([seed, _number(purpose), _number(stage), epoch])


def seed_globals(seed: int, stage: str, epoch: int, rank: int) -> None:
    """Seed Python's, numpy's and torch's global generators, which dropout and initialisation draw from."""
    words = np.random.SeedSequence([seed, _number("globals"), _number(stage), epoch, rank]).generate_state(2, np.uint32)
    random.seed(int(words[0]))
    np.random.seed(words[0])  # noqa: NPY002 - libraries draw from it
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))


def be_deterministic() -> None:
    """Let torch choose operations whose results repeat on the same machine, as far as it has them."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)


def _number(word: str) -> int:
    return zlib.crc32(word.encode())
