"""Kernels of kept models beside the baseline's, from stage folders that are made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from finetune.files import write_json
from finetune.reports.merges import norm_sentence
from finetune.runs.kernels import compare_kernels
from finetune.runs.results import Progress, write_curves
from safetensors.torch import save_file

WEIGHTS = {
    "deep": torch.arange(24.0).reshape(4, 2, 3, 1),
    "deeper": torch.tensor([[3.0, 4.0], [5.0, 12.0]]).reshape(2, 2, 1, 1),
}
# Of the layer "deep": epoch, layer, drawn, merged, mean cosine, effective rank, displacement.
MERGED = [[1, "deep", 10, 4, 0.5, 3.0, 0.25], [2, "deep", 10, 4, 0.5, 2.4, 0.75], [3, "deep", 0, 0, None, 2.0, 0.0]]
PLAIN = [[epoch, "deep", 0, 0, None, 2.0 * epoch, None] for epoch in (1, 2, 3)]


def stage(folder: Path, merges: list[list[Any]] | None, kept: int, scale: float = 1.0) -> Path:
    """A stage that kept this epoch; its deepest layer is not among those of its merges.csv."""
    folder.mkdir()
    save_file({f"{layer}.weight": scale * weight for layer, weight in WEIGHTS.items()}, folder / "model.safetensors")
    write_curves(folder, Progress(merges=merges or []))
    write_json(folder / "result.json", {"epoch": kept})
    return folder


def test_norms_and_ranks_are_those_of_the_kept_epochs_over_the_baselines(tmp_path: Path) -> None:
    """The displacement is a mean over the epochs that drew pairs, which a cooldown is none of."""
    arm, baseline = stage(tmp_path / "arm", MERGED, 2, 0.9), stage(tmp_path / "baseline", PLAIN, 1)
    found = compare_kernels([arm], [baseline])
    assert found == {
        "deep": {"displacement": 0.5, "norm": pytest.approx(0.9), "effective_rank": pytest.approx(2.4 / 2)}
    }


def test_folds_are_averaged(tmp_path: Path) -> None:
    arms = [stage(tmp_path / f"arm_{fold}", MERGED, 1 + fold, scale) for fold, scale in enumerate((0.8, 1.0))]
    baselines = [stage(tmp_path / f"baseline_{fold}", PLAIN, 1) for fold in (0, 1)]
    found = compare_kernels(arms, baselines)["deep"]
    assert found["norm"] == pytest.approx(0.9)
    assert found["effective_rank"] == pytest.approx((3.0 + 2.4) / 2 / 2)


def test_what_old_runs_and_baselines_without_ranks_leave_out_is_not_known(tmp_path: Path) -> None:
    arm, baseline = stage(tmp_path / "arm", MERGED, 2), stage(tmp_path / "baseline", None, 2)
    lines = (arm / "merges.csv").read_text().splitlines()
    (arm / "merges.csv").write_text("\n".join(line.rpartition(",")[0] for line in lines) + "\n")
    found = compare_kernels([arm], [baseline])["deep"]
    assert found == {"displacement": None, "norm": 1.0, "effective_rank": None}


def test_the_norm_explains_it_where_kernels_are_shorter_and_as_varied() -> None:
    shorter = {"displacement": 0.1, "norm": 0.9, "effective_rank": 0.999}
    assert norm_sentence("inmerge", shorter) == (
        "Of inmerge the norm explains it: its kernels are 10.0 % shorter than the baseline's and as varied (effective "
        "rank -0.1 %), as weight decay would make them."
    )
    for other in ({"effective_rank": 0.95}, {"norm": 0.99}, {"norm": 1.1}, {"effective_rank": None}):
        assert norm_sentence("inmerge", shorter | other) is None
