"""One stage of the trial: the backbone, or one arm, for one seed."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from inmerge_optim import InMergeOptimizer, KernelLayer, kernel_layers, kernel_ranks

from ..data import tasks
from ..data.images import ImageData
from ..judging.metrics import METRICS, Thresholds, choose_thresholds, per_class, score
from ..options import BASELINE, Options
from ..runs.layout import BACKBONE, STATE, WEIGHTS, stage_folder
from ..runs.results import read_result, write_curves, write_predictions, write_result
from .arms import ARMS, wrap_optimizer
from .averages import create_average, recalibrate_batch_norm
from .batches import (
    channel_statistics,
    crop,
    crop_corners,
    eval_loader,
    flip_mask,
    model_input,
    train_loader,
)
from .checkpoints import BEST, checkpoint_folder, load_checkpoint, save_checkpoint
from .epoch import Batch, predict, train_epoch
from .models import create_model, use_grad_checkpointing
from .optim import create_optimizer, create_schedule
from .randomness import seed_globals
from .trackers import log_epoch, tracked


@dataclass(frozen=True)
class Stage:
    """What a stage does, and where.

    Attributes:
        kind: keys the random numbers; it is "arm" for every arm, so that all of them see the same.
        arm: a name in ARMS; the backbone trains as the baseline does.
        folder: where the stage keeps its files.
        start: the weights it starts from; None: a new model, pretrained if the options say so.
    """

    kind: Literal["backbone", "arm"]
    arm: str
    seed: int
    epochs: int
    lr: float
    folder: Path
    start: Path | None = None

    @property
    def title(self) -> str:
        return f"seed {self.seed} {self.folder.name}"

    @property
    def keeps_best(self) -> bool:
        """An arm keeps its best epoch on validation; the backbone hands its last one on."""
        return self.kind == "arm"


def backbone_stage(options: Options, run: Path, seed: int) -> Stage:
    return Stage("backbone", BASELINE, seed, options.epochs, options.lr, stage_folder(run, seed, BACKBONE))


def arm_stage(options: Options, run: Path, seed: int, arm: str) -> Stage:
    lr = options.lr if options.inmerge_lr is None else options.inmerge_lr
    start = stage_folder(run, seed, BACKBONE) / WEIGHTS
    return Stage("arm", arm, seed, options.inmerge_epochs, lr, stage_folder(run, seed, arm), start)


@dataclass(frozen=True)
class Session:
    """What accelerate has prepared for a stage. `merging` is the unprepared optimizer, if it merges; `watched` are the
    layers whose effective rank is taken after each epoch; `average` holds the weights to evaluate, where these are an
    average.
    """

    model: nn.Module
    optimizer: Optimizer
    schedule: Scheduler
    loaders: dict[str, DataLoader]
    merging: InMergeOptimizer | None
    watched: list[KernelLayer]
    average: ModelEmaV3 | AveragedModel | None
    model_input: Callable[..., torch.Tensor]
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def run_stage(accelerator: Accelerator, options: Options, data: ImageData, stage: Stage) -> dict[str, Any]:
    """Run a stage, or what is left of it, and return its result as it stands in result.json."""
    result = read_result(accelerator, stage.folder)
    if result is not None:
        if accelerator.is_main_process:  # a run that was killed right after the result has left it
            shutil.rmtree(stage.folder / STATE, ignore_errors=True)
        return result
    session = _prepare(accelerator, options, data, stage)
    progress = load_checkpoint(accelerator, stage.folder / STATE)
    if progress is None:
        progress = {"epochs": 0, "metrics": [], "merges": [], "seconds": [], "best_epoch": 0, "best_auroc": None}
    with tracked(accelerator, options, stage.folder):
        while progress["epochs"] < stage.epochs:
            progress, new_best = _run_epoch(accelerator, options, data, stage, session, progress)
            save_checkpoint(accelerator, stage.folder / STATE, progress, new_best)
    result = _finish(accelerator, options, data, stage, session, progress)
    accelerator.free_memory()
    return result


def _prepare(accelerator: Accelerator, options: Options, data: ImageData, stage: Stage) -> Session:
    seed_globals(stage.seed, "initialisation", 0, rank=0)
    model = create_model(options, data, pretrained=options.pretrained and stage.start is None)
    if stage.start is not None:
        model.load_state_dict(load_file(stage.start))
    if options.grad_checkpointing:
        use_grad_checkpointing(model, options.model)
    memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
    model.to(memory_format=memory_format)
    config = model.pretrained_cfg
    optimizer = create_optimizer(options, model, stage.lr)
    optimizer = wrap_optimizer(ARMS[stage.arm], optimizer, model, options, stage.seed)
    merging = optimizer if isinstance(optimizer, InMergeOptimizer) else None
    # Of the baseline too, where an arm merges: did merging lower the rank?
    compared = stage.kind == "arm" and any(ARMS[arm].criterion for arm in options.arms)
    watched = kernel_layers(model, options.skip_layers) if compared else []
    schedule = create_schedule(options, optimizer, stage.kind, stage.epochs)

    loading = {"num_workers": options.workers, "pin_memory": accelerator.device.type == "cuda"}
    batch_size = options.batch_size // options.grad_accum_steps
    train = train_loader(
        data.train,
        batch_size=options.batch_size,
        grad_accum_steps=options.grad_accum_steps,
        seed=stage.seed,
        stage=stage.kind,
        **loading,
    )
    val = eval_loader(data.val, batch_size=batch_size, **loading)
    test = eval_loader(data.test, batch_size=batch_size, **loading)
    kind = ARMS[stage.arm].average
    average = create_average(kind, model) if kind else None
    if options.compile:
        model.compile()  # in place, so that the names of its weights stay
    model, optimizer, train, val, test = accelerator.prepare(model, optimizer, train, val, test)
    if average is not None:
        average = accelerator.prepare_model(average, evaluation_mode=True)  # part of the checkpoints, but not trained
    mean, std = (values.to(accelerator.device) for values in channel_statistics(config, options.in_chans))
    loaders = {"train": train, "val": val, "test": test}
    as_input = partial(_input_of, mean=mean, std=std, size=data.size, memory_format=memory_format)
    weights = options.class_weights and tasks.balanced_weights(data.task, data.train.labels).to(accelerator.device)
    loss = partial(tasks.loss, data.task, weights=weights, smoothing=options.smoothing)
    return Session(model, optimizer, schedule, loaders, merging, watched, average, as_input, loss)


def _input_of(
    batch: Batch,
    mean: torch.Tensor,
    std: torch.Tensor,
    size: int,
    memory_format: torch.memory_format,
    corners: torch.Tensor | None = None,
    flips: torch.Tensor | None = None,
) -> torch.Tensor:
    rows = batch["rows"]
    images = crop(batch["images"], size, None if corners is None else corners[rows])
    inputs = model_input(images, mean, std, None if flips is None else flips[rows])
    return inputs.contiguous(memory_format=memory_format)


def _views(
    accelerator: Accelerator, options: Options, data: ImageData, stage: Stage, epoch: int
) -> dict[str, torch.Tensor]:
    """Where the crops of an epoch's training images begin, and which are flipped, on the device."""
    views = {}
    margin = data.train.images.shape[-1] - data.size
    if margin:
        views["corners"] = crop_corners(len(data.train), margin, stage.seed, stage.kind, epoch)
    if options.hflip:
        views["flips"] = flip_mask(len(data.train), options.hflip, stage.seed, stage.kind, epoch)
    return {name: values.to(accelerator.device) for name, values in views.items()}


def _run_epoch(
    accelerator: Accelerator,
    options: Options,
    data: ImageData,
    stage: Stage,
    session: Session,
    progress: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, torch.Tensor] | None]:
    """Train and validate one epoch; the progress after it, and its evaluated weights if they are to be kept as best.

    All random numbers are keyed by the epoch, so that it does not matter what ran before in this process.
    """
    epoch = progress["epochs"]
    seed_globals(stage.seed, stage.kind, epoch, accelerator.process_index)
    session.schedule.step(epoch)
    session.loaders["train"].set_epoch(epoch)
    lr = session.optimizer.param_groups[0]["lr"]
    if session.merging:
        cooldown = epoch >= stage.epochs - options.cooldown_epochs
        session.merging.merge_prob = 0 if cooldown else options.merge_prob
    tally_before, start = _merge_tally(session), time.perf_counter()
    loss = train_epoch(
        accelerator,
        session.model,
        session.optimizer,
        session.loaders["train"],
        partial(session.model_input, **_views(accelerator, options, data, stage, epoch)),
        session.loss,
        options.clip_grad,
        f"{stage.title} epoch {epoch + 1}/{stage.epochs}",
        _ema_update(accelerator, session, epoch),
        session.merging and partial(_merged_pairs, session.merging),
    )
    seconds = time.perf_counter() - start
    merges = _merge_rows(epoch + 1, session, tally_before)
    if isinstance(session.average, AveragedModel):
        session.average.update_parameters(accelerator.unwrap_model(session.model))
    with _trained_weights_put_back(accelerator, options, session):
        _use_evaluated_weights(accelerator, options, stage, session)
        scores = _evaluate(accelerator, data, session, ("val",)).scores["val"]
        new_best = epoch == 0 or (scores["auroc"] or 0) > (progress["best_auroc"] or 0)
        weights = None
        if new_best and stage.keeps_best:
            weights = {name: value.clone() for name, value in accelerator.get_state_dict(session.model).items()}
    accelerator.print(f"{stage.title} epoch {epoch + 1}/{stage.epochs}: {_line(loss, scores)}")
    log_epoch(accelerator, epoch + 1, lr, loss, scores, merges)
    after = {
        "epochs": epoch + 1,
        "metrics": [*progress["metrics"], [epoch + 1, lr, loss, *(scores[name] for name in METRICS)]],
        "merges": progress["merges"] + merges,
        "seconds": [*progress["seconds"], seconds],
        "best_epoch": epoch + 1 if new_best else progress["best_epoch"],
        "best_auroc": scores["auroc"] if new_best else progress["best_auroc"],
    }
    if accelerator.is_main_process:
        write_curves(stage.folder, after)
    return after, weights


def _merge_tally(session: Session) -> dict[str, tuple[int, int, float]]:
    """Pairs drawn and merged per layer so far, and the sum of the cosines of those merged; none where none are."""
    if session.merging is None:
        return {}
    cosines = session.merging.merged_cosines()
    return {
        layer: (count["drawn"], count["merged"], cosines[layer])
        for layer, count in session.merging.merge_counts().items()
    }


def _merge_rows(epoch: int, session: Session, before: dict[str, tuple[int, int, float]]) -> list[list[Any]]:
    """A row of merges.csv per watched layer: what was merged since `before`, and the effective rank of its kernels."""
    after, rows = _merge_tally(session), []
    for layer, rank in kernel_ranks(session.watched).items():
        nothing = (0, 0, 0.0)
        drawn, merged, cosines = (
            late - early for late, early in zip(after.get(layer, nothing), before.get(layer, nothing), strict=True)
        )
        rows.append([epoch, layer, drawn, merged, cosines / merged if merged else None, rank])
    return rows


def _merged_pairs(optimizer: InMergeOptimizer) -> int:
    return sum(count["merged"] for count in optimizer.merge_counts().values())


def _ema_update(accelerator: Accelerator, session: Session, epoch: int) -> Callable[[], None] | None:
    """What follows each step of an arm that keeps a moving average; its decay grows with the steps of the stage."""
    if not isinstance(session.average, ModelEmaV3):
        return None
    model = accelerator.unwrap_model(session.model)
    steps = count(1 + epoch * (len(session.loaders["train"]) // accelerator.gradient_accumulation_steps))
    return lambda: session.average.update(model, step=next(steps))


@contextmanager
def _trained_weights_put_back(accelerator: Accelerator, options: Options, session: Session) -> Iterator[None]:
    """Training goes on from its own weights and statistics, whatever was evaluated meanwhile."""
    if session.average is None and not options.recalibrate_bn:
        yield
        return
    model = accelerator.unwrap_model(session.model)
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    yield
    model.load_state_dict(trained)


def _use_evaluated_weights(accelerator: Accelerator, options: Options, stage: Stage, session: Session) -> None:
    """Put into the model what is evaluated and kept: the average, and batch norm statistics that fit the weights."""
    model = accelerator.unwrap_model(session.model)
    if session.average is not None:
        model.load_state_dict(session.average.module.state_dict())
    if options.recalibrate_bn:
        seed_globals(stage.seed, "batch norm", 0, accelerator.process_index)  # dropout ahead of a batch norm draws
        session.loaders["train"].set_epoch(0)
        inputs = (session.model_input(batch) for batch in session.loaders["train"])
        recalibrate_batch_norm(accelerator, model, inputs)


def _line(loss: float, scores: dict[str, float | None]) -> str:
    figures = (f"{name} {scores[name]:.4f}" for name in ("accuracy", "auroc") if scores[name] is not None)
    return ", ".join([f"loss {loss:.4f}", *(f"val {figure}" for figure in figures)])


@dataclass(frozen=True)
class Evaluation:
    """Probabilities and scores per split, at the thresholds chosen on validation, if the task has any."""

    probabilities: dict[str, np.ndarray]
    thresholds: Thresholds | None
    scores: dict[str, dict[str, float | None]]


def _evaluate(accelerator: Accelerator, data: ImageData, session: Session, parts: tuple[str, ...]) -> Evaluation:
    """Score the model as it is on these splits, of which "val" is one."""
    logits = {part: predict(accelerator, session.model, session.loaders[part], session.model_input) for part in parts}
    probabilities = {part: tasks.probabilities(data.task, values) for part, values in logits.items()}
    thresholds = choose_thresholds(data.task, data.val.labels, probabilities["val"])
    scores = {
        part: score(data.task, data.splits[part].labels, values, thresholds) for part, values in probabilities.items()
    }
    if "test" in parts and data.own_scores is not None:
        scores["test"] |= data.own_scores(probabilities["test"])
    return Evaluation(probabilities, thresholds, scores)


def _finish(
    accelerator: Accelerator,
    options: Options,
    data: ImageData,
    stage: Stage,
    session: Session,
    progress: dict[str, Any],
) -> dict[str, Any]:
    """Score the last epoch, then the one to keep, and write what remains of the stage."""
    parts = ("val", "test") if stage.kind == "arm" else ("val",)
    _use_evaluated_weights(accelerator, options, stage, session)
    kept = last = _evaluate(accelerator, data, session, parts)
    epoch = progress["epochs"]
    state = stage.folder / STATE
    if stage.keeps_best and progress["best_epoch"] < epoch:
        best = load_file(checkpoint_folder(state, epoch) / BEST)
        accelerator.unwrap_model(session.model).load_state_dict(best)
        kept = _evaluate(accelerator, data, session, parts)
        epoch = progress["best_epoch"]
    part = parts[-1]
    result = {
        "epoch": epoch,
        "kept": kept.scores,
        "last": last.scores,
        "per_class": per_class(data.task, data.splits[part].labels, kept.probabilities[part], kept.thresholds),
        "thresholds": kept.thresholds and {name: values.tolist() for name, values in kept.thresholds.items()},
        "merges": _totals(progress["merges"]) if session.merging else {},
    }
    weights = accelerator.get_state_dict(session.model)
    if accelerator.is_main_process:
        write_curves(stage.folder, progress)
        for part, probabilities in kept.probabilities.items():
            write_predictions(stage.folder, part, data.task, data.splits[part], probabilities)
        write_result(stage.folder, weights, result)
        shutil.rmtree(state, ignore_errors=True)
    accelerator.wait_for_everyone()
    return result


def _totals(merges: list[list[Any]]) -> dict[str, dict[str, int]]:
    """Pairs drawn and merged per layer over all epochs."""
    totals: dict[str, dict[str, int]] = {}
    for _, layer, drawn, merged, *_ in merges:
        total = totals.setdefault(layer, {"drawn": 0, "merged": 0})
        total["drawn"] += drawn
        total["merged"] += merged
    return totals
