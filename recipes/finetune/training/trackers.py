"""Trackers of experiments through accelerate: each stage is a run of its own, so that the arms' curves lie together."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..errors import InputError, near_names
from ..options import Options, as_plain

TRACKERS = ("tensorboard", "wandb", "trackio", "none")
PROJECT = "inmerge_optim"


def check_tracker(tracker: str) -> None:
    """Refuse an unknown tracker, and one that is not installed, which accelerate would leave out without an error."""
    if tracker not in TRACKERS:
        hint = near_names(tracker, TRACKERS) or f": choose from {', '.join(TRACKERS)}"
        raise InputError(f"--tracker {tracker} is unknown{hint}")
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        raise InputError(
            f"--tracker {tracker} needs the package {tracker}: install it with pip install 'inmerge_optim[trackers]'"
        )


@contextmanager
def tracked(accelerator: Accelerator, options: Options, folder: Path) -> Iterator[None]:
    """Log to the tracker that accelerate was made with, if any, while the stage of this folder runs.

    Steps are epochs. A stage that is resumed goes on in TensorBoard, and is a second run of that name in the others.
    """
    if not accelerator.log_with:
        yield
        return
    run, *of_stage = folder.parts[-4 if folder.parent.name.startswith("fold_") else -3 :]
    name = "/".join(of_stage)
    if options.tracker == "tensorboard":
        accelerator.init_trackers(name)  # its settings would be one more run per stage, named by the time
    else:
        kwargs = {"name": f"{run}/{name}", "group": run}
        accelerator.init_trackers(PROJECT, as_plain(options), {options.tracker: kwargs})
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers.clear()


def log_epoch(
    accelerator: Accelerator,
    epoch: int,
    lr: float,
    loss: float,
    scores: dict[str, float | None],
    merges: list[list[Any]],
) -> None:
    """Log what is defined of an epoch: loss, learning rate, validation scores, and what merges.csv has per layer."""
    values = {"lr": lr, "train_loss": loss}
    values |= {f"val/{name}": score for name, score in scores.items() if score is not None}
    for _, layer, drawn, merged, cosine, rank, displacement in merges:
        shown = {
            "merge_rate": merged / drawn if drawn else None,
            "mean_cosine": cosine,
            "effective_rank": rank,
            "displacement": displacement,
        }
        values |= {f"{name}/{layer}": value for name, value in shown.items() if value is not None}
    accelerator.log(values, step=epoch)
