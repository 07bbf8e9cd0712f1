"""Files that are no weights, or more than weights, as --checkpoint of the recipes and of ``inmerge inspect``."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from attacking import snapshot, time_limit
from malicious_files import WritesAFile, legacy_file_of_torch, plain_zip, raw_pickle, zip_of_torch
from torch import Tensor

from inmerge_optim import cli

MODEL = "test_resnet"
RECIPE = ["--dataset", "digits", "--model", MODEL, "--image-size", "16", "--output", "run"]


def safetensors(header: object, content: bytes = b"", size: int | None = None) -> bytes:
    """A file of that format whose header says what it likes, also of its own size."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + content


def entry(kind: str = "F32", shape: tuple[int, ...] = (16, 3, 3, 3), offsets: tuple[int, int] = (0, 1728)) -> dict:
    return {"conv1.0.weight": {"dtype": kind, "shape": shape, "data_offsets": offsets}}


def weights(change: Callable[[dict[str, Tensor]], object] = lambda weights: None) -> dict[str, Tensor]:
    found = timm.create_model(MODEL).state_dict()
    change(found)
    return found


def stem(value: Tensor) -> dict[str, Tensor]:
    return weights(lambda found: found.update({"conv1.0.weight": value}))


STEM = (16, 3, 3, 3)
CODE = {"conv1.0.weight": WritesAFile(Path("canary"))}
MORE = "holds no weights, or more than weights"
# Headers of safetensors that lie.
LIES = {
    "a header of 2^60 bytes": safetensors(entry(), bytes(1728), size=2**60),
    "a header of 2^64 - 1 bytes": safetensors(entry(), bytes(1728), size=2**64 - 1),
    "no header": safetensors(b""),
    "a header that is no JSON": safetensors(b"{" * 1000),
    "a nested header": safetensors(b"[" * 100_000),
    "a header in another encoding": safetensors(b'{"\xff": 1}'),
    "a shape of more than there is": safetensors(entry(shape=(2**40, 3, 3, 3)), bytes(1728)),
    "a shape that overflows": safetensors(entry(shape=(2**63, 2, 1, 1)), bytes(1728)),
    "offsets beyond the end": safetensors(entry(offsets=(0, 2**40)), bytes(1728)),
    "offsets backwards": safetensors(entry(offsets=(1728, 0)), bytes(1728)),
    "negative offsets": safetensors(entry(offsets=(-1728, 0)), bytes(1728)),
    "an unknown kind": safetensors(entry(kind="OBJECT"), bytes(1728)),
    "two tensors in one place": safetensors(entry() | {"x": entry()["conv1.0.weight"]}, bytes(1728)),
    "bytes that nobody names": safetensors(entry(), bytes(5000)),
}
ATTACKS = {
    **{name: (content, "can't be read as weights") for name, content in LIES.items()},
    "a pickle with code": (raw_pickle(CODE), MORE),
    "a file of torch with code": (zip_of_torch(CODE), MORE),
    "an old file of torch with code": (legacy_file_of_torch(CODE), MORE),
    "a zip with code": (plain_zip(CODE), MORE),
    "code beside weights": (zip_of_torch({"state_dict": weights(), "args": WritesAFile(Path("canary"))}), MORE),
    "a whole model": (zip_of_torch(timm.create_model(MODEL)), MORE),
    "text": (b"weights", MORE),
    "nothing": (b"", "can't be read as weights"),
    "cut short": (zip_of_torch(weights())[:-5000], "can't be read as weights"),
    "numbers": (zip_of_torch({"epoch": 3}), "holds no state_dict of plain tensors"),
    "int8": (zip_of_torch(stem(torch.ones(STEM, dtype=torch.int8))), "conv1.0.weight is of torch.int8 in the file"),
    "complex": (zip_of_torch(stem(torch.ones(STEM, dtype=torch.complex64))), "conv1.0.weight is of torch.complex64"),
    "not finite": (
        zip_of_torch(stem(torch.full(STEM, torch.nan))),
        "weights that are not finite, conv1.0.weight first",
    ),
    "beyond float32": (zip_of_torch(stem(torch.full(STEM, 1e300, dtype=torch.float64))), "not finite"),
    "another shape": (zip_of_torch(stem(torch.ones(1))), "conv1.0.weight is (1,) in the file and (16, 3, 3, 3)"),
    "another key": (zip_of_torch(weights(lambda found: found.update(x=torch.ones(1)))), "x of the file is not in"),
    "a key that steers": (zip_of_torch(weights(lambda found: found.update({"\x1b[31m": torch.ones(1)}))), "x1b[31m"),
    "a pipe": (None, "is no file"),
}


def place(name: str) -> tuple[str, str]:
    """Put the file there; its name, and the reason to expect."""
    content, reason = ATTACKS[name]
    file = "weights.safetensors" if name in LIES else "weights.pth"
    if content is None:
        os.mkfifo(file)
    else:
        Path(file).write_bytes(content)
    return file, reason


@pytest.mark.parametrize("name", ATTACKS)
def test_recipes_refuse(name: str, attack: Callable[..., str]) -> None:
    file, reason = place(name)
    assert reason in attack(*RECIPE, "--checkpoint", file)


@pytest.mark.parametrize("name", ATTACKS)
def test_inspect_refuses(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file, reason = place(name)
    before = snapshot(tmp_path)
    with time_limit():
        assert cli.main(["inspect", MODEL, "--checkpoint", file, "--json", "out.json"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"inmerge: error: --checkpoint {file} ")
    assert err[:-1].isprintable()
    assert reason in err
    assert snapshot(tmp_path) == before
