"""Smaller models of a trial: made by merging or in the usual ways, scored, kept in every form, and resumed."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import compaction
import finetune.training.leaving
import finetune.training.stage
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from finetune.data import tasks
from finetune.grid import Trial, _following
from finetune.options import Options
from finetune.reports.cards import write_cards
from finetune.reports.smaller import size_of, smaller_section
from finetune.runs.finished import FinishedRun
from finetune.runs.results import read_predictions
from finetune.sources.digits import load_digits_data
from finetune.training.arms import arm_of, needed_stage, with_compacted_arms
from finetune.training.inference import load_kept_model
from finetune.training.plan import arm_stage
from finetune.training.points import compaction_arms
from small_runs import Killed, assert_same, kill_at, run_recipe
from torch import nn

pytest.importorskip("torch_pruning", reason="torch-pruning is not installed (extra compact)")

DIGITS = ["--dataset", "digits", "--model", "test_resnet", "--no-pretrained", "--image-size", "16"]
SHORT = ["--epochs", "1", "--inmerge-epochs", "1", "--limit-train", "200", "--batch-size", "100"]
MERGING = ["--thresholds", "0.05", "--final-rounds", "200", "--merge-prob", "0.5"]
ARMS = [
    "inmerge@similarity_threshold=0.05",
    "inmerge-compact@similarity_threshold=0.05",
    "inmerge-l1-pruned@similarity_threshold=0.05",
    "inmerge-kmeans@similarity_threshold=0.05",
]
COMPACT = ARMS[1]


def run(output: Path, *arguments: object) -> Path:
    arguments = (*DIGITS, *SHORT, *MERGING, "--ways", "l1-pruned", "kmeans", "--output", output, *arguments)
    run_recipe(*arguments, recipe=compaction.main)
    return output


@pytest.fixture(scope="module")
def compacted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune.training.leaving, "_SECONDS", 0.0)
        return run(tmp_path_factory.mktemp("compacted") / "run")


def left_of(run: Path, arm: str) -> dict[str, int]:
    layers = json.loads((run / f"seed_0/{arm}/smaller.json").read_text())["layers"]
    return {layer["name"]: layer["after"] for layer in layers}


def probabilities_of(run: Path, arm: str, logits: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
    """What a model says of the test images."""
    finished = FinishedRun(run)
    data = load_digits_data(16, 0)
    kept = load_kept_model(
        Options(model="test_resnet", pretrained=False, batch_size=100), data, finished.weights(0, arm)[0], {}
    )
    with torch.inference_mode():
        found = torch.cat([logits(kept.as_input(images)) for images in kept.batches(data.test.images)])
    return tasks.probabilities(data.task, found)


def test_each_way_comes_to_the_size_that_merging_made(compacted: Path) -> None:
    finished = FinishedRun(compacted)
    assert finished.arms == ["baseline", *ARMS]
    sizes = {arm: size_of(finished, arm) for arm in ARMS[1:]}
    merged = sizes[COMPACT]
    assert merged.macs < 0.97
    assert left_of(compacted, ARMS[3]) == left_of(compacted, COMPACT)
    assert sizes[ARMS[2]].macs == pytest.approx(merged.macs, abs=0.02)
    assert left_of(compacted, ARMS[2]) != left_of(compacted, COMPACT)
    assert merged.changed < 0.1 < sizes[ARMS[2]].changed
    assert set(merged.milliseconds) == {"1", "32"}
    assert not sizes[ARMS[2]].milliseconds


def test_every_form_of_the_model_gives_the_predictions_of_the_run(compacted: Path) -> None:
    stage = compacted / "seed_0" / COMPACT
    expected = read_predictions(stage, "test").probabilities
    model = load_kept_model(
        Options(model="test_resnet", pretrained=False, batch_size=100),
        load_digits_data(16, 0),
        stage / "model.safetensors",
        {},
    ).model
    np.testing.assert_allclose(probabilities_of(compacted, COMPACT, model), expected, rtol=0, atol=1e-6)
    program = torch.export.load(stage / "model.pt2").module()
    np.testing.assert_allclose(probabilities_of(compacted, COMPACT, program), expected, rtol=0, atol=1e-6)


def test_onnx_runtime_gives_the_predictions_of_the_run(compacted: Path) -> None:
    for needed in ("onnx", "onnxscript", "onnxruntime"):
        runtime = pytest.importorskip(needed, reason=f"{needed} is not installed")
    stage = compacted / "seed_0" / COMPACT
    session = runtime.InferenceSession(stage / "model.onnx", providers=["CPUExecutionProvider"])
    found = probabilities_of(
        compacted, COMPACT, lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    )
    np.testing.assert_allclose(found, read_predictions(stage, "test").probabilities, rtol=0, atol=1e-5)


def test_report_and_card_tell_what_is_left(compacted: Path) -> None:
    finished = FinishedRun(compacted)
    section = smaller_section(finished)
    assert [row[0] for row in section.rows] == ARMS[1:]
    assert f"{COMPACT} is not judged against baseline on AUROC" in section.text
    assert "None of the smaller models is shown to be equivalent to baseline within 0.005." in section.text
    assert (compacted / section.figures[0][0]).read_bytes().startswith(b"\x89PNG")
    write_cards(finished)
    card = (compacted / "seed_0" / COMPACT / "README.md").read_text()
    assert 'model = load_compacted("model.safetensors")' in card
    assert "It is no model of timm by name any more" in card
    assert 'of the arm "inmerge@similarity_threshold=0.05"; after the last one' in card


@pytest.mark.slow
def test_a_run_killed_while_a_smaller_model_is_written_ends_as_another(
    compacted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compacted arm's stage has nothing to go on from, and begins again; a pruned arm's has its epochs."""
    monkeypatch.setattr(finetune.training.leaving, "_SECONDS", 0.0)
    copy = shutil.copytree(compacted, tmp_path / "run")
    for arm in ARMS[1:3]:
        shutil.rmtree(copy / "seed_0" / arm)
    (copy / "summary.json").unlink()
    for call in (1, 2):
        with monkeypatch.context() as patch:
            kill_at(patch, finetune.training.stage, "write_smaller", call)
            with pytest.raises(Killed):
                run(copy, "--resume")
    run(copy, "--resume")
    for folder in (copy, compacted):
        write_cards(FinishedRun(folder))
    for arm in ARMS[1:3]:
        assert_same(copy / "seed_0" / arm, compacted / "seed_0" / arm)


def test_compact_adds_an_arm_behind_each_that_merges() -> None:
    options = with_compacted_arms(
        Options(arms=("baseline", "inmerge", "ema", "dissimilar@merge_prob=0.1"), compact=True)
    )
    assert options.arms == (
        *("baseline", "inmerge", "inmerge-compact", "ema", "dissimilar@merge_prob=0.1"),
        "dissimilar-compact@merge_prob=0.1",
    )
    assert with_compacted_arms(options) == options
    assert needed_stage("inmerge-compact@merge_prob=0.1") == "inmerge@merge_prob=0.1"
    assert needed_stage("inmerge-l2-pruned") == "inmerge-compact"
    assert needed_stage("inmerge") == "backbone"
    assert arm_of("inmerge-compact").criterion is None


def test_a_stage_begins_when_the_one_that_it_is_made_from_is_done() -> None:
    options = Options(arms=("baseline", "inmerge", "inmerge-compact", "inmerge-kmeans"), compact=True)
    trial = Trial(options, lambda: None, "name")
    left = {(0, arm) for arm in options.arms}
    assert _following(trial, (0, "backbone"), left) == [(0, "baseline"), (0, "inmerge")]
    assert _following(trial, (0, "inmerge"), left) == [(0, "inmerge-compact")]
    assert _following(trial, (0, "inmerge-compact"), left) == [(0, "inmerge-kmeans")]
    assert _following(trial, (0, "baseline"), left) == []
    assert _following(trial, (0, "inmerge-kmeans"), set()) == ["judge"]


def test_a_smaller_model_is_made_from_the_last_epoch_and_others_from_the_backbone(tmp_path: Path) -> None:
    options = Options(inmerge_epochs=3, compact=True)
    merged, pruned = (arm_stage(options, tmp_path, 0, arm) for arm in ("inmerge-compact", "inmerge-kmeans"))
    assert (merged.epochs, merged.start) == (0, tmp_path / "seed_0/inmerge/last.safetensors")
    assert (pruned.epochs, pruned.start) == (3, tmp_path / "seed_0/backbone/model.safetensors")
    assert pruned.needs == [tmp_path / "seed_0/backbone", tmp_path / "seed_0/inmerge-compact"]


def test_the_recipes_arms_are_named_by_their_points() -> None:
    assert compaction_arms(["0.2", "4sd"], [0, 300], ["kmeans"])[:4] == (
        "baseline",
        "inmerge@similarity_threshold=0.2",
        "inmerge-compact@similarity_threshold=0.2",
        "inmerge-kmeans@similarity_threshold=0.2",
    )
    assert compaction_arms(["0.2", "4sd"], [0, 300], [])[-1] == (
        "validation-rounds-compact@similarity_threshold=4sd,merge_rounds=300"
    )
    assert compaction_arms(["4sd"], [300], [])[-1] == "validation-rounds-compact@similarity_threshold=4sd"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "baseline", "inmerge", "inmerge-compact"], "--arms inmerge-compact needs --compact"),
        (["--arms", "baseline", "ema", "--compact"], "--compact has no effect on --arms baseline ema"),
        (["--arms", "baseline", "ema-compact", "--compact"], "ema merges nothing"),
        (
            ["--arms", "baseline", "inmerge-l1-pruned", "inmerge", "--compact"],
            "--arms inmerge-l1-pruned is made from what inmerge-compact leaves: name that one before it",
        ),
        (["--final-rounds", "3"], "--final-rounds has no effect without --compact"),
        (["--compact", "--final-rounds", "0"], "--final-rounds must be above 0, not 0"),
        (["--arms", "baseline", "inmerge@merge_rounds=3"], "has no use for merge_rounds"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_recipe(*DIGITS, "--output", tmp_path / "run", *arguments)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_it_is_said_that_torch_pruning_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(SystemExit, match="2"):
        run_recipe(*DIGITS, "--output", tmp_path / "run", "--compact")
    assert 'pip install "inmerge_optim[compact]"' in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_is_left_and_timed_has_neither_the_layout_nor_the_precision_of_training() -> None:
    """Else it would be compared with a whole model of another layout, and its program would hold autocast."""
    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier test's
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare(nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last))
    session, images = mock.Mock(accelerator=accelerator, bare_model=model), torch.ones(1, 3, 8, 8)
    made = finetune.training.leaving._as_made(session)
    assert made.weight.is_contiguous()
    assert torch.equal(made(images), torch.conv2d(images, made.weight, made.bias))
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(model(images), made(images)), "the stage's own model should still compute in bfloat16"
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
