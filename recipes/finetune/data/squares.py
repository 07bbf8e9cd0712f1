"""What is prepared of each image: a square, and what tells it from other images."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from .opening import PERCENTILES, Opened, Unreadable, Window, open_image

Fit = Literal["crop", "pad", "squash"]
RESAMPLING = Image.Resampling.BILINEAR


@dataclass(frozen=True)
class Form:
    """How an encoded image becomes a square.

    Attributes:
        side: of the square, in pixels.
        fit: of an image that is not square: "pad" it with black, "crop" its longer side, or "squash" it.
        window: what becomes black and white of values of more than 8 bits.
        grey: make colours grey.
        decode: opens a file's content under a window; raises Unreadable.
    """

    side: int
    fit: Fit = "squash"
    window: Window = "file"
    grey: bool = False
    decode: Callable[[bytes, Window], Opened] = open_image

    def __str__(self) -> str:
        """What the pixels depend on, beside the file."""
        colour = "grey" if self.grey else "as it is"
        parts = (self.side, self.fit, self.window, colour, self.decode.__name__, PERCENTILES, RESAMPLING.name, "3")
        return ", ".join(map(str, parts))

    def recorded(self) -> dict[str, Any]:
        """What a run folder keeps of it; form_of reads it again."""
        window = self.window if isinstance(self.window, str) else list(self.window)
        return {"side": self.side, "fit": self.fit, "window": window, "grey": self.grey}


def form_of(recorded: dict[str, Any], decode: Callable[[bytes, Window], Opened]) -> Form:
    """The form that a run folder recorded, for image files that `decode` opens."""
    window: Any = recorded["window"] if isinstance(recorded["window"], str) else tuple(recorded["window"])
    return Form(recorded["side"], recorded["fit"], window, recorded["grey"], decode)


class Square(NamedTuple):
    """A prepared image.

    Attributes:
        image: uint8 in the order (C, side, side), of one channel or three.
        width, height: of the image as it was decoded.
        pixel_hash: of all pixels of the image as it was decoded, the same for exact twins.
        header: what the file says of the image, see Opened.
    """

    image: bytes
    width: int
    height: int
    pixel_hash: bytes
    header: dict[str, str]


def make_square(encoded: bytes, form: Form) -> Square:
    """Decode an image and fit it into its square, by PIL's bilinear resize. Raises Unreadable."""
    pixels, header = form.decode(encoded, form.window)
    if not pixels.size:
        raise Unreadable("has no pixels")
    image = Image.fromarray(pixels)
    if form.grey:
        image = image.convert("L")
    size = (form.side, form.side)
    # One image of a few pixels' width would otherwise be none at all within its square.
    if form.fit == "squash" or min(image.size) * form.side < max(image.size):
        square = image.resize(size, RESAMPLING)
    else:
        square = {"pad": ImageOps.pad, "crop": ImageOps.fit}[form.fit](image, size, RESAMPLING)
    planes = np.asarray(square)
    planes = planes if planes.ndim == 2 else np.moveaxis(planes, -1, 0)
    return Square(planes.tobytes(), *image.size, pixel_hash(pixels), header)


def pixel_hash(pixels: np.ndarray) -> bytes:
    """16 bytes that two images share if, and but for chance only if, their shapes and all of their pixels are equal."""
    digest = hashlib.sha256(str(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.digest()[:16]
