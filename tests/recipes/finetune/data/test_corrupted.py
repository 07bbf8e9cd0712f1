"""Corrupted images are kept as they were made, and made anew where anything that they depend on differs."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from finetune.data import corruptions
from finetune.data.corrupted import BLOCK, Block, blocks, corrupted
from finetune.errors import CheckpointWarning

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 1, 16, 16), dtype=np.uint8)


def block(images: np.ndarray = IMAGES, first: str = "a") -> Block:
    return Block(0, images, [first, "b", "c", "d", "e"])


def test_blocks_cover_all_rows_once() -> None:
    rows = [row for part in blocks(2 * BLOCK + 3) for row in part]
    assert rows == list(range(2 * BLOCK + 3))


def test_kept_images_are_those_that_are_made_and_are_made_once(tmp_path: Path) -> None:
    made = corrupted(block(), "gaussian_noise", 0.1, None)
    np.testing.assert_array_equal(corrupted(block(), "gaussian_noise", 0.1, tmp_path), made)
    with mock.patch.object(corruptions, "corrupt", side_effect=AssertionError("made again")):
        np.testing.assert_array_equal(corrupted(block(), "gaussian_noise", 0.1, tmp_path), made)


def test_other_images_cases_parameters_and_definitions_have_files_of_their_own(tmp_path: Path) -> None:
    other = IMAGES.copy()
    other[0, 0, 0, 0] ^= 1
    corrupted(block(), "gaussian_noise", 0.1, tmp_path)
    corrupted(block(other), "gaussian_noise", 0.1, tmp_path)
    corrupted(block(first="z"), "gaussian_noise", 0.1, tmp_path)
    corrupted(block(), "gaussian_noise", 0.2, tmp_path)
    with mock.patch("finetune.data.corrupted._definitions", return_value="changed"):
        corrupted(block(), "gaussian_noise", 0.1, tmp_path)
    assert len(list(tmp_path.glob("gaussian_noise-*.safetensors"))) == 5


@pytest.mark.parametrize(
    "damage", [lambda content: content[:40], lambda content: content[:-1] + bytes([content[-1] ^ 1])]
)
def test_a_damaged_file_is_made_anew_with_a_warning(tmp_path: Path, damage: object) -> None:
    made = corrupted(block(), "contrast_up", 1.3, tmp_path)
    (path,) = tmp_path.glob("contrast_up-*")
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with pytest.warns(CheckpointWarning, match="is damaged: its images are made anew"):
        np.testing.assert_array_equal(corrupted(block(), "contrast_up", 1.3, tmp_path), made)
    assert path.read_bytes() == whole
