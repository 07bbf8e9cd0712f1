"""How far the corruptions here are from those of medmnistc itself, on the same images.

medmnistc is no dependency: it pins old versions and needs ImageMagick. To compare, put it and what it imports into a
folder of its own, and name that folder:

    pip install --no-deps --target MEDMNISTC medmnistc opencv-python-headless wand
    python benchmarks/corruptions_vs_medmnistc.py --medmnistc MEDMNISTC --images DATA

Each row has, per severity, the mean absolute difference of grey levels (0 to 255) between both results, and below it
how far medmnistc's own results are from the clean images. Where chance plays a part, the draws differ: the row then
compares how far either is from the clean images, as medmnistc's distance minus the one here. Motion blur is compared
where ImageMagick is installed, with the same angles.
"""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
from finetune.data.corruptions import NOT_MADE, SUITES, case_generator, corrupt
from finetune.data.images import resize
from PIL import Image
from skimage import data

RANDOM = ("gaussian_noise", "speckle_noise", "impulse_noise", "shot_noise", "bubble")
COLOURED = ("pathmnist", "bloodmnist", "dermamnist", "retinamnist")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--medmnistc", type=Path, required=True, help="the folder that medmnistc is installed in")
    parser.add_argument("--images", type=Path, required=True, help="the folder that holds medmnist/ and nih-mini/")
    parser.add_argument("--count", type=int, default=8, help="images of each kind")
    options = parser.parse_args()
    sys.path.append(str(options.medmnistc))
    has_magick = _stub_what_is_missing()
    from medmnistc.corruptions.registry import CORRUPTIONS_DS

    images = {name: real_images(options.images, name, options.count) for name in SUITES if name in CORRUPTIONS_DS}
    print(f"{'set':15} {'corruption':17} {'images':>12} {'':4} {'mean absolute difference at severities 1 to 5':>48}")
    for name, (pixels, kind) in images.items():
        for corruption, parameters in SUITES[name].items():
            if corruption in NOT_MADE or (corruption == "motion_blur" and not has_magick):
                print(f"{name:15} {corruption:17} {kind:>12}      {NOT_MADE.get(corruption, 'ImageMagick is missing')}")
                continue
            theirs = CORRUPTIONS_DS[name][corruption]
            ours, reference = [], []
            for severity, parameter in enumerate(parameters):
                ours.append(corrupt(pixels, cases_of(pixels), corruption, parameter))
                reference.append(medmnistc_images(theirs, pixels, corruption, severity))
            away = [distance(found, pixels) for found in reference]
            if corruption in RANDOM:
                apart = [there - distance(here, pixels) for there, here in zip(away, ours, strict=True)]
            else:
                apart = [distance(there, here) for there, here in zip(reference, ours, strict=True)]
            print(f"{name:15} {corruption:17} {kind:>12} diff {numbers(apart)}")
            print(f"{'':15} {'':17} {'':>12} away {numbers(away)}")


def _stub_what_is_missing() -> bool:
    """Let medmnistc be imported without ImageMagick; whether it is there."""
    try:
        import wand.api
        import wand.image  # noqa: F401
    except ImportError:
        for name in ("wand", "wand.image", "wand.api"):
            sys.modules[name] = types.ModuleType(name)
        sys.modules["wand.image"].Image = object
        sys.modules["wand.api"].library = None
        return False
    return True


def real_images(folder: Path, name: str, count: int) -> tuple[np.ndarray, str]:
    """Images at 224 px in the colours of that set, uint8 (N, 1 or 3, 224, 224), and what they are."""
    if name in COLOURED:
        photographs = [data.retina(), data.immunohistochemistry(), data.astronaut(), data.coffee()]
        squares = [np.asarray(Image.fromarray(photo).resize((224, 224))) for photo in photographs[:count]]
        return np.ascontiguousarray(np.moveaxis(np.stack(squares), -1, 1)), "skimage's"
    if name in ("pneumoniamnist", "breastmnist"):
        with np.load(folder / "medmnist" / f"{name}.npz") as arrays:
            return resize(arrays["test_images"][:count, None], 224), "own, of 28"
    paths = sorted((folder / "nih-mini").glob("images_*/images/*.png"))[:count]
    radiographs = [np.asarray(Image.open(path).convert("L").resize((224, 224))) for path in paths]
    return np.stack(radiographs)[:, None], "nih-mini"


def medmnistc_images(corruption: object, pixels: np.ndarray, name: str, severity: int) -> np.ndarray:
    """What medmnistc makes of the images, as its DatasetManager does it."""
    np.random.seed(0)  # noqa: NPY002 - medmnistc draws from it
    if name == "impulse_noise":
        corruption.rng = np.random.default_rng(0)
    found = []
    for image, case in zip(pixels, cases_of(pixels), strict=True):
        colour = np.moveaxis(np.broadcast_to(image, (3, *image.shape[1:])), 0, -1)
        with same_angle(name, case):
            changed = Image.fromarray(corruption.apply(Image.fromarray(np.ascontiguousarray(colour)), severity))
        found.append(
            np.asarray(changed.convert("L"))[None] if len(image) == 1 else np.moveaxis(np.asarray(changed), -1, 0)
        )
    return np.stack(found)


@contextmanager
def same_angle(name: str, case: str) -> Iterator[None]:
    """Let medmnistc draw the angle of motion that is drawn here, and read bytes by a name that numpy has dropped."""
    if name != "motion_blur":
        yield
        return
    angle = case_generator(name, case).uniform(-45, 45)
    with (
        mock.patch("numpy.random.uniform", return_value=angle),
        mock.patch("numpy.fromstring", np.frombuffer, create=True),
    ):
        yield


def cases_of(pixels: np.ndarray) -> list[str]:
    return list(map(str, range(len(pixels))))


def distance(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first.astype(float) - second).mean())


def numbers(values: list[float]) -> str:
    return " ".join(f"{value:8.3f}" for value in values)


if __name__ == "__main__":
    main()
