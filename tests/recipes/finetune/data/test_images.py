"""Images at another size."""

from __future__ import annotations

import numpy as np
from finetune.data.images import resize
from PIL import Image


def test_resize_equals_pil() -> None:
    """Up and down, every pixel within one grey level of PIL's bilinear, antialiased resize."""
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 28, 28), dtype=np.uint8)
    for size in (16, 64):
        found = resize(images, size, chunk=2)
        expected = [
            np.asarray(Image.fromarray(image.transpose(1, 2, 0)).resize((size, size), Image.Resampling.BILINEAR))
            for image in images
        ]
        difference = np.abs(found.transpose(0, 2, 3, 1).astype(int) - np.stack(expected).astype(int))
        assert difference.max() <= 1
    assert resize(images, 28) is images
