"""A stage that diverges is an outcome, and the others go on and are judged on all seeds that they finished."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import finetune.training.stage
import finetune.trial
import numpy as np
import pytest
import report
import torch
from accelerate import Accelerator
from finetune.judging.obuchowski_rockette import compare, error_covariances
from finetune.reports.pages import write_side_by_side
from finetune.runs.finished import FinishedRun
from small_runs import run_digits

SHORT = ["--epochs", "1", "--inmerge-epochs", "1", "--limit-train", "300"]
BREAKS = 1e30  # a learning rate after whose first step no weight is finite


def with_broken_stages(monkeypatch: pytest.MonkeyPatch, *broken: str) -> None:
    """Train the stages of these titles, as "seed 1 inmerge", at a learning rate that really breaks them."""

    def breaking(plan: Any) -> Any:
        def planned(*arguments: Any) -> Any:
            stage = plan(*arguments)
            return replace(stage, lr=BREAKS) if stage.title in broken else stage

        return planned

    for name in ("backbone_stage", "arm_stage"):
        monkeypatch.setattr(finetune.trial, name, breaking(getattr(finetune.trial, name)))


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seeds: inmerge breaks in seed 1, dissimilar in all of them."""
    torch.set_num_threads(1)
    arms = ["--arms", "baseline", "inmerge", "random-pairs", "dissimilar", "--seeds", "0", "1", "2"]
    with pytest.MonkeyPatch.context() as patch:
        with_broken_stages(patch, "seed 1 inmerge", *(f"seed {seed} dissimilar" for seed in range(3)))
        return run_digits(tmp_path_factory.mktemp("broken") / "run", *SHORT, *arms, report=True)


def test_an_arm_that_breaks_takes_no_seed_from_the_others(broken: Path) -> None:
    """Random-pairs is judged on all three seeds; what inmerge shows in its two is told, and not judged."""
    summary = summary_of(broken)
    outcomes = {(found["arm"], found["reference"]): found["outcome"] for found in summary["verdicts"]}
    assert outcomes.pop(("random-pairs", "baseline")) not in ("diverged", "not judged")
    assert set(outcomes.values()) == {"diverged"}
    assert summary["diverged"] == {"inmerge": {"1": 1}, "dissimilar": {"0": 1, "1": 1, "2": 1}}
    assert list(summary["arms"]) == ["baseline", "inmerge", "random-pairs"]
    assert summary["epochs"] == {"baseline": [1, 1, 1], "inmerge": [1, None, 1], "random-pairs": [1, 1, 1]}
    values = {arm: np.array(figures["auroc"]["values"], dtype=float) for arm, figures in summary["arms"].items()}
    resampled = FinishedRun(broken).resampled_test
    for arm, seeds in (("random-pairs", [0, 1, 2]), ("inmerge", [0, 2])):
        found = summary["differences"][arm]["auroc"]
        pair = np.array([values[arm][seeds], values["baseline"][seeds]])
        replicates = resampled.replicates((arm, "baseline"))
        assert replicates.shape[2] == len(seeds)
        expected = compare(pair, error_covariances(replicates))
        assert (found["mean"], found["low"], found["high"]) == pytest.approx((expected.mean, *expected.interval(0.95)))
    assert [value is None for value in summary["differences"]["inmerge"]["auroc"]["values"]] == [False, True, False]
    assert summary["differences"]["inmerge"]["auroc"]["p_adjusted"] is None


def test_reports_name_what_broke(broken: Path, tmp_path: Path) -> None:
    text = (broken / "report.md").read_text()
    for words in (
        "inmerge diverged in 1 of 3 seeds: inmerge is not judged against baseline on AUROC, since the seeds that "
        "survive are no fair sample; these alone: ",
        "dissimilar diverged in 3 of 3 seeds: dissimilar is not judged against baseline on AUROC, since no seed is",
        "| epoch kept | 1, 1, 1 | 1, -, 1 |",
    ):
        assert words in text
    assert not (broken / "seed_1/inmerge/README.md").exists()
    write_side_by_side([FinishedRun(broken)] * 2, tmp_path / "both.html")
    rows = [line for line in (tmp_path / "both.md").read_text().splitlines() if "| dissimilar |" in line]
    assert [line.split(" | ")[-1] for line in rows] == ["diverged |"] * 2


def test_a_baseline_that_breaks_in_all_seeds_ends_with_a_summary_and_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_broken_stages(monkeypatch, "seed 0 baseline", "seed 1 baseline")
    run = run_digits(tmp_path / "run", *SHORT, "--seeds", "0", "1", report=True)
    words = "baseline diverged in 2 of 2 seeds: inmerge is not judged against baseline on AUROC, since no seed is left"
    assert words in capsys.readouterr().out
    assert words in (run / "report.md").read_text()
    summary = summary_of(run)
    assert (list(summary["arms"]), summary["differences"]) == (["inmerge"], {})
    before = {name: (run / name).read_bytes() for name in ("summary.json", "summary.csv")}
    for name in before:
        (run / name).unlink()
    monkeypatch.setattr(finetune.training.stage, "train_epoch", None)  # nothing is trained again
    run_digits(run, *SHORT, "--seeds", "0", "1", "--resume")
    assert {name: (run / name).read_bytes() for name in before} == before
    with pytest.raises(SystemExit, match="2"):
        report.main(["--plan", str(run)])
    assert "sets no arm against the baseline" in capsys.readouterr().err


def test_backbones_that_break_in_all_seeds_leave_a_summary_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By an option this time, as a user would; the arms don't begin."""
    run = run_digits(tmp_path / "run", *SHORT, "--lr", str(BREAKS), report=True)
    assert "No arm came to an end in any seed." in capsys.readouterr().out
    assert summary_of(run)["diverged"] == {"baseline": {"0": 0}, "inmerge": {"0": 0}}
    assert "inmerge diverged in 1 of 1 seeds and baseline diverged in 1 of 1 seeds" in (run / "report.md").read_text()


def test_each_stage_has_a_gradient_scaler_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that an earlier stage has driven to nothing, as it diverged, would let the next train on nothing."""
    made, scales = finetune.trial._accelerator, []

    def with_scaler(*arguments: Any) -> Accelerator:
        accelerator = made(*arguments)
        accelerator.scaler = torch.amp.GradScaler("cpu")  # as fp16 has on a GPU
        return accelerator

    def train(accelerator: Accelerator, *_: Any) -> float:
        accelerator.scaler.scale(torch.ones(1))  # it makes its scale when it is first asked for
        scales.append(accelerator.scaler.get_scale())
        accelerator.scaler.update(2.0**-30)
        return 0.5

    monkeypatch.setattr(finetune.trial, "_accelerator", with_scaler)
    monkeypatch.setattr(finetune.training.stage, "train_epoch", train)
    run_digits(tmp_path, "--epochs", "0", "--inmerge-epochs", "1", "--limit-train", "200")
    assert len(scales) == 2
    assert set(scales) == {2.0**16}
