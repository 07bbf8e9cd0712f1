"""The recipe on several machines."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import torchrun
from small_runs import QUICK, assert_same

RECIPE = str(Path(__file__).parents[2] / "recipes" / "medmnist2d.py")


@pytest.mark.slow
def test_two_nodes_give_the_run_folder_of_one_machine_with_two_processes(tmp_path):
    settings = [
        "--dataset",
        "digits",
        *QUICK,
        "--similarity-threshold",
        "-0.5",
        "--hflip",
        "0.5",
        "--batch-size",
        "200",
    ]
    said = torchrun(RECIPE, *settings, "--output", str(tmp_path / "one"), processes=2)
    said += torchrun(RECIPE, *settings, "--output", str(tmp_path / "two"), processes=1, nodes=2)
    assert (tmp_path / "two" / "summary.json").exists(), said
    assert_same(tmp_path / "two", tmp_path / "one")
