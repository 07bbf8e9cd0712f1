"""Corruptions are the same to the bit whenever and wherever they are made, and the severer, the further from clean."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from finetune.data.corruptions import CORRUPTIONS, GENERAL, NOT_MADE, SEVERITIES, SUITES, corrupt, suite_for
from finetune.data.images import resize
from finetune.sources.digits import load_digits_data
from PIL import Image

CHANCE = ("gaussian_noise", "speckle_noise", "shot_noise", "impulse_noise", "motion_blur", "bubble")


def images_like_nature(count: int, channels: int, side: int) -> np.ndarray:
    """Random images whose coarse structure is strong and whose fine structure is weak, as that of photographs."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)) * side
    waves = np.fft.fft2(rng.normal(size=(count, channels, side, side))) / np.maximum(frequency, 1) ** 1.3
    plain = np.fft.ifft2(waves).real
    plain -= plain.mean(axis=(1, 2, 3), keepdims=True)
    return np.clip(128 + 45 * plain / plain.std(axis=(1, 2, 3), keepdims=True), 0, 255).astype(np.uint8)


def cases_of(images: np.ndarray) -> list[str]:
    return [f"case {k}" for k in range(len(images))]


def distances(images: np.ndarray, name: str, parameters: tuple[object, ...]) -> list[float]:
    """Mean absolute difference to the clean images, per severity."""
    changed = [corrupt(images, cases_of(images), name, parameter) for parameter in parameters]
    return [float(np.abs(found.astype(int) - images).mean()) for found in changed]


def assert_distances_grow(images: np.ndarray, suite: str) -> None:
    """With each severity, but for what MedMNIST-C's own definition does: see below."""
    for name, parameters in suite_for(suite, images.shape[1]).severities.items():
        found = np.array([0, *distances(images, name, parameters)])
        assert found[-1] > found[1] > 0.3, name
        steps = np.diff(found)
        if name == "pixelate" and images.shape[-1] < 64:
            # 16 blocks of a side of 28 are uneven, which PIL makes of whole pixels, and 14 are even.
            assert (steps > -0.2 * found[1:]).all(), (name, found)
        elif name == "motion_blur":
            assert (steps >= 0).all(), (name, found)  # (10, 5) and (15, 5) differ by less than a rounding
        else:
            assert (steps > 0).all(), (name, found)


@pytest.mark.parametrize("suite", SUITES)
def test_distance_grows_with_severity_on_made_images(suite: str) -> None:
    channels = 3 if "saturate" in SUITES[suite] or "zoom_blur" in SUITES[suite] else 1
    assert_distances_grow(images_like_nature(6, channels, 64), suite)


@pytest.mark.parametrize("name", ["pneumoniamnist", "breastmnist"])
def test_distance_grows_with_severity_on_real_images(name: str, shared_file: Callable[[str], Path]) -> None:
    with np.load(shared_file(f"data/medmnist/{name}.npz")) as arrays:
        assert_distances_grow(arrays["test_images"][:48, None], name)


def test_distance_grows_with_severity_on_radiographs(shared_file: Callable[[str], Path]) -> None:
    paths = sorted(shared_file("data/nih-mini").glob("images_*/images/*.png"))[:6]
    radiographs = [np.asarray(Image.open(path).convert("L").resize((96, 96))) for path in paths]
    assert_distances_grow(np.stack(radiographs)[:, None], "chestmnist")


def test_distance_grows_with_severity_on_digits() -> None:
    assert_distances_grow(load_digits_data(28, 0).test.images[:48], GENERAL)


def all_of(images: np.ndarray, cases: list[str]) -> dict[str, np.ndarray]:
    suites = [suite_for(name, images.shape[1]).severities for name in SUITES]
    parameters = {name: values for suite in suites for name, values in suite.items()}
    return {name: corrupt(images, cases, name, values[2]) for name, values in parameters.items()}


def test_every_corruption_gives_uint8_images_of_the_same_shape() -> None:
    for channels in (1, 3):
        images = images_like_nature(3, channels, 32)
        before = images.copy()
        for name, changed in all_of(images, cases_of(images)).items():
            assert (changed.dtype, changed.shape) == (np.uint8, images.shape), name
        np.testing.assert_array_equal(images, before)


def test_an_image_is_changed_alike_in_any_company() -> None:
    """What chance decides depends on the corruption and the case alone."""
    images = images_like_nature(4, 3, 32)
    cases = cases_of(images)
    together, turned = all_of(images, cases), all_of(images[::-1].copy(), cases[::-1])
    for name, changed in together.items():
        np.testing.assert_array_equal(changed, turned[name][::-1], err_msg=name)
    other = all_of(images, [f"another {case}" for case in cases])
    assert {name for name in together if not np.array_equal(together[name], other[name])} == set(CHANCE)


DIGEST = """
import hashlib, sys
sys.path[:0] = sys.argv[1:]
from test_corruptions import all_of, cases_of, images_like_nature
images = images_like_nature(3, 3, 32)
print(hashlib.sha256(b"".join(found.tobytes() for found in all_of(images, cases_of(images)).values())).hexdigest())
"""


def test_another_process_makes_the_same_to_the_bit() -> None:
    images = images_like_nature(3, 3, 32)
    here = [
        hashlib.sha256(b"".join(found.tobytes() for found in all_of(images, cases_of(images)).values())).hexdigest()
        for _ in range(2)
    ]
    recipes = str(Path(__file__).parents[4] / "recipes")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DIGEST, str(Path(__file__).parent), recipes]
    there = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    assert here == [there, there]


def test_what_noise_does_to_grey_images_is_what_medmnistc_does() -> None:
    """It is drawn for three channels, of which a grey image is made again: its spread is that of their weighted sum."""
    images = np.full((20, 1, 64, 64), 128, dtype=np.uint8)
    changed = corrupt(images, cases_of(images), "gaussian_noise", 0.1)
    assert changed.std() == pytest.approx(255 * 0.1 * np.sqrt(0.299**2 + 0.587**2 + 0.114**2), rel=0.02)
    colour = corrupt(np.repeat(images, 3, axis=1), cases_of(images), "gaussian_noise", 0.1)
    assert colour.std() == pytest.approx(255 * 0.1, rel=0.02)


def test_the_share_of_impulses_is_that_of_the_parameter() -> None:
    images = np.full((20, 3, 64, 64), 128, dtype=np.uint8)
    changed = corrupt(images, cases_of(images), "impulse_noise", 0.06)
    assert (changed != 128).mean() == pytest.approx(0.06, rel=0.05)
    assert set(np.unique(changed)) == {0, 128, 255}


def test_motion_blurs_along_a_line_and_keeps_flat_images() -> None:
    flat = np.full((1, 1, 40, 40), 77, dtype=np.uint8)
    np.testing.assert_array_equal(corrupt(flat, ["a"], "motion_blur", (15, 8)), flat)
    dot = np.zeros((1, 1, 41, 41), dtype=np.uint8)
    dot[..., 20, 20] = 255
    rows, columns = np.nonzero(corrupt(dot, ["a"], "motion_blur", (10, 5))[0, 0])
    assert len(rows) > 8
    assert np.abs(np.corrcoef(rows, columns)[0, 1]) > 0.9 or min(np.ptp(rows), np.ptp(columns)) <= 1
    assert max(np.ptp(rows), np.ptp(columns)) <= 20


@pytest.mark.parametrize("name", ["brightness_up", "contrast_up", "gamma_corr_up", "saturate"])
def test_a_change_of_shades_by_nothing_changes_nothing(name: str) -> None:
    images = images_like_nature(2, 3, 32)
    changed = corrupt(images, cases_of(images), name, 0.0 if name == "saturate" else 1.0)
    assert np.abs(changed.astype(int) - images).max() <= 1


def test_suites_name_what_is_left_out_and_why() -> None:
    assert set(NOT_MADE) == {name for suite in SUITES.values() for name in suite} - set(CORRUPTIONS)
    for name, listed in SUITES.items():
        assert {len(values) for found, values in listed.items() if found not in NOT_MADE} == {len(SEVERITIES)}
        suite = suite_for(name, 3)
        assert suite.severities.keys() | suite.left_out.keys() == listed.keys()
    assert suite_for("dermamnist", 3).left_out == {"characters": NOT_MADE["characters"]}
    assert suite_for(GENERAL, 1).left_out == {"saturate": "it needs colours"}
    assert not suite_for("chestmnist", 1).left_out


def test_bubbles_and_corners_keep_their_share_of_the_image() -> None:
    for name, parameter in (("bubble", (12, 15)), ("black_corner", 0.95)):
        small, large = (np.full((8, 3, side, side), 60, dtype=np.uint8) for side in (56, 224))
        shares = [(corrupt(images, cases_of(images), name, parameter) != 60).mean() for images in (small, large)]
        assert shares[0] == pytest.approx(shares[1], rel=0.15), name


def test_small_images_are_resized_ahead() -> None:
    """At the smallest size that is allowed every corruption still works."""
    images = resize(images_like_nature(2, 3, 32), 16)
    assert all(found.shape == images.shape for found in all_of(images, cases_of(images)).values())
