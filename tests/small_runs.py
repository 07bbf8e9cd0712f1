"""Small runs of the recipes in this process, for their tests."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import medmnist2d
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from finetune.data.images import ImageData
from finetune.judging.metrics import score
from finetune.options import Options
from finetune.runs.layout import stage_folder
from finetune.runs.results import write_predictions, write_result
from finetune.runs.settings import write_settings

QUICK = ["--model", "test_resnet", "--no-pretrained", "--image-size", "16", "--epochs", "2", "--inmerge-epochs", "2"]


# What differs in a report from run to run, as HTML and as Markdown: a section, and the times of smaller models.
_TIMES = re.compile(
    rb"(?s)(<h2>|## )Time per stage\n?.*?(?=</section>|\n## )|[\d.]+ to [\d.]+, [\d.]+ times"
    rb"|[\d.]+ times as long for one image, [\d.]+ times for 32"
)


def run_recipe(*arguments: object, recipe: Callable[[list[str]], None] = medmnist2d.main, report: bool = False) -> None:
    """Run a recipe in this process as its command line would; by default without the report, which takes seconds."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        with nullcontext() if report else mock.patch("finetune.trial.write_report"):
            recipe([str(argument) for argument in arguments])
    finally:
        torch.use_deterministic_algorithms(False)


def run_digits(output: Path, *arguments: object, report: bool = False) -> Path:
    """A quick run on digits with a small model; the run folder."""
    run_recipe("--dataset", "digits", *QUICK, "--output", output, *arguments, report=report)
    return output


def make_run(
    folder: Path, data: ImageData, probabilities: dict[str, list[np.ndarray]], seeds: Sequence[int], **options: object
) -> Path:
    """A finished run of one epoch whose arms predict these probabilities on test, and on validation."""
    write_settings(folder, Options(arms=tuple(probabilities), seeds=tuple(seeds), **options), {}, data)
    for arm, of_arm in probabilities.items():
        for seed, values in zip(seeds, of_arm, strict=True):
            stage = stage_folder(folder, seed, arm)
            stage.mkdir(parents=True)
            for part in ("val", "test"):
                write_predictions(stage, part, data.task, data.splits[part], values)
            scores = {"test": score(data.task, data.test.labels, values)}
            result = {"epoch": 1, "kept": scores, "last": scores, "merges": {}}
            write_result(stage, {"predicted": torch.from_numpy(np.array(values))}, result)
    return folder


class Killed(BaseException):
    """What ends a run in place of a signal; no handler of the recipes catches it."""


def run_digits_until(
    monkeypatch: pytest.MonkeyPatch, run: Path, module: object, function: str, call: int, *arguments: object
) -> None:
    """Run until the named function is entered for the `call`-th time."""
    with monkeypatch.context() as patch:
        kill_at(patch, module, function, call)
        with pytest.raises(Killed):
            run_digits(run, *arguments)


def kill_at(patch: pytest.MonkeyPatch, module: object, function: str, call: int) -> None:
    """Let a run be killed when the named function is entered for the `call`-th time."""
    real, calls = getattr(module, function), []

    def until(*args: object, **kwargs: object) -> object:
        calls.append(None)
        if len(calls) == call:
            raise Killed
        return real(*args, **kwargs)

    patch.setattr(module, function, until)


def content_of(run: Path) -> dict[str, bytes]:
    """Every file but the configuration, which names the folder, and what tells the time or the date.

    Of the report what tells times is left out.
    """
    other = ("config.yaml", "timing.json", "looks.json")
    files = (path for path in run.rglob("*") if path.is_file() and path.name not in other)
    return {str(path.relative_to(run)): _TIMES.sub(b"", path.read_bytes()) for path in files}


def assert_same(run: Path, reference: Path) -> None:
    found, expected = content_of(run), content_of(reference)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
