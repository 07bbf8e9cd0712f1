"""Every kind of image file is opened as it is displayed, and what is no image is told in words."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from finetune.data.opening import Unreadable, open_image, parse_window, read_file
from PIL import Image

GREY = np.random.default_rng(0).integers(0, 256, (40, 30), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (40, 30, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(content: bytes, window: str = "file") -> np.ndarray:
    return open_image(content, parse_window(window)).pixels


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA"])
def test_grey_in_any_form_is_the_same_channel(mode: str) -> None:
    grey = Image.fromarray(GREY)
    other = grey.convert("RGB").quantize(256) if mode == "P" else grey.convert(mode)
    assert Image.open(io.BytesIO(encoded(other))).mode == mode
    np.testing.assert_array_equal(pixels(encoded(other)), GREY)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_colours_are_kept(kind: str) -> None:
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(COLOUR), kind)), COLOUR)


def test_palettes_alpha_and_bits() -> None:
    """A palette of colours, alpha over colours, and one bit per pixel."""
    palette = Image.fromarray(COLOUR).quantize(64)
    np.testing.assert_array_equal(pixels(encoded(palette)), np.asarray(palette.convert("RGB")))
    clear = np.concatenate([COLOUR, np.zeros((40, 30, 1), np.uint8)], axis=2)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(clear))), COLOUR)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(GREY > 99))), np.where(GREY > 99, 255, 0))


def test_cmyk_becomes_rgb() -> None:
    cmyk = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    np.testing.assert_array_equal(pixels(encoded(cmyk, "TIFF"))[0, 0], [0, 255, 255])


def test_a_photograph_is_turned_upright() -> None:
    """EXIF orientation 6: to be shown turned by 90 degrees clockwise."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = pixels(encoded(Image.fromarray(GREY), exif=exif))
    np.testing.assert_array_equal(turned, np.rot90(GREY, -1))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled_by_the_window(kind: str) -> None:
    """A window over all 65,536 values gives back what was multiplied by 257; a narrow one cuts off."""
    wide = encoded(Image.fromarray(GREY.astype(np.uint16) * 257), kind)
    np.testing.assert_array_equal(pixels(wide, "32768,65536"), GREY)
    # Of the stored values 100 * 257 to 199 * 257, as DICOM's linear window has them.
    width = 99 * 257 + 1
    narrow = pixels(wide, f"{100 * 257 + width / 2},{width}")
    expected = np.clip((GREY.astype(float) - 100) * 255 / 99, 0, 255).round()
    assert np.abs(narrow - expected).max() <= 1
    low, high = np.percentile(GREY, [1, 99])
    expected = np.clip((GREY - low) * 255 / (high - low), 0, 255)
    for window in ("file", "percentile"):
        assert np.abs(pixels(wide, window) - expected).max() <= 1


def test_floats_and_constants_are_scaled_too() -> None:
    values = GREY.astype(np.float32) / 7
    found = pixels(encoded(Image.fromarray(values), "TIFF"), "percentile")
    low, high = np.percentile(values, [1, 99])
    assert np.abs(found - np.clip((values - low) * 255 / (high - low), 0, 255)).max() <= 1
    values[0, :2] = np.nan, np.inf
    found = pixels(encoded(Image.fromarray(values), "TIFF"), "percentile")
    assert (found[0, 0], found[0, 1]) == (0, 255)
    assert np.abs(found[1:] - np.clip((values[1:] - low) * 255 / (high - low), 0, 255)).max() <= 2


def test_few_bright_values_are_seen_and_a_constant_is_black() -> None:
    """Where both percentiles are the same."""
    values = np.full((40, 40), 700, np.uint16)
    assert not pixels(encoded(Image.fromarray(values))).any()
    values[3, 4] = 900
    found = pixels(encoded(Image.fromarray(values)))
    assert (found[3, 4], np.count_nonzero(found)) == (255, 1)


def test_8_bits_are_left_as_they_are_whatever_the_window() -> None:
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(GREY)), "40,80"), GREY)


WHOLE = encoded(Image.fromarray(GREY))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"patient,label\n", "is no PNG, JPEG, TIFF, BMP, WEBP or DICOM file"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no PNG, JPEG"),
        (WHOLE[: len(WHOLE) // 2], "is damaged: "),
        (encoded(Image.new("1", (30_000, 30_000))), "has more than 89,478,485 pixels: make it smaller"),
        (
            encoded(Image.fromarray(GREY), "TIFF", save_all=True, append_images=[Image.fromarray(GREY)]),
            "holds 2 images",
        ),
    ],
    ids=["empty", "text", "program", "cut short", "bomb", "pages"],
)
def test_what_is_no_image_is_told(content: bytes, expected: str) -> None:
    with pytest.raises(Unreadable) as error:
        pixels(content)
    assert str(error.value).startswith(expected)


def test_no_verdict_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What says nothing of the file is not taken for its fault."""

    def exhausted(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image, "open", exhausted)
    with pytest.raises(MemoryError):
        pixels(WHOLE)


@pytest.mark.parametrize("text", ["wide", "40", "40,1", "1,2,3", ""])
def test_a_bad_window_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the recipe words it
        parse_window(text)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    """A pipe that nobody writes to would be waited for without end, and a device never ends."""
    (tmp_path / "whole.png").write_bytes(WHOLE)
    os.symlink("whole.png", tmp_path / "link.png")
    assert read_file(str(tmp_path / "link.png")) == WHOLE
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink("/dev/zero", tmp_path / "endless.png")
    os.symlink("loop.png", tmp_path / "loop.png")
    os.symlink("nowhere.png", tmp_path / "dangling.png")
    (tmp_path / "folder.png").mkdir()
    expected = {
        "pipe.png": "is no regular file",
        "endless.png": "is no regular file",
        "folder.png": "is no regular file",
        "loop.png": "is a link that leads to itself",
        "dangling.png": "is missing",
    }
    for name, words in expected.items():
        with pytest.raises(Unreadable, match=words):
            read_file(str(tmp_path / name))
