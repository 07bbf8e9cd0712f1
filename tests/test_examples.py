"""Each example trains, merges, and leaves no files behind, where its library is installed."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
from torch.utils.data import TensorDataset

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {
    "accelerate_loop": ["accelerate"],
    "fastai_learner": ["fastai"],
    "huggingface_trainer": ["transformers"],
    "lightning_module": ["lightning"],
    "monai_trainer": ["monai", "ignite"],
    "plain_torch": [],
    "timm_loop": [],
}


def test_every_example_is_run_here():
    assert {script.stem for script in EXAMPLES.glob("*.py")} == {"digits", *NEEDS}


@pytest.fixture
def example(monkeypatch, tmp_path):
    """Return a function that imports an example, with a fifth of the images, in an empty folder and a new process."""
    accelerate = pytest.importorskip("accelerate.state")
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    data = importlib.import_module("digits")
    few = [TensorDataset(*part[:300]) for part in data.digits()]
    monkeypatch.setattr(data, "digits", lambda: few)

    def forget():
        accelerate.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.GradientState._reset_state()

    forget()
    yield importlib.import_module
    forget()
    for name in ("digits", *NEEDS):
        sys.modules.pop(name, None)


@pytest.mark.filterwarnings("ignore")  # what other trainers warn of, on a machine without a GPU above all
@pytest.mark.parametrize("name", NEEDS)
def test_an_example_trains_and_merges(example, name, capsys, tmp_path):
    for library in NEEDS[name]:
        pytest.importorskip(library)
    example(name).main(epochs=1)
    merged, drawn, layers, accuracy = re.search(
        r"merged (\d+) of (\d+) drawn pairs of kernels in (\d+) layers; test accuracy ([.\d]+)$",
        capsys.readouterr().out.strip(),
    ).groups()
    assert 0 < int(merged) < int(drawn)
    assert int(layers) == 8
    assert 0 <= float(accuracy) <= 1
    assert not list(tmp_path.iterdir())
