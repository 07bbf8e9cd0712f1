"""The studies: their configs are trials that can be run, and a repeated one is compared with what was recorded."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml
from finetune.data.images import ImageData, Split
from finetune.data.tasks import Task
from finetune.options import parse_options
from finetune.runs.finished import FinishedRun
from finetune.sources.options import DatasetOptions
from finetune.training.arms import check_arms
from small_runs import make_run

STUDIES = Path(__file__).parents[1] / "studies"
CONFIGS = sorted(STUDIES.glob("*/config.yaml"))
SEEDS = range(3)


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """studies/run.py, with one study, of a run that is not there."""
    spec = importlib.util.spec_from_file_location("studies_run", STUDIES / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "STUDIES", tmp_path / "studies")
    (tmp_path / "studies/mine").mkdir(parents=True)
    (tmp_path / "studies/mine/config.yaml").write_text("dataset: digits\n")
    return module


def finished(folder: Path, shift: float = 0.0) -> Path:
    """A finished run of two arms that predict with noise, the second one more surely by `shift`."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    cases = [str(k) for k in range(60)]
    split = Split(np.zeros((60, 1, 4, 4), dtype=np.uint8), labels, cases)
    data = ImageData("made", Task("binary", ("no", "yes")), split, split, split)

    def predicted(extra: float) -> np.ndarray:
        of_one = 1 / (1 + np.exp(-(labels - 0.5 + rng.normal(0, 1, 60)) * (1 + extra)))
        return np.stack([1 - of_one, of_one], axis=1)

    arms = {arm: [predicted(extra) for _ in SEEDS] for arm, extra in (("baseline", 0), ("inmerge", shift))}
    return make_run(folder, data, arms, SEEDS)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.parent.name)
def test_configs_are_trials_that_fix_seeds_and_margin(config: Path) -> None:
    options = parse_options(DatasetOptions, ["--config", str(config)])
    check_arms(options)
    assert options.planned_seeds == len(options.seeds) >= 10
    assert options.margin is not None
    assert not set(options.tune_seeds) & set(options.seeds)


@pytest.mark.parametrize("recorded", sorted(STUDIES.glob("*/recorded.json")), ids=lambda path: path.parent.name)
def test_what_is_recorded_is_of_the_config(recorded: Path) -> None:
    """Small, of all seeds, and of its arms, of which a tuned one has its settings in its name."""
    content = json.loads(recorded.read_text())
    config = yaml.safe_load((recorded.parent / "config.yaml").read_text())
    assert content["seeds"] == config["seeds"]
    tuned = set(config.get("tune", ()))
    assert [name.partition("@")[0] if name in tuned else name for name in content["arms"]] == config["arms"]
    assert recorded.stat().st_size < 300_000


@pytest.mark.parametrize("recorded", sorted(STUDIES.glob("*/recorded.json")), ids=lambda path: path.parent.name)
def test_the_tables_of_the_results_are_what_is_recorded(study: ModuleType, recorded: Path) -> None:
    assert study.table(json.loads(recorded.read_text())) in (STUDIES.parent / "docs/results.md").read_text()


def test_a_recorded_study_is_repeated_within_its_range(
    study: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study.main(["--record", "mine", str(finished(tmp_path / "run"))])
    study.main(["--compare", "mine", str(finished(tmp_path / "again"))])
    assert "0 of 6 figures lie outside of their range" in capsys.readouterr().out
    study.main(["--table", "mine"])
    first, second = capsys.readouterr().out.strip().split("\n\n")
    assert [line.split(" | ")[0] for line in first.splitlines()[2:]] == ["| baseline", "| inmerge"]
    summary = FinishedRun(tmp_path / "run").summary
    assert f" | {summary['arms']['inmerge']['auroc']['mean']:.3f} ± " in first.splitlines()[-1]
    assert f" | {summary['differences']['inmerge']['log_loss']['mean']:+.3f} [" in second.splitlines()[-1]
    with pytest.raises(SystemExit, match="1"):
        study.main(["--compare", "mine", str(finished(tmp_path / "other", shift=20.0))])
    out = capsys.readouterr().out
    assert next(line for line in out.splitlines() if line.startswith("log_loss inmerge  ")).endswith("OUTSIDE")


def test_a_study_is_run_in_a_folder_that_goes_on(study: ModuleType, tmp_path: Path, monkeypatch, capsys) -> None:
    run, calls = finished(tmp_path / "run"), []
    monkeypatch.setattr(study.medmnist2d, "main", lambda words: calls.append(words))
    monkeypatch.setattr(study.robustness, "main", lambda words: calls.append(words))
    study.main(["mine", "--output", str(run), "--data-dir", "here"])
    config = str(tmp_path / "studies/mine/config.yaml")
    assert calls == [["--config", config, "--resume", "--output", str(run), "--data-dir", "here"], [str(run)]]
    assert "mine is planned, and nothing is recorded of it yet" in capsys.readouterr().out


def test_the_range_is_where_the_mean_over_other_seeds_lies(study: ModuleType) -> None:
    """Of 2,000 pairs of five normal values each, about one in a hundred pairs has means further apart."""
    rng = np.random.default_rng(0)
    outside = 0
    for first, second in rng.normal(3, 2, (2000, 2, 5)):
        expected = study.expected_range(first.tolist())
        outside += not expected["low"] <= second.mean() <= expected["high"]
    assert 8 < outside < 34


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "NAME names the unknown study ''"),
        (["mien"], "NAME names the unknown study 'mien': did you mean mine"),
        (["--record", "mine"], "--record mine needs the run folder, and nothing else"),
        (["--table", "mine"], "--table mine needs what is recorded of the study"),
        (["--compare", "mine", "none"], "none is no run folder"),
    ],
)
def test_bad_input_ends_in_one_sentence(study: ModuleType, capsys, words: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        study.main(words)
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
