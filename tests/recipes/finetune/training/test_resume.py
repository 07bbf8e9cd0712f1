"""A run that was stopped goes on to the same files, to the bit."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import finetune.files
import finetune.runs.results
import finetune.training.checkpoints
import finetune.training.evaluation
import finetune.training.stage
import pytest
import torch
from finetune.errors import CheckpointWarning
from small_runs import assert_same, run_digits, run_digits_until

SETTINGS = ["--batch-size", "400", "--similarity-threshold", "-0.5", "--hflip", "0.5"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing stopped."""
    torch.set_num_threads(1)
    return run_digits(tmp_path_factory.mktemp("reference") / "run", *SETTINGS)


@pytest.mark.parametrize(
    ("module", "function", "call"),
    [
        pytest.param(finetune.training.stage, "save_checkpoint", 2, id="after an epoch of the backbone"),
        pytest.param(finetune.training.checkpoints, "write_json", 6, id="in the write of an arm's checkpoint"),
        pytest.param(finetune.training.evaluation, "predict", 7, id="in an evaluation"),
        pytest.param(finetune.training.stage, "write_result", 2, id="between an arm's predictions and its result"),
        pytest.param(finetune.training.stage, "train_epoch", 6, id="in the last epoch"),
    ],
)
def test_resumed_run_equals_one_that_was_never_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reference: Path, module: object, function: str, call: int
) -> None:
    run_digits_until(monkeypatch, tmp_path / "run", module, function, call, *SETTINGS)
    assert not (tmp_path / "run" / "summary.json").exists()
    run_digits(tmp_path / "run", *SETTINGS, "--resume")
    assert_same(tmp_path / "run", reference)


def test_damaged_checkpoint_is_named_and_the_one_before_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reference: Path
) -> None:
    run = tmp_path / "run"
    run_digits_until(monkeypatch, run, finetune.training.stage, "write_result", 3, *SETTINGS)
    newest = run / "seed_0/inmerge/state/epoch_0002"
    (newest / "optimizer.bin").write_bytes((newest / "optimizer.bin").read_bytes()[:-100])
    with pytest.warns(CheckpointWarning, match=r"epoch_0002 is damaged \(optimizer.bin"):
        run_digits(run, *SETTINGS, "--resume")
    assert_same(run, reference)


def test_stage_without_a_whole_checkpoint_starts_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reference: Path
) -> None:
    run = tmp_path / "run"
    run_digits_until(monkeypatch, run, finetune.training.stage, "train_epoch", 4, *SETTINGS)
    (run / "seed_0/baseline/state/epoch_0001/manifest.json").write_text('{"optimizer.bin":')
    with pytest.warns(CheckpointWarning, match="epoch_0001 is damaged"):
        run_digits(run, *SETTINGS, "--resume")
    assert_same(run, reference)


def test_damaged_result_is_made_anew(tmp_path: Path, reference: Path) -> None:
    """A finished stage whose weights were spoiled is run again, and only that one."""
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    (run / "summary.json").unlink()
    (run / "seed_0/inmerge/model.safetensors").write_bytes(b"spoiled")
    kept = (run / "seed_0/baseline/result.json").stat().st_mtime_ns
    with pytest.warns(CheckpointWarning, match="inmerge is damaged"):
        run_digits(run, *SETTINGS, "--resume")
    assert (run / "seed_0/baseline/result.json").stat().st_mtime_ns == kept
    assert_same(run, reference)


def test_checkpoints_that_a_kill_left_in_a_finished_stage_are_removed(tmp_path: Path, reference: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    (run / "summary.json").unlink()
    (run / "seed_0/inmerge/state/epoch_0002").mkdir(parents=True)
    (run / "seed_0/inmerge/state/epoch_0002/model.safetensors").write_bytes(b"left")
    run_digits(run, *SETTINGS, "--resume")
    assert_same(run, reference)


def test_resume_prints_the_table_of_a_finished_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    monkeypatch.setattr(finetune.training.stage, "train_epoch", None)
    run_digits(run, *SETTINGS, "--resume")
    assert "inmerge - baseline" in capsys.readouterr().out
    assert_same(run, reference)


def test_resume_starts_a_run_where_there_is_none_and_loader_workers_change_nothing(
    tmp_path: Path, reference: Path
) -> None:
    (tmp_path / "run").mkdir()
    run_digits(tmp_path / "run", *SETTINGS, "--resume", "--workers", "2")
    assert_same(tmp_path / "run", reference)


def test_other_settings_are_refused_and_named(
    tmp_path: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    with pytest.raises(SystemExit, match="2"):
        run_digits(run, *SETTINGS, "--resume", "--lr", "0.02")
    assert "--lr 0.01, not 0.02" in capsys.readouterr().err
    torch.set_num_threads(2)
    with pytest.raises(SystemExit, match="2"):
        run_digits(run, *SETTINGS, "--resume")
    assert "threads 1, not 2" in capsys.readouterr().err
    assert_same(run, reference)


def test_full_disk_leaves_the_last_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A write that fails is told in one sentence; with room again, the run goes on to the same files."""
    run, real, limits = (
        tmp_path / "run",
        finetune.training.stage.save_checkpoint,
        resource.getrlimit(resource.RLIMIT_FSIZE),
    )
    saved = []

    def on_a_full_disk(*args: object) -> None:
        saved.append(None)
        if len(saved) == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(finetune.training.stage, "save_checkpoint", on_a_full_disk)
        try:
            with pytest.raises(SystemExit, match="2"):
                run_digits(run, *SETTINGS)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert "epoch_0002 can't be written" in message
    assert json.loads((run / "seed_0/baseline/state/epoch_0001/progress.json").read_text())["epochs"] == 1
    run_digits(run, *SETTINGS, "--resume")
    assert_same(run, reference)


def test_the_best_weights_are_kept_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """At its peak a stage holds two checkpoints of weights and momentum, and the weights of two best epochs."""
    run, real, sizes = tmp_path / "run", finetune.training.checkpoints.sha256_of, []

    def measured(path: Path) -> str:
        sizes.append(sum(file.stat().st_size for file in run.glob("seed_0/inmerge/state/**/*") if file.is_file()))
        return real(path)

    monkeypatch.setattr(finetune.training.checkpoints, "sha256_of", measured)
    run_digits(run, *SETTINGS, "--epochs", "0", "--inmerge-epochs", "4", "--arms", "baseline", "inmerge")
    weights = (run / "seed_0/inmerge/model.safetensors").stat().st_size
    assert 5 < max(sizes) / weights < 6.5
