"""Seeds and arms that are added to a finished run, and what is told of each look at it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import finetune.training.stage
import pytest
import torch
import yaml
from finetune.reports.verdicts import looks_text
from small_runs import content_of, run_digits, run_digits_until

SHORT = ["--epochs", "1", "--inmerge-epochs", "1", "--limit-train", "300", "--similarity-threshold", "-0.5"]
BEGUN = [*SHORT, "--seeds", "0"]
GROWN = [*SHORT, "--seeds", "0", "1", "--arms", "baseline", "inmerge", "ema"]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return run_digits(tmp_path_factory.mktemp("begun") / "run", *BEGUN)


@pytest.fixture(scope="module")
def at_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All seeds and arms in one go."""
    torch.set_num_threads(1)
    return run_digits(tmp_path_factory.mktemp("at_once") / "run", *GROWN)


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    return shutil.copytree(begun, tmp_path / "run")


def looks_of(run: Path) -> list[dict]:
    return json.loads((run / "looks.json").read_text())


def test_further_seeds_and_arms_end_as_if_they_had_been_there(
    run: Path, at_once: Path, begun: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though they were killed on the way; and that is one look."""
    run_digits_until(monkeypatch, run, finetune.training.stage, "train_epoch", 3, *GROWN, "--resume")
    assert len(looks_of(run)) == 1
    run_digits(run, *GROWN, "--resume", report=True)
    found, expected = content_of(run), content_of(at_once)
    stages = [name for name in expected if name.startswith("seed_")]
    assert len(stages) > 30
    assert [name for name in stages if found[name] != expected[name]] == []
    one, other = (json.loads((folder / "summary.json").read_text()) for folder in (run, at_once))
    assert (one.pop("looks"), other.pop("looks")) == (2, 1)
    assert one == other
    assert (run / "config.yaml").read_bytes() == (begun / "config.yaml").read_bytes()
    report = (run / "report.md").read_text()
    assert "This run was looked at 2 times" in report
    assert "is wrong in 17 % of cases" in report
    assert "ema" in report
    monkeypatch.setattr(finetune.training.stage, "train_epoch", None)
    run_digits(run, *GROWN, "--resume")  # prints what is there
    assert capsys.readouterr().out.count("Test figures over 2 seeds") == 2
    assert [(look["seeds"], look["arms"]) for look in looks_of(run)] == [
        ([0], ["baseline", "inmerge"]),
        ([0, 1], ["baseline", "inmerge", "ema"]),
    ]
    assert all("torch" in look["versions"] and look["date"].startswith("20") for look in looks_of(run))


def test_nothing_may_be_left_out(at_once: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(at_once, tmp_path / "run")
    before = content_of(run)
    for arguments, message in (
        (["--seeds", "0", "2", "--arms", "baseline", "inmerge", "ema"], "--seeds 0 2 leaves out 1"),
        (["--seeds", "0", "1"], "--arms baseline inmerge leaves out ema"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run_digits(run, *SHORT, *arguments, "--resume")
        assert message in capsys.readouterr().err
    assert content_of(run) == before


def test_the_margin_is_recorded_before_the_run_and_whether_it_was_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, options, margin, chosen in (
        ("default", ["--seeds", "0"], 0.005, False),
        ("chosen", ["--seeds", "0", "--margin", "0.02", "--primary-metric", "kappa"], 0.02, True),
    ):
        run = tmp_path / name
        run_digits_until(monkeypatch, run, finetune.training.stage, "train_epoch", 1, *SHORT, *options)
        recorded = yaml.safe_load((run / "config.yaml").read_text())
        assert (recorded["margin"], recorded["margin_chosen"]) == (margin, chosen)
        with pytest.raises(SystemExit, match="2"):
            run_digits(run, *SHORT, *options, "--margin", "0.01", "--resume")
        assert f"was begun with --margin {margin}, not 0.01" in capsys.readouterr().err


def test_a_run_from_before_the_margin_goes_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its config.yaml knows nothing of newer options: they are as they were then, or refused."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    newer = ("margin", "margin_chosen", "primary_metric", "planned_seeds")
    (run / "config.yaml").write_text(yaml.safe_dump({k: v for k, v in config.items() if k not in newer}))
    (run / "looks.json").unlink()
    run_digits(run, *BEGUN, "--resume")
    assert "not chosen for these data" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        run_digits(run, *BEGUN, "--margin", "0.02", "--resume")
    assert "was begun with --margin None, not 0.02" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seeds", "planned", "looks", "words"),
    [
        (3, None, 1, None),
        (5, None, 2, "This run was looked at 2 times"),
        (3, 5, 1, "Interim: 3 of the 5 seeds planned at the start."),
        (5, 5, 2, "All of the 5 seeds that were planned at the start have been run."),
    ],
)
def test_looks_are_told_of_unless_they_were_planned(
    seeds: int, planned: int | None, looks: int, words: str | None
) -> None:
    found = looks_text({"seeds": list(range(seeds)), "rule": {"planned_seeds": planned}, "looks": looks})
    assert found is None if words is None else found.startswith(words)
