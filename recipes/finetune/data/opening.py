"""Image files as they are displayed: upright, 8 bits, grey or RGB.

Every file of an image is read here, and every image that is not DICOM is opened here, and nowhere else: regular files
alone, by the decoders of FORMATS alone, and never more pixels than Pillow allows.
"""

import errno
import io
import os
import stat
import warnings
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import first_line

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
PERCENTILES = (1.0, 99.0)
MAX_PIXELS = Image.MAX_IMAGE_PIXELS  # of one image; above, Pillow warns of a decompression bomb

# Center and width; or those of the file, and where it has none those of PERCENTILES; or PERCENTILES of each image.
Window = tuple[float, float] | Literal["file", "percentile"]


class Unreadable(Exception):
    """Why a file can't be used as an image, in words that go on from its name."""


class Opened(NamedTuple):
    """An image as it is displayed.

    Attributes:
        pixels: uint8 (H, W), or (H, W, 3) where the colours differ.
        header: what the file says of the image: of "patient", "view", "sex" and "age" those that it has.
    """

    pixels: np.ndarray
    header: dict[str, str] = {}  # noqa: RUF012 - never changed


def read_file(path: str) -> bytes:
    """The content of a regular file. Raises Unreadable for anything else, and OSError when it can't be read now."""
    try:
        # Without waiting for whoever might write to a pipe.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError as error:
        raise Unreadable("is missing") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Unreadable("is a link that leads to itself") from error
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise Unreadable("is no regular file")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def open_image(encoded: bytes, window: Window) -> Opened:
    """Decode an image file.

    Alpha is dropped. A grey image of more than 8 bits is scaled by the window, by default by its percentiles.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
                frames = getattr(image, "n_frames", 1)
                if image.format == "TIFF" and frames > 1:
                    raise Unreadable(f"holds {frames} images: expected one, write each to a file of its own")
                return Opened(_displayed(ImageOps.exif_transpose(image), window))
    except (Unreadable, MemoryError):
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise Unreadable(f"has more than {MAX_PIXELS:,} pixels: make it smaller") from None
    except UnidentifiedImageError as error:
        if is_dicom(encoded):
            raise Unreadable("is DICOM, which pip install 'inmerge_optim[dicom]' lets be read") from error
        raise Unreadable("is empty" if not encoded else f"is no {', '.join(FORMATS)} or DICOM file") from error
    except Exception as error:  # whatever Pillow's decoders raise on a damaged file
        raise Unreadable(f"is damaged: {first_line(error)}") from error


def is_dicom(encoded: bytes) -> bool:
    """Whether a file begins as DICOM files do."""
    return encoded[128:132] == b"DICM"


def _displayed(image: Image.Image, window: Window) -> np.ndarray:
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        return scaled(values, *limits(values, window))
    if image.mode in ("1", "L", "LA"):
        return np.asarray(image.convert("L"))
    return grey_if_equal(np.asarray(image.convert("RGB")))


def grey_if_equal(pixels: np.ndarray) -> np.ndarray:
    """One channel in place of three that are equal, as in X-rays that were saved in colour."""
    red, green, blue = np.moveaxis(pixels, -1, 0)
    return red.copy() if np.array_equal(red, green) and np.array_equal(red, blue) else pixels


def limits(values: np.ndarray, window: Window) -> tuple[float, float]:
    """The values that become black and white: DICOM's linear window (part 3, C.11.2.1.2), or PERCENTILES.

    Where most values are the same, and so are both percentiles, the smallest and the largest are taken.
    """
    if not isinstance(window, str):
        center, width = window
        return center - width / 2, center + width / 2 - 1
    finite = values[np.isfinite(values)]
    if not len(finite):
        raise Unreadable("has no finite value")
    low, high = np.percentile(finite, PERCENTILES)
    return (float(low), float(high)) if low < high else (float(finite.min()), float(finite.max()))


def scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values as uint8, from `low`, which becomes 0, to `high`, which becomes 255; what is no number becomes 0."""
    if not low < high:
        return np.zeros(values.shape, dtype=np.uint8)
    shades = np.nan_to_num((values.astype(np.float64) - low) * (255 / (high - low)), nan=0, posinf=255, neginf=0)
    return shades.round().clip(0, 255).astype(np.uint8)


def parse_window(text: str) -> Window:
    """--window as it is given: center,width, or file, or percentile. Raises ValueError for anything else."""
    if text in ("file", "percentile"):
        return text  # type: ignore[return-value]
    center, width = map(float, text.split(","))
    if not width > 1:
        raise ValueError("a window is wider than 1")
    return center, width
