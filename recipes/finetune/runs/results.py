"""What a stage leaves in its folder: curves, predictions, weights and its result."""

import csv
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..data.images import Split
from ..data.tasks import Predictions, Task
from ..errors import CheckpointWarning, InputError, damage_told
from ..files import is_whole, read_json, sealed, sha256_of, write_csv, write_json, write_weights
from ..judging.metrics import METRICS
from .layout import CURVES, MERGES, RESULT, TIMING, WEIGHTS, predictions_file

_VOUCHED_FOR = (".csv", ".safetensors", ".pt2", ".onnx")


@dataclass(frozen=True)
class Progress:
    """What a stage has done so far.

    Attributes:
        epochs: that are done.
        metrics: rows of metrics.csv, one per epoch.
        merges: rows of merges.csv, one per epoch and watched layer.
        seconds: of training, per epoch.
        best_epoch: the first with the best AUROC on validation, counted from 1; 0 before the first. Where validation
            has a single class, that with the lowest log loss.
        best_score: that AUROC, or minus that log loss.
    """

    epochs: int = 0
    metrics: list[list[Any]] = field(default_factory=list)
    merges: list[list[Any]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    best_epoch: int = 0
    best_score: float | None = None


def write_curves(folder: Path, progress: Progress) -> None:
    """metrics.csv with a row per epoch, of an arm merges.csv with a row per epoch and selected layer, and timing.json.

    Where an arm merges, all have merges.csv: the baseline draws and merges nothing, and has ranks to compare with.
    """
    header = ("epoch", "lr", "train_loss", *(f"val_{name}" for name in METRICS))
    write_csv(folder / CURVES, header, progress.metrics)
    if progress.merges:
        header = ("epoch", "layer", "drawn", "merged", "mean_cosine", "effective_rank", "displacement")
        write_csv(folder / MERGES, header, progress.merges)
    write_json(folder / TIMING, {"training_seconds": progress.seconds})


def write_predictions(folder: Path, part: str, task: Task, split: Split, probabilities: np.ndarray) -> None:
    """predictions_<part>.csv; its text reads back to the same float64 numbers."""
    if task.multi_label:
        columns = [("label_" + name, split.labels[:, k]) for k, name in enumerate(task.classes)]
        columns += [("prob_" + name, probabilities[:, k]) for k, name in enumerate(task.classes)]
    else:
        columns = [("label", split.labels)]
        columns += [(f"prob_{k}", probabilities[:, k]) for k in range(probabilities.shape[1])]
    lists: list[tuple[str, list[Any]]] = [(name, values.tolist()) for name, values in columns]
    if split.patients is not None:
        lists = [("patient", split.patients), *lists]
    header = ["case", *(name for name, _ in lists)]
    rows = zip(split.cases, *(values for _, values in lists), strict=True)
    write_csv(folder / predictions_file(part), header, rows)


def read_predictions(folder: Path, part: str) -> Predictions:
    """What a stage predicted on "val" or "test"."""
    with (folder / predictions_file(part)).open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    is_label, is_probability = (
        [k for k, name in enumerate(header) if name.startswith(kind)] for kind in ("label", "prob_")
    )
    labels = np.array([[int(row[k]) for k in is_label] for row in rows])
    return Predictions(
        labels=labels[:, 0] if "label" in header else labels,
        probabilities=np.array([[float(row[k]) for k in is_probability] for row in rows]),
        cases=[row[header.index("case")] for row in rows],
        patients=[row[header.index("patient")] for row in rows] if "patient" in header else None,
    )


def write_result(folder: Path, weights: dict[str, torch.Tensor] | None, result: dict[str, Any]) -> None:
    """The weights, and last of all the result with a checksum per file: where it stands, the stage is finished.

    A stage that diverged has no weights: its result is {"diverged": epoch}, 0 where its backbone did.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if weights is not None:
        write_weights(folder / WEIGHTS, weights)
    files = sorted(path for path in folder.iterdir() if path.suffix in _VOUCHED_FOR)
    write_json(folder / RESULT, sealed({**result, "files": {path.name: sha256_of(path) for path in files}}))


def read_result(accelerator: Accelerator, folder: Path) -> dict[str, Any] | None:
    """The result of a finished stage, or None; a stage whose files are damaged is to be run again."""
    found = [_result_to_go_on_with(folder)] if accelerator.is_main_process else [None]
    return broadcast_object_list(found)[0]


def read_whole_result(folder: Path) -> dict[str, Any]:
    """The result of a finished stage; an InputError where it or a file that it vouches for is not as it was written."""
    result = read_json(folder / RESULT)
    if not is_whole(result):
        raise InputError(f"{folder} is damaged ({RESULT} has another checksum)")
    with damage_told(folder):
        for name, checksum in result["files"].items():
            if name != Path(name).name or sha256_of(folder / name) != checksum:
                raise InputError(f"{folder} is damaged ({name} has another checksum)")
    return result


def _result_to_go_on_with(folder: Path) -> dict[str, Any] | None:
    if not (folder / RESULT).exists():
        return None
    try:
        return read_whole_result(folder)
    except InputError as error:
        warnings.warn(f"{error}: running this stage again", CheckpointWarning, stacklevel=2)
        return None
