"""Files that are no weights, or more than weights, as --checkpoint of the recipes and of ``inmerge inspect``."""

from __future__ import annotations

import os
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


def weights(change: Callable[[dict[str, Tensor]], object] = lambda weights: None) -> dict[str, Tensor]:
    found = timm.create_model(MODEL).state_dict()
    change(found)
    return found


def stem(value: Tensor) -> dict[str, Tensor]:
    return weights(lambda found: found.update({"conv1.0.weight": value}))


STEM = (16, 3, 3, 3)
CODE = {"conv1.0.weight": WritesAFile(Path("canary"))}
MORE = "holds no weights, or more than weights"
ATTACKS = {
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


def place(content: bytes | None) -> None:
    if content is None:
        os.mkfifo("weights.pth")
    else:
        Path("weights.pth").write_bytes(content)


@pytest.mark.parametrize("name", ATTACKS)
def test_recipes_refuse(name: str, attack: Callable[..., str]) -> None:
    content, reason = ATTACKS[name]
    place(content)
    assert reason in attack(*RECIPE, "--checkpoint", "weights.pth")


@pytest.mark.parametrize("name", ATTACKS)
def test_inspect_refuses(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content, reason = ATTACKS[name]
    monkeypatch.chdir(tmp_path)
    place(content)
    before = snapshot(tmp_path)
    with time_limit():
        assert cli.main(["inspect", MODEL, "--checkpoint", "weights.pth", "--json", "out.json"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("inmerge: error: --checkpoint weights.pth ")
    assert err[:-1].isprintable()
    assert reason in err
    assert snapshot(tmp_path) == before
