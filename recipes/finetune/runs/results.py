"""What a stage leaves in its folder: curves, predictions, weights and its result."""

import csv
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..data.images import Split
from ..data.tasks import Task
from ..errors import CheckpointWarning
from ..files import sha256_of, write_csv, write_json, write_weights
from ..judging.metrics import METRICS
from .layout import CURVES, MERGES, RESULT, TIMING, WEIGHTS, predictions_file, stage_folder


def write_curves(folder: Path, progress: dict[str, Any]) -> None:
    """metrics.csv with a row per epoch, of an arm merges.csv with a row per epoch and selected layer, and timing.json.

    Where an arm merges, all have merges.csv: the baseline draws and merges nothing, and has ranks to compare with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    header = ("epoch", "lr", "train_loss", *(f"val_{name}" for name in METRICS))
    write_csv(folder / CURVES, header, progress["metrics"])
    if progress["merges"]:
        header = ("epoch", "layer", "drawn", "merged", "mean_cosine", "effective_rank")
        write_csv(folder / MERGES, header, progress["merges"])
    write_json(folder / TIMING, {"training_seconds": progress["seconds"]})


def write_predictions(folder: Path, part: str, task: Task, split: Split, probabilities: np.ndarray) -> None:
    """predictions_<part>.csv; its text reads back to the same float64 numbers."""
    if task.multi_label:
        columns = [("label_" + name, split.labels[:, k]) for k, name in enumerate(task.classes)]
        columns += [("prob_" + name, probabilities[:, k]) for k, name in enumerate(task.classes)]
    else:
        columns = [("label", split.labels)]
        columns += [(f"prob_{k}", probabilities[:, k]) for k in range(probabilities.shape[1])]
    columns = [(name, values.tolist()) for name, values in columns]
    if split.patients is not None:
        columns = [("patient", split.patients), *columns]
    header = ["case", *(name for name, _ in columns)]
    rows = zip(split.cases, *(values for _, values in columns), strict=True)
    write_csv(folder / predictions_file(part), header, rows)


def read_predictions(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels and probabilities as they were scored: (N,) or (N, labels), and (N, outputs)."""
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    label_columns = [k for k, name in enumerate(header) if name == "label" or name.startswith("label_")]
    prob_columns = [k for k, name in enumerate(header) if name.startswith("prob_")]
    labels = np.array([[int(row[k]) for k in label_columns] for row in rows])
    probabilities = np.array([[float(row[k]) for k in prob_columns] for row in rows])
    return labels[:, 0] if header[label_columns[0]] == "label" else labels, probabilities


def read_test_probabilities(run: Path, arms: Sequence[str], seeds: Sequence[int]) -> dict[str, list[np.ndarray]]:
    """Per arm and seed the probabilities of the finished arms on test, (N, outputs)."""
    return {
        arm: [read_predictions(stage_folder(run, seed, arm) / predictions_file("test"))[1] for seed in seeds]
        for arm in arms
    }


def equal_weights(run: Path, seeds: Sequence[int], arm: str, other: str) -> bool:
    """Whether two finished arms have the same weights in every seed, to the bit."""

    def checksum(seed: int, name: str) -> str:
        result = stage_folder(run, seed, name) / RESULT
        return json.loads(result.read_text(encoding="utf-8"))["files"][WEIGHTS]

    return all(checksum(seed, arm) == checksum(seed, other) for seed in seeds)


def write_result(folder: Path, weights: dict[str, torch.Tensor], result: dict[str, Any]) -> None:
    """The weights, and last of all the result with a checksum per file: where it stands, the stage is finished."""
    write_weights(folder / WEIGHTS, weights)
    files = sorted(path for path in folder.iterdir() if path.suffix in (".csv", ".safetensors"))
    write_json(folder / RESULT, {**result, "files": {path.name: sha256_of(path) for path in files}})


def read_result(accelerator: Accelerator, folder: Path) -> dict[str, Any] | None:
    """The result of a finished stage, or None; a stage whose files are damaged is to be run again."""
    found = [_whole_result(folder)] if accelerator.is_main_process else [None]
    return broadcast_object_list(found)[0]


def _whole_result(folder: Path) -> dict[str, Any] | None:
    path = folder / RESULT
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        damaged = [name for name, checksum in result["files"].items() if sha256_of(folder / name) != checksum]
    except (OSError, ValueError, KeyError) as error:
        damaged = [f"{RESULT}: {error}"]
    if damaged:
        warnings.warn(f"{folder} is damaged ({damaged[0]}): running this stage again", CheckpointWarning, stacklevel=2)
        return None
    return result
