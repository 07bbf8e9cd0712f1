"""Images that can't be trusted, and prepared ones that a disk has spoiled: none is trained on without a word."""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import chestxray
import numpy as np
import pytest
from attacking import time_limit
from finetune.data import prepared
from finetune.data.catalogue import ImageFiles
from finetune.data.opening import Unreadable, open_image
from finetune.data.prepared import PreparedImages, prepare
from finetune.data.squares import Form
from finetune.errors import InputError
from finetune.sources.nih_tree import read_nih_tree
from PIL import Image
from small_runs import run_recipe
from small_trees import case_names, image_path, make_tree

SIDE = 24
QUICK = ["--model", "test_resnet", "--no-pretrained", "--image-size", "16", "--epochs", "1", "--inmerge-epochs", "1"]
QUICK += ["--data-dir", "tree", "--prepared-dir", "prepared", "--prepare-workers", "0", "--batch-size", "16"]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "tree", side=SIDE)


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "SHARD", 16)
    monkeypatch.setattr(prepared, "_BATCH", 4)


def prepare_tree(tree: Path, workers: int = 0) -> PreparedImages:
    return prepare(
        read_nih_tree(tree, allow_missing=False).images, Form(SIDE, grey=True), tree.parent / "prepared", workers
    )


def read_all(images: PreparedImages) -> np.ndarray:
    return images[list(range(images.shape[0]))]


# What damages a file of prepared images.


def zero(start: int, end: int) -> Callable[[Path], None]:
    """Zeroed bytes, by sixteenths of the file."""

    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        first, last = len(content) * start // 16, len(content) * end // 16
        content[first:last] = bytes(last - first)
        path.write_bytes(content)

    return damage


def flip_a_bit(path: Path) -> None:
    """In the pixels of an image."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def exchange(path: Path) -> None:
    other = sorted(path.parent.glob("*.arrow"))[0]
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)


@pytest.mark.parametrize(
    "damage",
    [
        *(zero(start, start + 1) for start in range(16)),
        zero(0, 16),
        flip_a_bit,
        exchange,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(path.read_bytes()[:3000]),
        lambda path: path.write_bytes(b"\x80\x04" + path.read_bytes()),
    ],
)
def test_damaged_pixels_are_never_returned(tree: Path, damage: Callable[[Path], None]) -> None:
    """Either they are as they were, or a sentence names the file, and without it they are made anew."""
    whole = read_all(prepare_tree(tree))
    path = sorted((tree.parent / "prepared").glob("*.arrow"))[1]
    damage(path)
    refusal = None
    try:
        found = read_all(prepare_tree(tree))
    except InputError as error:
        refusal = str(error)
        for file in path.parent.glob("*.arrow"):
            file.unlink()
        found = read_all(prepare_tree(tree))
    np.testing.assert_array_equal(found, whole)
    assert refusal is None or re.search(
        r"\.arrow is damaged \(.*\): delete it and give the same command again", refusal
    )


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_trial_ends_at_a_damaged_image(attack: Callable[..., str], tree: Path, workers: str) -> None:
    """In loader workers too; once it was trained on zeros, as if they were a chest."""
    folder = tree.parent / "prepared" / f"chestxray14-{SIDE}px"
    prepare(read_nih_tree(tree, allow_missing=False).images, Form(SIDE, grey=True), folder, workers=0)
    path = sorted(folder.glob("*.arrow"))[1]
    flip_a_bit(path)
    arguments = [*QUICK, "--prepare-size", str(SIDE), "--output", "run", "--workers", workers]
    message = attack(*arguments, recipe=chestxray.main, may_change="run")
    assert f"{path.name} is damaged (an image has another checksum)" in message


# Errors that pass, and verdicts that stay.


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "I/O error"), MemoryError()])
def test_an_error_that_passes_is_not_remembered(tree: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    whole = read_all(
        prepare(read_nih_tree(tree, False).images, Form(SIDE, grey=True), tree.parent / "whole", workers=0)
    )
    real = ImageFiles.read

    def failing(self: ImageFiles, row: int) -> bytes | None:
        if row == 20:
            raise error
        return real(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(ImageFiles, "read", failing)
        with pytest.raises(InputError, match=r"image 21 of 60 can't be read now \(.*\): mend that and give the same"):
            prepare_tree(tree)
    found = prepare_tree(tree)
    assert not found.absent()
    np.testing.assert_array_equal(read_all(found), whole)


def test_memory_that_ran_out_while_decoding_is_no_verdict(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", out_of_memory)
        with pytest.raises(InputError, match="image 1 of 60 can't be read now"):
            prepare_tree(tree)
    assert not prepare_tree(tree).absent()


def png(width: int, height: int) -> bytes:
    """A PNG that says how large it is, and has nothing to show."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(canary) (w) file closefile\nshowpage\n"


def saved(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("L", (40, 40)).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (EPS, "is no PNG, JPEG"),
        (saved("PDF"), "is no PNG, JPEG"),
        (b"\x80\x04cos\nsystem\n", "is no PNG, JPEG"),
        (png(40, 40), "is damaged: "),
        (png(12_000, 12_000), "has more than 89,478,485 pixels"),
        (png(2**31 - 1, 2**31 - 1), "has more than 89,478,485 pixels"),
        (png(0, 0), "is no PNG, JPEG"),
    ],
    ids=["EPS", "PDF", "pickle", "empty", "large", "bomb", "no size"],
)
def test_only_images_of_a_sane_size_are_decoded(content: bytes, reason: str, monkeypatch) -> None:
    """PIL would hand an EPS to Ghostscript, whatever the file is called."""
    monkeypatch.setattr("subprocess.Popen", None)
    with time_limit(), pytest.raises(Unreadable, match=reason):
        open_image(content, "file")


def to_fifo(path: Path) -> None:
    os.mkfifo(path)


def to_itself(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize(
    "put",
    [
        to_fifo,
        to_itself,
        Path.mkdir,
        lambda path: path.symlink_to("nowhere"),
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to("/dev/stdin"),
        lambda path: path.symlink_to("/"),
    ],
    ids=["FIFO", "link to itself", "folder", "dangling link", "endless device", "standard input", "link to a folder"],
)
def test_what_is_no_file_is_named_and_left_out(
    attack: Callable[..., str], tree: Path, put: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    case = case_names(30)[5]
    path = image_path(tree, case)
    path.unlink()
    put(path)
    arguments = [*QUICK, "--prepare-only"]
    assert f"1 of 60 images are neither files in tree/images_*/images nor in tree/images ({case})" in attack(
        *arguments, recipe=chestxray.main
    )
    with time_limit():
        run_recipe(*arguments, "--allow-missing", recipe=chestxray.main)
    assert "20 in test" in capsys.readouterr().out


def test_a_link_to_a_file_is_an_image(tree: Path) -> None:
    path = image_path(tree, case_names(30)[5])
    path.rename(tree / "elsewhere.png")
    path.symlink_to(tree / "elsewhere.png")
    assert not prepare_tree(tree).absent()


# What is prepared again.


def test_touched_images_are_not_decoded_again(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor those beside a changed one; and what is no longer used is told of."""
    whole = read_all(prepare_tree(tree))
    decoded = []
    real = prepared.make_square
    monkeypatch.setattr(prepared, "make_square", lambda *args: decoded.append(args) or real(*args))
    for case in case_names(30):
        os.utime(image_path(tree, case), (1, 1))
    capsys.readouterr()
    np.testing.assert_array_equal(read_all(prepare_tree(tree)), whole)
    assert not decoded
    assert f"4 files in {tree.parent / 'prepared'}, 0.0 GB, are of earlier preparations" in capsys.readouterr().err
    changed = 20
    Image.new("L", (SIDE, SIDE), 5).save(image_path(tree, case_names(30)[changed]))
    found = read_all(prepare_tree(tree))
    assert len(decoded) == 1
    assert (found[changed] == 5).all()
    np.testing.assert_array_equal(np.delete(found, changed, axis=0), np.delete(whole, changed, axis=0))


def test_damaged_pixels_are_not_copied(tree: Path) -> None:
    whole = read_all(prepare_tree(tree))
    flip_a_bit(sorted((tree.parent / "prepared").glob("*.arrow"))[1])
    for case in case_names(30):
        os.utime(image_path(tree, case), (1, 1))
    np.testing.assert_array_equal(read_all(prepare_tree(tree)), whole)
