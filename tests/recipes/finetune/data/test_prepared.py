"""Prepared images: their pixels, and what is left of them when a process is stopped."""

from __future__ import annotations

import io
import multiprocessing
import resource
import sys
import time
from multiprocessing.context import ForkProcess
from pathlib import Path

import datasets
import numpy as np
import psutil
import pytest
from finetune.data import prepared
from finetune.data.catalogue import EncodedImages
from finetune.data.prepared import prepare
from finetune.data.squares import Form
from finetune.errors import InputError, exit_on_input_error
from finetune.sources.nih_tree import read_nih_tree
from PIL import Image
from small_trees import image_path, make_tree


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "tree")


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "SHARD", 16)
    monkeypatch.setattr(prepared, "_BATCH", 4)


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def start(tree: Path, folder: Path, workers: int = 0, file_limit: int | None = None) -> ForkProcess:
    """Prepare in another process, which writes what it has to say to <folder>.<its number>.txt."""

    def run() -> None:
        sys.stderr = Path(f"{folder}.{multiprocessing.current_process().pid}.txt").open("w", buffering=1)  # noqa: SIM115
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
        source = read_nih_tree(tree, allow_missing=False).images
        exit_on_input_error(lambda: prepare(source, Form(64), folder, workers))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def finish(process: ForkProcess, code: int = 0) -> None:
    process.join(timeout=120)
    assert process.exitcode == code


def opened(path: Path) -> Image.Image:
    """An image, read from its file, which is closed again."""
    with Image.open(path) as image:
        image.load()
        return image


def told(folder: Path) -> list[str]:
    return [path.read_text() for path in folder.parent.glob(f"{folder.name}.*.txt")]


def content(folder: Path) -> dict[str, bytes]:
    """All that lies in a folder of prepared images, but for the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


def test_pixels_are_those_of_pil(shared_file, tmp_path: Path) -> None:
    """Grey and RGBA files alike give, to the bit, what PIL gives for them in RGB, which most scripts resize."""
    folder = shared_file("data/nih-mini")
    xrays = read_nih_tree(folder, allow_missing=False)
    modes = []
    for path in xrays.images.paths:
        with Image.open(path) as image:
            modes.append(image.mode)
    rows = [modes.index("L"), *(row for row, mode in enumerate(modes) if mode == "RGBA"), len(modes) - 1]
    assert len(rows) > 5
    images = prepare(_Some(xrays.images, rows), Form(96), tmp_path / "prepared", workers=0)
    for k, row in enumerate(rows):
        with Image.open(xrays.images.paths[row]) as image:
            expected = np.asarray(image.convert("RGB").resize((96, 96), Image.Resampling.BILINEAR))
        for channel in range(3):
            np.testing.assert_array_equal(images[[k]][0, 0], expected[:, :, channel])


@pytest.mark.slow
def test_every_image_of_a_real_tree_is_what_pil_gives(shared_file, tmp_path: Path) -> None:
    xrays = read_nih_tree(shared_file("data/nih-mini"), allow_missing=False)
    images = prepare(xrays.images, Form(256), tmp_path / "prepared", workers=0)
    assert not images.absent()
    for row, path in enumerate(xrays.images.paths):
        with Image.open(path) as image:
            expected = np.asarray(image.convert("RGB").resize((256, 256), Image.Resampling.BILINEAR))[:, :, 0]
        np.testing.assert_array_equal(images[[row]][0, 0], expected)


class _Some:
    """Some rows of a source."""

    def __init__(self, source: EncodedImages, rows: list[int]) -> None:
        self.source, self.rows = source, rows

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, row: int) -> str:
        return self.source.key(self.rows[row])

    def read(self, row: int) -> bytes | None:
        return self.source.read(self.rows[row])


def test_rows_are_read_in_any_order(tree: Path, tmp_path: Path, small_files: None) -> None:
    source = read_nih_tree(tree, allow_missing=False).images
    images = prepare(source, Form(24), tmp_path / "prepared", workers=0)
    assert images.shape == (60, 1, 24, 24)
    everything = np.stack([np.asarray(opened(path))[None] for path in source.paths])
    rows = np.random.default_rng(1).permutation(60)
    np.testing.assert_array_equal(images[rows.tolist()], everything[rows])
    part = images.select(rows[:20])
    assert part.shape == (20, 1, 24, 24)
    np.testing.assert_array_equal(part[[3, 3, 0]], everything[rows[[3, 3, 0]]])
    np.testing.assert_array_equal(part.select(np.array([4, 1]))[[1]], everything[rows[[1]]])
    assert images[[]].shape == (0, 1, 24, 24)


def test_files_open_with_the_datasets_library(tree: Path, tmp_path: Path, small_files: None) -> None:
    prepare(read_nih_tree(tree, allow_missing=False).images, Form(24), tmp_path / "prepared", workers=0)
    files = sorted((tmp_path / "prepared").glob("*.arrow"))
    data = datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in files])
    assert data.features == prepared.FEATURES
    assert len(data) == 60
    row = data[7]
    assert (len(row["image"]), row["width"], row["height"], row["reason"]) == (24 * 24, 24, 24, None)


def test_prepared_images_are_found_again(tree: Path, tmp_path: Path, small_files: None) -> None:
    """Nothing is written a second time; a changed image makes its file anew, another size all of them."""
    folder = tmp_path / "prepared"

    def prepare_again(side: int = 24) -> set[str]:
        before = {path.name for path in folder.glob("*")}
        prepare(read_nih_tree(tree, allow_missing=False).images, Form(side), folder, workers=0)
        return {path.name for path in folder.glob("*.arrow")} - before

    assert len(prepare_again()) == 4
    assert not prepare_again()
    changed = image_path(tree, "00000010_000.png")
    changed.write_bytes(encoded(Image.new("L", (24, 24), 5)))
    assert [name[:5] for name in prepare_again()] == ["00001"]
    assert len(prepare_again(side=12)) == 4


def test_the_number_of_processes_changes_nothing(tree: Path, tmp_path: Path, small_files: None) -> None:
    source = read_nih_tree(tree, allow_missing=False).images
    for workers in (0, 2):
        prepare(source, Form(24), tmp_path / str(workers), workers)
    assert content(tmp_path / "0") == content(tmp_path / "2")


def test_a_damaged_file_is_told(tree: Path, tmp_path: Path, small_files: None) -> None:
    source, folder = read_nih_tree(tree, allow_missing=False).images, tmp_path / "prepared"
    prepare(source, Form(24), folder, workers=0)
    path = sorted(folder.glob("*.arrow"))[1]
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(InputError, match=f"{path.name}.* delete it and give the same command again"):
        prepare(source, Form(24), folder, workers=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_several_moments_it_goes_on(tmp_path: Path, small_files: None, workers: int) -> None:
    """The same command, killed when it has begun its first, third and sixth file, ends with the same bytes.

    No worker outlives the killed process.
    """
    tree = make_tree(tmp_path / "tree", patients=60, side=300)
    finish(start(tree, tmp_path / "whole", workers))
    whole, folder = content(tmp_path / "whole"), tmp_path / "killed"
    assert len(whole) == 8
    for moment in (1, 3, 6):
        process = start(tree, folder, workers)
        while process.is_alive() and len(list(folder.glob("*.arrow*"))) < moment:
            time.sleep(0.001)
        workers_of = psutil.Process(process.pid).children()
        process.kill()
        process.join()
        assert not psutil.wait_procs(workers_of, timeout=20)[1]
        files = {path.name: path.read_bytes() for path in folder.glob("*.arrow")}
        assert len(files) < len(whole)
        assert files.items() <= whole.items()
    finish(start(tree, folder, workers))
    assert content(folder) == whole


def test_two_at_once_share_the_work(tmp_path: Path, small_files: None) -> None:
    """One prepares while the other waits, and both find the same images."""
    tree, folder = make_tree(tmp_path / "tree", patients=60, side=300), tmp_path / "shared"
    finish(start(tree, tmp_path / "alone"))
    for process in [start(tree, folder), start(tree, folder)]:
        finish(process)
    assert sum("Preparing 120 images" in text for text in told(folder)) == 1
    assert content(folder) == content(tmp_path / "alone")


def test_a_full_disk_is_told_in_one_sentence(tree: Path, tmp_path: Path, small_files: None) -> None:
    """Nothing half-written remains, and with room the same command ends as usual."""
    folder = tmp_path / "prepared"
    finish(start(tree, folder, 0, file_limit=50_000), code=2)
    (errors,) = told(folder)
    assert errors.splitlines()[-1].startswith("error: prepared images can't be written to")
    assert "make room or choose another --prepared-dir" in errors.splitlines()[-1]
    assert not content(folder)
    finish(start(tree, folder))
    assert len(content(folder)) == 4
