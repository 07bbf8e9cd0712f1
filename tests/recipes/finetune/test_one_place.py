"""A data set, an arm, a metric and a report section are each added in one place, as docs/development.md shows."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import report
from finetune.data.images import ImageData
from finetune.judging.metrics import METRICS, Metric, Scored
from finetune.reports.trial import SECTIONS
from finetune.runs.finished import FinishedRun
from finetune.runs.sections import Section
from finetune.sources.digits import load_digits_data
from finetune.sources.named import SOURCES
from finetune.sources.source import DatasetOptions, Source
from finetune.training.arms import ARMS, Arm
from small_runs import QUICK, run_digits, run_recipe

SHORT = ["--epochs", "1", "--inmerge-epochs", "1", "--limit-train", "256", "--similarity-threshold", "-0.5"]


def load_small_digits(options: DatasetOptions) -> ImageData:
    return replace(load_digits_data(options.image_size, options.split_seed), name="small-digits")


def error_rate(scored: Scored) -> float:
    return float((scored.probabilities.argmax(axis=1) != scored.labels).mean())


def pace_section(run: FinishedRun) -> Section:
    return Section("Pace", rows=[[arm, str(len(run.curves(arm)))] for arm in run.arms], header=["arm", "epochs"])


@pytest.fixture
def added_section() -> Iterator[None]:
    SECTIONS.append(pace_section)
    yield
    SECTIONS.remove(pace_section)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.usefixtures("added_section")
def test_what_is_added_in_one_place_is_run_judged_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SOURCES, "small-digits", Source(lambda _: None, load_small_digits))
    monkeypatch.setitem(ARMS, "strong", Arm(criterion="similar", settings={"merge_prob": 1.0, "skip_layers": 0}))
    monkeypatch.setitem(METRICS, "error", Metric("error rate", of=error_rate, lower_is_better=True))
    run = tmp_path / "run"
    arguments = ["--dataset", "small-digits", *QUICK, *SHORT, "--arms", "baseline", "inmerge", "strong"]
    run_recipe(*arguments, "--output", run, report=True)

    summary = json.loads((run / "summary.json").read_text())
    assert summary["data"] == "small-digits"
    for arm in ("baseline", "inmerge", "strong"):
        figures = summary["arms"][arm]
        assert figures["error"]["values"] == [pytest.approx(1 - figures["accuracy"]["values"][0])]
        assert float(rows_of(run / f"seed_0/{arm}/metrics.csv")[0]["val_error"]) >= 0
    assert set(summary["differences"]) == {"inmerge", "strong"}
    text = (run / "report.md").read_text()
    assert " error rate |" in text
    assert "## Pace" in text
    assert "| strong | 1 |" in text
    heading = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("arm  "))
    assert heading.split()[-1] == "error"


def test_an_arm_merges_by_its_own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arm's own probability and depth; the baseline's ranks cover the layers of all arms."""
    monkeypatch.setitem(ARMS, "strong", Arm(criterion="similar", settings={"merge_prob": 1.0, "skip_layers": 0}))
    run = run_digits(tmp_path / "run", *SHORT, "--arms", "baseline", "inmerge", "strong", "--merge-prob", "0")
    rows = {arm: rows_of(run / f"seed_0/{arm}/merges.csv") for arm in ("baseline", "inmerge", "strong")}
    assert {row["drawn"] for row in rows["inmerge"]} == {"0"}
    assert all(int(row["drawn"]) > 0 for row in rows["strong"])
    layers = {arm: [row["layer"] for row in found] for arm, found in rows.items()}
    assert layers["inmerge"] == layers["strong"][-len(layers["inmerge"]) :]
    assert len(layers["inmerge"]) < len(layers["strong"])
    assert layers["baseline"] == layers["strong"]
    baseline, inmerge = ((run / f"seed_0/{arm}/model.safetensors").read_bytes() for arm in ("baseline", "inmerge"))
    assert baseline == inmerge


@pytest.mark.parametrize(
    ("criterion", "settings", "message"),
    [("similar", {"lr": 0.1}, "can't set lr for itself"), (None, {"merge_prob": 0.1}, "merges nothing has no use")],
)
def test_settings_that_an_arm_can_not_have_are_refused(
    criterion: str | None, settings: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Arm(criterion=criterion, settings=settings)


def test_a_new_metric_reaches_an_old_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """report.py scores the kept epoch anew; the last epoch, which left no predictions, has no such figure."""
    run = run_digits(tmp_path / "run", *SHORT)
    weights = (run / "seed_0/inmerge/model.safetensors").stat().st_mtime_ns
    before = json.loads((run / "summary.json").read_text())
    monkeypatch.setitem(METRICS, "error", Metric("error rate", of=error_rate, lower_is_better=True))
    report.main([str(run)])
    after = json.loads((run / "summary.json").read_text())
    for arm in ("baseline", "inmerge"):
        assert after["arms"][arm]["error"]["values"] == [pytest.approx(1 - before["arms"][arm]["accuracy"]["mean"])]
        assert after["last"]["arms"][arm].pop("error")["values"] == [None]
        assert after["arms"][arm].pop("error")
    for differences in (after["differences"], after["last"]["differences"]):
        differences["inmerge"].pop("error")
    assert after == before
    assert "error" in (run / "summary.csv").read_text().splitlines()[0]
    assert (run / "seed_0/inmerge/model.safetensors").stat().st_mtime_ns == weights
