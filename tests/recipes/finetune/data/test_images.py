"""Images at another size."""

from __future__ import annotations

import numpy as np
from finetune.data.images import resize
from PIL import Image


def test_resize_is_pils() -> None:
    """Up and down, grey and in colour, to the bit on any processor."""
    for channels, size in ((1, 16), (3, 16), (3, 64)):
        images = np.random.default_rng(0).integers(0, 256, (5, channels, 28, 28), dtype=np.uint8)
        expected = [
            np.asarray(Image.fromarray(plane).resize((size, size), Image.Resampling.BILINEAR))
            for image in images
            for plane in image
        ]
        assert np.array_equal(resize(images, size).reshape(-1, size, size), np.stack(expected))
    assert resize(images, 28) is images
