"""Images that are not square, and what tells images from one another."""

from __future__ import annotations

import io

import numpy as np
import pytest
from finetune.data.squares import Form, make_square, pixel_hash
from PIL import Image


def square(image: np.ndarray, form: Form) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return np.frombuffer(make_square(file.getvalue(), form).image, np.uint8).reshape(-1, form.side, form.side)


@pytest.fixture
def wide() -> np.ndarray:
    """40 x 80: dark left, grey in the middle, bright right."""
    image = np.full((40, 80), 120, np.uint8)
    image[:, :20], image[:, 60:] = 40, 200
    return image


def test_pad_keeps_all_of_an_image_and_its_shape(wide: np.ndarray) -> None:
    padded = square(wide, Form(40, "pad"))[0]
    assert not padded[:10].any()
    assert not padded[30:].any()
    np.testing.assert_array_equal(padded[20, [2, 20, 38]], [40, 120, 200])


def test_crop_keeps_the_middle(wide: np.ndarray) -> None:
    np.testing.assert_array_equal(square(wide, Form(40, "crop"))[0], np.full((40, 40), 120))


def test_squash_keeps_all_and_no_shape(wide: np.ndarray) -> None:
    squashed = square(wide, Form(40, "squash"))[0]
    np.testing.assert_array_equal(squashed[:, [2, 20, 38]], np.tile([40, 120, 200], (40, 1)))


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_a_square_image_is_what_pil_resizes(fit: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((20, 20), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(square(image, Form(20, fit)), np.moveaxis(expected, -1, 0))
    grey = square(image, Form(20, fit, grey=True))
    assert np.abs(grey[0] - expected @ [0.299, 0.587, 0.114]).max() <= 1.5


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_a_line_fits_into_a_square(fit: str) -> None:
    assert square(np.full((1, 300), 90, np.uint8), Form(16, fit)).max() == 90


def test_a_pixel_or_the_shape_makes_another_hash() -> None:
    image = np.zeros((4, 6), np.uint8)
    other = image.copy()
    other[3, 5] = 1
    assert pixel_hash(image) == pixel_hash(image.copy(order="F"))
    assert len({pixel_hash(image), pixel_hash(other), pixel_hash(image.reshape(6, 4))}) == 3
