"""torchvision's SqueezeNet in the recipes: with its weights, in grey, and in a card whose lines do without timm."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from finetune.training import squeezenet
from PIL import Image
from safetensors.torch import load_file
from small_runs import run_recipe
from torchvision.models import squeezenet1_1

SQUEEZENET = [
    "--dataset",
    "digits",
    "--inmerge-epochs",
    "0",
    "--model",
    "squeezenet1_1",
    "--no-pretrained",
    "--image-size",
    "32",
    "--epochs",
    "0",
]


def test_it_is_torchvisions_network_with_its_weights(shared_file: Callable[[str], Path]) -> None:
    weights = shared_file("weights/squeezenet1_1.safetensors")
    overlay = {"file": str(weights), "custom_load": False}
    ours = timm.create_model("squeezenet1_1", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    theirs = squeezenet1_1().eval()
    theirs.load_state_dict(load_file(weights))
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours(images), theirs(images))
    grey = timm.create_model("squeezenet1_1", pretrained=True, in_chans=1, pretrained_cfg_overlay=overlay)
    assert torch.allclose(grey.features[0].weight, theirs.features[0].weight.sum(1, keepdim=True))
    assert list(squeezenet.default_cfgs) == ["squeezenet1_1"]


def test_its_cards_lines_predict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    run_recipe(*SQUEEZENET, "--in-chans", "1", "--output", run, report=True)
    monkeypatch.chdir(run / "seed_0/inmerge")
    card = Path("README.md").read_text()
    assert "library_name: pytorch" in card
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save("image.png")
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    names: dict[str, np.ndarray] = {}
    exec(code, names)
    assert "timm" not in names
    assert names["probabilities"].shape == (10,)
