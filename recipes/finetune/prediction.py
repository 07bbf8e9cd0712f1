"""What a finished run's kept model says of image files: prepared, seen and called as the run's own test images were."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .data import tasks
from .data.opening import Unreadable, read_file
from .data.squares import form_of, make_square
from .errors import InputError, first_line
from .judging.metrics import operating_points
from .options import BASELINE, Options
from .runs.finished import FinishedRun
from .sources.dicom import image_opener
from .training.batches import crop
from .training.inference import load_kept_model


@dataclass(frozen=True)
class Kept:
    """A kept model of a run, by its seed and arm."""

    run: FinishedRun
    seed: int
    arm: str

    @property
    def task(self) -> tasks.Task:
        return self.run.task

    @property
    def size(self) -> int:
        """Side of what the model sees."""
        return self.preprocessing["image_size"]

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How an image becomes what the model sees, as the run's source recorded it."""
        if "preprocessing" not in self.run.description:
            raise InputError(
                f"{self.run.folder} doesn't say how its images were prepared, as runs of inmerge_optim 0.1 don't: "
                "repeat it with this version"
            )
        return self.run.description["preprocessing"]

    @cached_property
    def options(self) -> Options:
        known = {field.name for field in fields(Options)}
        return Options(**{name: value for name, value in self.run.options.items() if name in known})

    @property
    def thresholds(self) -> dict[int, float]:
        """See operating_points; from the model's predictions on validation."""
        val = self.run.validation[self.arm][self.run.finished_seeds(self.arm).index(self.seed)]
        return operating_points(self.task, val.labels, val.probabilities)


def kept_model(run: FinishedRun, seed: int | None, arm: str | None) -> Kept:
    """The model of an arm, by default the only one beside the baseline, and a seed, by default the first there is."""
    if arm is None:
        others = [found for found in run.arms if found != BASELINE]
        arm = others[0] if len(others) == 1 else BASELINE if not others else None
    _check_known("--arm", arm, run.arms)
    seeds = run.finished_seeds(arm)
    if seed is None:
        seed = seeds[0]
    _check_known("--seed", seed, seeds)
    return Kept(run, seed, arm)


def _check_known(option: str, value: int | str | None, known: Sequence[int | str]) -> None:
    if value not in known:
        given = "is not given" if value is None else f"{value} is none of the run's"
        raise InputError(f"{option} {given}: choose from {', '.join(map(str, known))}")


def predict_files(kept: Kept, paths: Sequence[Path]) -> tuple[dict[Path, np.ndarray], dict[Path, str]]:
    """The probabilities of each image, float64 (outputs,), and of what can't be used why not.

    In cross-validation they are the means over the models of the folds.
    """
    versions, paths_of_weights = kept.run.versions, kept.run.weights(kept.seed, kept.arm)
    models = [
        load_kept_model(kept.options, kept, path, versions["launch"], versions.get("model"))
        for path in paths_of_weights
    ]
    batch_size = models[0].batch_size
    form = form_of(kept.preprocessing, image_opener())
    found: dict[Path, np.ndarray] = {}
    left_out: dict[Path, str] = {}
    for start in range(0, len(paths), batch_size):
        squares = {}
        for path in paths[start : start + batch_size]:
            try:
                planes = np.frombuffer(make_square(_content(path), form).image, dtype=np.uint8)
            except Unreadable as reason:
                left_out[path] = str(reason)
                continue
            planes = planes.reshape(-1, form.side, form.side)
            squares[path] = np.repeat(planes, 1 if form.grey else 3 // len(planes), axis=0)
        if squares:
            images = crop(torch.from_numpy(np.stack(list(squares.values()))), kept.size).numpy()
            likely = [tasks.probabilities(kept.task, model.logits(images)) for model in models]
            found |= dict(zip(squares, np.mean(likely, axis=0), strict=True))
    return found, left_out


def _content(path: Path) -> bytes:
    try:
        return read_file(str(path))
    except OSError as error:
        raise Unreadable(f"can't be read now: {first_line(error)}") from error


def table_of(kept: Kept, found: dict[Path, np.ndarray]) -> tuple[list[str], list[list[Any]]]:
    """Header and rows of predictions.csv: the probabilities as in predictions_test.csv, and what they are called.

    `predicted` is the likeliest class. Of a binary task `above_threshold`, and of labels `above_<name>`, says whether
    the probability reaches the threshold that was chosen on validation.
    """
    task, thresholds = kept.task, kept.thresholds
    names = task.classes if task.multi_label else range(len(task.classes))
    header = ["image", *(f"prob_{name}" for name in names)]
    header += [] if task.multi_label else ["predicted"]
    header += [f"above_{task.classes[k]}" if task.multi_label else "above_threshold" for k in thresholds]
    rows = []
    for path, likely in found.items():
        called = [] if task.multi_label else [task.classes[int(likely.argmax())]]
        rows.append([str(path), *likely.tolist(), *called, *(int(likely[k] >= cut) for k, cut in thresholds.items())])
    return header, rows
