"""Corruptions of test images, as MedMNIST-C defines them: five severities of each, per data set.

A corruption is added to CORRUPTIONS, and its severities to the SUITES that it is part of; nowhere else. Definitions and
severities are those of MedMNIST-C, written anew from its paper and its package medmnistc 0.1.0:

    F. Di Salvo, S. Doerrich, C. Ledig, "MedMNIST-C: Comprehensive benchmark and improved classifier robustness by
    simulating realistic image corruptions" (2024), arXiv:2406.17536.

MedMNIST-C corrupts images of 224 pixels. Here they have the size that the model sees. Blurs are as long as there, in
pixels of these images; bubbles and corners are as large as there, in relation to the image. What chance decides is
keyed by the corruption and the case, and is the same at every severity, so that a severer image is the milder one made
worse.
"""

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import convolve1d
from torchvision.transforms import v2

SEVERITIES = (1, 2, 3, 4, 5)
SMALLEST_SIDE = 16  # below it, some blurs reach beyond the image
GENERAL = "general"
_DEFINED_AT = 224
_MOST_BUBBLES = 25
_LUMA = (19595, 38470, 7471)  # PIL's weights of red, green and blue, of 65536

Generators = Sequence[np.random.Generator]


@dataclass(frozen=True)
class Corruption:
    """What makes an image worse.

    Attributes:
        apply: from uint8 images (N, 1 or 3, H, H), the parameter of a severity and a generator per image, the images
            after it.
        needs_colour: whether it changes nothing in grey images.
    """

    apply: Callable[[np.ndarray, Any, Generators], np.ndarray]
    needs_colour: bool = False


@dataclass(frozen=True)
class Suite:
    """The corruptions that fit a data set.

    Attributes:
        severities: per corruption the five parameters.
        left_out: why any others that belong to the set are not made.
    """

    severities: dict[str, tuple[Any, ...]]
    left_out: dict[str, str]


def suite_for(name: str, channels: int) -> Suite:
    """The suite of that name for images of one channel or three."""
    listed = SUITES[name]
    left_out = {found: reason for found, reason in NOT_MADE.items() if found in listed}
    made = {found: parameters for found, parameters in listed.items() if found not in left_out}
    if channels == 1:
        left_out |= {found: "it needs colours" for found in made if CORRUPTIONS[found].needs_colour}
    return Suite({found: parameters for found, parameters in made.items() if found not in left_out}, left_out)


def corrupt(images: np.ndarray, cases: Sequence[str], name: str, parameter: Any) -> np.ndarray:
    """The images after a corruption; uint8 (N, 1 or 3, H, H), H at least SMALLEST_SIDE.

    Args:
        cases: what names each image; with the corruption it keys what chance decides.
        parameter: of a severity, from a Suite.
    """
    return CORRUPTIONS[name].apply(images, parameter, [case_generator(name, case) for case in cases])


def case_generator(name: str, case: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{name}\0{case}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


# Digital: what storing an image does to it.


def _pixelate(images: np.ndarray, share: float, _: Generators) -> np.ndarray:
    side = images.shape[-1]
    small = (max(1, int(side * share)),) * 2
    return _each(
        images, lambda image: image.resize(small, Image.Resampling.BOX).resize((side, side), Image.Resampling.BOX)
    )


def _jpeg(images: np.ndarray, quality: int, _: Generators) -> np.ndarray:
    def stored(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return _each(images, stored)


def _each(images: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    changed = np.empty_like(images)
    for place, image in enumerate(images):
        pixels = image[0] if len(image) == 1 else np.moveaxis(image, 0, -1)
        found = np.asarray(change(Image.fromarray(pixels)))
        changed[place] = found if len(image) == 1 else np.moveaxis(found, -1, 0)
    return changed


# Noise: as MedMNIST-C has it, on the three channels of a colour image; a grey one is made of them again afterwards.


def _gaussian_noise(images: np.ndarray, spread: float, generators: Generators) -> np.ndarray:
    return _noisy(images, generators, lambda image, rng: image + spread * _normal(image, rng))


def _speckle_noise(images: np.ndarray, spread: float, generators: Generators) -> np.ndarray:
    return _noisy(images, generators, lambda image, rng: image + image * spread * _normal(image, rng))


def _shot_noise(images: np.ndarray, photons: float, generators: Generators) -> np.ndarray:
    return _noisy(images, generators, lambda image, rng: rng.poisson(image * photons) / photons)


def _impulse_noise(images: np.ndarray, share: float, generators: Generators) -> np.ndarray:
    def salted(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        hit, white = rng.random(image.shape) <= share, rng.random(image.shape) <= 0.5
        return np.where(hit, white, image)

    return _noisy(images, generators, salted)


def _normal(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal(image.shape, dtype=np.float32)


def _noisy(
    images: np.ndarray, generators: Generators, add: Callable[[np.ndarray, np.random.Generator], np.ndarray]
) -> np.ndarray:
    noisy = np.empty_like(images)
    for place, rng in enumerate(generators):
        colour = np.broadcast_to(images[place], (3, *images.shape[2:]))
        found = _as_uint8(add(colour.astype(np.float32) / 255, rng))
        noisy[place] = found if images.shape[1] == 3 else _grey(found)
    return noisy


def _as_uint8(values: np.ndarray) -> np.ndarray:
    """From 0 to 1; cut off, not rounded, as in MedMNIST-C, but for what float32 loses of a whole number."""
    return (np.clip(values, 0, 1) * 255 + 1e-4).astype(np.uint8)


def _grey(image: np.ndarray) -> np.ndarray:
    """PIL's grey of red, green and blue along the first axis."""
    red, green, blue = (channel * weight for channel, weight in zip(image.astype(np.int32), _LUMA, strict=True))
    return ((red + green + blue + 0x8000) >> 16).astype(np.uint8)


# Blur.


def _gaussian_blur(images: np.ndarray, width: int, _: Generators) -> np.ndarray:
    return v2.functional.gaussian_blur(torch.from_numpy(images), [width, width]).numpy()


def _defocus_blur(images: np.ndarray, disk: tuple[float, float], _: Generators) -> np.ndarray:
    radius, softness = disk
    reach = np.arange(-8, 9)
    inside = reach[:, None] ** 2 + reach**2 <= radius**2
    kernel = inside / inside.sum()
    edge = np.exp(-0.5 / softness**2)
    for axis in (0, 1):
        kernel = convolve1d(kernel, np.array([edge, 1, edge]) / (1 + 2 * edge), axis, mode="mirror")
    planes = F.pad(torch.from_numpy(images).flatten(0, 1)[:, None].float() / 255, (8, 8, 8, 8), mode="reflect")
    blurred = F.conv2d(planes, torch.from_numpy(kernel).float()[None, None])
    return _as_uint8(blurred.numpy()).reshape(images.shape)


def _motion_blur(images: np.ndarray, trail: tuple[float, float], generators: Generators) -> np.ndarray:
    """ImageMagick's: a trail to one side, whose weights fall as half a normal distribution; edges are continued.

    What it gives in 16 bits is cut off to 8.
    """
    length, spread = 2 * int(np.ceil(trail[0])) + 1, trail[1]
    steps = np.arange(length)
    weights = np.exp(-(steps**2) / (2 * spread**2))
    weights /= weights.sum()
    side = images.shape[-1]
    blurred = np.empty_like(images)
    for place, rng in enumerate(generators):
        angle = np.deg2rad(rng.uniform(-45, 45))
        down, across = (np.ceil(steps * step - 0.5).astype(int) for step in (np.sin(angle), np.cos(angle)))
        padded = np.pad(images[place].astype(np.float32), ((0, 0), (length, length), (length, length)), mode="edge")
        total = np.zeros(images.shape[1:], dtype=np.float32)
        for weight, top, left in zip(weights, length + down, length + across, strict=True):
            total += np.float32(weight) * padded[:, top : top + side, left : left + side]
        blurred[place] = (total + 1e-4).astype(np.uint8)
    return blurred


def _zoom_blur(images: np.ndarray, factors: np.ndarray, _: Generators) -> np.ndarray:
    sharp = torch.from_numpy(images).float() / 255
    side = images.shape[-1]
    total = sharp.clone()
    for factor in factors:
        part = int(np.ceil(side / factor))
        start = (side - part) // 2
        size = round(part * factor)
        middle = sharp[..., start : start + part, start : start + part]
        zoomed = F.interpolate(middle, (size, size), mode="bilinear", align_corners=True)
        trim = (size - side) // 2
        total += zoomed[..., trim : trim + side, trim : trim + side]
    return _as_uint8((total / (len(factors) + 1)).numpy())


# Shades and colours.


def _brightness(images: np.ndarray, factor: float, _: Generators) -> np.ndarray:
    return _blend(np.zeros((), dtype=np.float32), np.arange(256, dtype=np.float32), factor)[images]


def _contrast(images: np.ndarray, factor: float, _: Generators) -> np.ndarray:
    """Around the mean grey of each image, which PIL rounds."""
    greys = images if images.shape[1] == 1 else _grey(np.moveaxis(images, 1, 0))[:, None]
    means = np.floor(greys.mean(axis=(1, 2, 3), keepdims=True) + 0.5).astype(np.float32)
    return _blend(means, images.astype(np.float32), factor)


def _blend(start: np.ndarray, end: np.ndarray, factor: float) -> np.ndarray:
    """PIL's: on the way from `start` to `end`, or beyond it, cut off."""
    return np.clip(start + np.float32(factor) * (end - start), 0, 255).astype(np.uint8)


def _gamma(images: np.ndarray, gamma: float, _: Generators) -> np.ndarray:
    """The table that torchvision has for PIL images."""
    return ((256 - 1e-3) * (np.arange(256) / 255) ** gamma).astype(np.uint8)[images]


def _saturate(images: np.ndarray, more: float, _: Generators) -> np.ndarray:
    """Add to the saturation of hue, saturation and value; what is grey becomes reddish, as its hue is 0."""
    colours = images.astype(np.float32) / 255
    value = colours.max(axis=1, keepdims=True)
    span = value - colours.min(axis=1, keepdims=True)
    saturation = span / np.maximum(value, 1e-12)
    factor = np.minimum(saturation + more, 1) / np.maximum(saturation, 1e-12)
    reddish = value * np.array([1, 1 - more, 1 - more], dtype=np.float32)[:, None, None]
    return _as_uint8(np.where(span == 0, reddish, value - (value - colours) * factor))


# What lies before the image.


def _bubble(images: np.ndarray, most: tuple[int, int], generators: Generators) -> np.ndarray:
    """White discs that are seen through, each in a thin ring that is less so; a later one hides those below it."""
    largest, count = most
    side = images.shape[-1]
    scale = side / _DEFINED_AT
    y, x = np.mgrid[:side, :side]
    covered = np.empty_like(images)
    for place, rng in enumerate(generators):
        number = 7 + int(rng.random() * (count - 6))
        cover = np.zeros((side, side), dtype=np.float32)
        for size, across, down in rng.random((_MOST_BUBBLES, 3))[:number]:
            radius = (3 + int(size * (largest - 2))) * scale
            room = side - 2 * radius
            squared = (x - radius - across * room) ** 2 + (y - radius - down * room) ** 2
            cover[squared <= (radius + 2 * scale) ** 2] = 130 / 255
            cover[squared <= radius**2] = 100 / 255
        covered[place] = np.rint(images[place] + cover * (255 - images[place].astype(np.float32)))
    return covered


def _black_corner(images: np.ndarray, share: float, _: Generators) -> np.ndarray:
    """All beyond a circle around the middle is black, as seen through a dermatoscope."""
    side = images.shape[-1]
    away = np.arange(side) - side // 2
    radius = int(_DEFINED_AT / 2 * share) * side / _DEFINED_AT
    seen = away[:, None] ** 2 + away**2 <= radius**2
    return np.where(seen, images, 0).astype(np.uint8)


CORRUPTIONS = {
    "pixelate": Corruption(_pixelate),
    "jpeg_compression": Corruption(_jpeg),
    "gaussian_noise": Corruption(_gaussian_noise),
    "speckle_noise": Corruption(_speckle_noise),
    "impulse_noise": Corruption(_impulse_noise),
    "shot_noise": Corruption(_shot_noise),
    "gaussian_blur": Corruption(_gaussian_blur),
    "defocus_blur": Corruption(_defocus_blur),
    "motion_blur": Corruption(_motion_blur),
    "zoom_blur": Corruption(_zoom_blur),
    "brightness_up": Corruption(_brightness),
    "brightness_down": Corruption(_brightness),
    "contrast_up": Corruption(_contrast),
    "contrast_down": Corruption(_contrast),
    "gamma_corr_up": Corruption(_gamma),
    "gamma_corr_down": Corruption(_gamma),
    "saturate": Corruption(_saturate, needs_colour=True),
    "bubble": Corruption(_bubble),
    "black_corner": Corruption(_black_corner),
}
# What belongs to a suite and can't be made faithfully here.
NOT_MADE = {
    "stain_deposit": "its ink marks are pictures that only medmnistc has",
    "characters": "it writes in a font that only OpenCV has",
}

_ORGANS = {
    "pixelate": (0.7, 0.6, 0.5, 0.4, 0.35),
    "jpeg_compression": (50, 30, 15, 10, 7),
    "gaussian_noise": (0.04, 0.08, 0.12, 0.16, 0.20),
    "speckle_noise": (0.05, 0.10, 0.20, 0.30, 0.40),
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.08),
    "shot_noise": (200, 100, 50, 25, 15),
    "gaussian_blur": (11, 13, 15, 17, 21),
    "brightness_up": (1.2, 1.3, 1.4, 1.5, 1.6),
    "brightness_down": (0.8, 0.75, 0.7, 0.65, 0.6),
    "contrast_up": (1.3, 1.4, 1.6, 1.7, 1.8),
    "contrast_down": (0.8, 0.7, 0.6, 0.55, 0.5),
    "gamma_corr_up": (1.3, 1.4, 1.6, 1.8, 2.0),
    "gamma_corr_down": (0.9, 0.8, 0.7, 0.6, 0.4),
}
# Per data set of MedMNIST, and for any other images (GENERAL), the parameters of the five severities.
SUITES: dict[str, dict[str, tuple[Any, ...]]] = {
    "pathmnist": {
        "pixelate": (0.8, 0.6, 0.4, 0.3, 0.25),
        "jpeg_compression": (50, 30, 15, 10, 7),
        "defocus_blur": ((3, 0.1), (4, 0.1), (5, 0.2), (6, 0.2), (7, 0.3)),
        "motion_blur": ((5, 5), (10, 5), (15, 5), (15, 8), (15, 12)),
        "brightness_up": (1.1, 1.15, 1.2, 1.22, 1.25),
        "brightness_down": (0.85, 0.8, 0.75, 0.72, 0.7),
        "contrast_up": (1.1, 1.2, 1.3, 1.4, 1.6),
        "contrast_down": (0.8, 0.7, 0.6, 0.55, 0.5),
        "saturate": (0.05, 0.1, 0.15, 0.2, 0.25),
        "stain_deposit": (),
        "bubble": ((7, 15), (10, 15), (12, 15), (15, 20), (17, 25)),
    },
    "bloodmnist": {
        "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),
        "jpeg_compression": (50, 30, 15, 10, 7),
        "defocus_blur": ((2, 0.01), (3, 0.1), (4, 0.1), (5, 0.1), (6, 0.1)),
        "motion_blur": ((3, 3), (5, 5), (10, 5), (10, 7), (10, 9)),
        "brightness_up": (1.1, 1.2, 1.3, 1.35, 1.4),
        "brightness_down": (0.9, 0.8, 0.7, 0.6, 0.5),
        "contrast_up": (1.1, 1.15, 1.2, 1.25, 1.3),
        "contrast_down": (0.9, 0.8, 0.7, 0.6, 0.5),
        "saturate": (0.05, 0.1, 0.15, 0.17, 0.2),
        "stain_deposit": (),
        "bubble": ((5, 10), (7, 10), (10, 10), (12, 12), (15, 12)),
    },
    "dermamnist": {
        "pixelate": (0.7, 0.5, 0.4, 0.3, 0.25),
        "jpeg_compression": (30, 20, 15, 10, 7),
        "gaussian_noise": (0.04, 0.08, 0.12, 0.18, 0.26),
        "speckle_noise": (0.05, 0.15, 0.2, 0.35, 0.45),
        "impulse_noise": (0.01, 0.03, 0.06, 0.09, 0.17),
        "shot_noise": (60, 25, 18, 10, 5),
        "defocus_blur": ((4, 0.1), (5, 0.2), (6, 0.3), (7, 0.4), (8, 0.5)),
        "motion_blur": ((10, 5), (15, 5), (15, 8), (15, 12), (20, 15)),
        "zoom_blur": tuple(
            np.arange(1, end, step)
            for end, step in ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))
        ),
        "brightness_up": (1.1, 1.2, 1.3, 1.4, 1.5),
        "brightness_down": (0.9, 0.8, 0.7, 0.6, 0.5),
        "contrast_up": (1.1, 1.2, 1.3, 1.4, 1.6),
        "contrast_down": (0.8, 0.7, 0.6, 0.5, 0.4),
        "black_corner": (1.1, 1.05, 1.0, 0.95, 0.9),  # medmnistc has .90 before .95
        "characters": (),
    },
    "retinamnist": {
        "pixelate": (0.8, 0.6, 0.5, 0.4, 0.35),
        "jpeg_compression": (30, 25, 20, 10, 5),
        "gaussian_noise": (0.04, 0.08, 0.12, 0.16, 0.2),
        "speckle_noise": (0.1, 0.15, 0.2, 0.25, 0.3),
        "defocus_blur": ((4, 0.1), (5, 0.2), (6, 0.3), (7, 0.4), (8, 0.5)),
        "motion_blur": ((8, 5), (15, 5), (15, 8), (15, 12), (20, 15)),
        "brightness_down": (0.9, 0.8, 0.7, 0.6, 0.5),
        "contrast_down": (0.9, 0.8, 0.7, 0.6, 0.4),
    },
    "tissuemnist": {
        "pixelate": (0.4, 0.3, 0.2, 0.15, 0.1),
        "jpeg_compression": (25, 20, 15, 10, 7),
        "impulse_noise": (0.01, 0.015, 0.02, 0.025, 0.03),
        "gaussian_blur": (13, 15, 17, 21, 25),
        "brightness_up": (1.3, 1.4, 1.5, 1.6, 1.7),
        "brightness_down": (0.8, 0.7, 0.6, 0.5, 0.4),
        "contrast_up": (1.1, 1.2, 1.3, 1.4, 1.6),
        "contrast_down": (0.9, 0.8, 0.7, 0.6, 0.4),
    },
    "octmnist": {
        "pixelate": (0.3, 0.25, 0.2, 0.15, 0.1),
        "jpeg_compression": (30, 15, 10, 7, 5),
        "speckle_noise": (0.15, 0.3, 0.4, 0.5, 0.6),
        "defocus_blur": ((0.5, 0.6), (1, 0.5), (1.5, 0.1), (2.0, 0.5), (2.5, 0.1)),
        "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        "contrast_down": (0.6, 0.4, 0.3, 0.2, 0.15),
    },
    "breastmnist": {
        "pixelate": (0.3, 0.25, 0.2, 0.15, 0.1),
        "jpeg_compression": (50, 30, 15, 10, 7),
        "speckle_noise": (0.1, 0.15, 0.2, 0.25, 0.3),
        "motion_blur": ((5, 5), (9, 7), (9, 10), (13, 10), (17, 12)),
        "brightness_up": (1.4, 1.5, 1.6, 1.8, 2.0),
        "brightness_down": (0.55, 0.5, 0.45, 0.4, 0.3),
        "contrast_down": (0.9, 0.8, 0.7, 0.6, 0.4),
    },
    "chestmnist": {
        "pixelate": (0.3, 0.25, 0.2, 0.15, 0.1),
        "jpeg_compression": (50, 30, 15, 10, 7),
        "gaussian_noise": (0.04, 0.08, 0.12, 0.18, 0.26),
        "speckle_noise": (0.05, 0.15, 0.2, 0.35, 0.45),
        "impulse_noise": (0.01, 0.03, 0.06, 0.09, 0.17),
        "shot_noise": (60, 25, 18, 10, 5),
        "gaussian_blur": (3, 5, 7, 9, 11),
        "brightness_up": (1.1, 1.2, 1.3, 1.4, 1.5),
        "brightness_down": (0.9, 0.8, 0.7, 0.6, 0.5),
        "contrast_up": (1.1, 1.2, 1.3, 1.4, 1.6),
        "contrast_down": (0.9, 0.8, 0.7, 0.6, 0.4),
        "gamma_corr_up": (1.1, 1.2, 1.3, 1.4, 1.6),
        "gamma_corr_down": (0.9, 0.8, 0.7, 0.6, 0.4),
    },
    "pneumoniamnist": {
        "pixelate": (0.8, 0.7, 0.6, 0.5, 0.4),
        "jpeg_compression": (50, 30, 15, 10, 7),
        "gaussian_noise": (0.04, 0.05, 0.06, 0.07, 0.08),
        "speckle_noise": (0.05, 0.07, 0.1, 0.15, 0.2),
        "impulse_noise": (0.005, 0.01, 0.013, 0.017, 0.02),
        "shot_noise": (300, 200, 150, 100, 80),
        "gaussian_blur": (3, 5, 7, 9, 11),
        "brightness_up": (1.1, 1.2, 1.3, 1.4, 1.5),
        "brightness_down": (0.9, 0.8, 0.7, 0.6, 0.5),
        "contrast_up": (1.1, 1.2, 1.3, 1.4, 1.6),
        "contrast_down": (0.9, 0.8, 0.7, 0.6, 0.4),
        "gamma_corr_up": (1.1, 1.2, 1.3, 1.4, 1.6),
        "gamma_corr_down": (0.9, 0.8, 0.7, 0.6, 0.4),
    },
    "organamnist": _ORGANS,
    "organcmnist": _ORGANS,
    "organsmnist": _ORGANS,
    # No data set's own: what most cameras and scanners may do, from mild to hard.
    GENERAL: {
        "pixelate": (0.8, 0.7, 0.6, 0.5, 0.4),
        "jpeg_compression": (50, 30, 15, 10, 7),
        "gaussian_noise": (0.04, 0.08, 0.12, 0.18, 0.26),
        "impulse_noise": (0.01, 0.03, 0.06, 0.09, 0.17),
        "shot_noise": (60, 25, 18, 10, 5),
        "gaussian_blur": (3, 5, 7, 9, 11),
        "motion_blur": ((3, 1), (5, 2), (7, 3), (9, 4), (11, 5)),
        "brightness_up": (1.1, 1.2, 1.3, 1.4, 1.5),
        "brightness_down": (0.9, 0.8, 0.7, 0.6, 0.5),
        "contrast_up": (1.1, 1.2, 1.3, 1.4, 1.6),
        "contrast_down": (0.9, 0.8, 0.7, 0.6, 0.4),
        "saturate": (0.05, 0.1, 0.15, 0.2, 0.25),
    },
}
