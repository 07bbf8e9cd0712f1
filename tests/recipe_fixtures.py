"""Fixtures of those who test the recipes: small runs, in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import run_digits


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that merges often, for the tests that only read."""
    torch.set_num_threads(1)
    return run_digits(tmp_path_factory.mktemp("digits") / "run", "--similarity-threshold", "-0.5", "--hflip", "0.5")


@pytest.fixture
def made_medmnist(tmp_path: Path) -> Callable[..., Path]:
    """Write a small file in the form of a MedMNIST set, with random images; returns its folder."""

    def write(name: str, *, colour: bool, classes: int, labels: int = 1, cases: int = 64, size: int = 28) -> Path:
        rng = np.random.default_rng(0)
        arrays = {}
        for part in ("train", "val", "test"):
            shape = (cases, size, size, 3) if colour else (cases, size, size)
            arrays[f"{part}_images"] = rng.integers(0, 256, shape, dtype=np.uint8)
            arrays[f"{part}_labels"] = rng.integers(0, classes, (cases, labels), dtype=np.uint8)
        folder = tmp_path / "made"
        folder.mkdir(exist_ok=True)
        np.savez_compressed(folder / f"{name}{'' if size == 28 else f'_{size}'}.npz", **arrays)
        return folder

    return write
