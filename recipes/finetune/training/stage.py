"""One stage of the trial, from its start to its result: the backbone, or one arm, of one seed."""

import shutil
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch.optim.swa_utils import AveragedModel

from inmerge_optim.compaction import CompactionReport

from ..data.images import ImageData
from ..errors import Diverged
from ..files import write_weights
from ..judging.formatting import percent
from ..judging.metrics import METRICS
from ..options import Options
from ..runs.layout import LAST_WEIGHTS, STATE, last_part
from ..runs.results import Progress, read_result, write_curves, write_predictions, write_result
from .arms import merge_settings, rounds_after_epoch
from .checkpoints import best_weights, load_checkpoint, save_checkpoint
from .epoch import train_epoch
from .evaluation import evaluate, trained_weights_put_back, use_evaluated_weights
from .leaving import write_smaller
from .merge_tally import looks_at_ranks, total_merges
from .optim import follow_plateau
from .plan import Stage
from .randomness import seed_globals
from .session import Session, epoch_views, prepare_session
from .trackers import log_epoch, tracked

_LOSS_COLUMN = 3 + list(METRICS).index("log_loss")  # on validation, in the rows of a stage's progress


def run_stage(accelerator: Accelerator, options: Options, data: ImageData, stage: Stage) -> None:
    """Run a stage, or what is left of it, until its result stands in its folder."""
    if read_result(accelerator, stage.folder) is not None:
        if accelerator.is_main_process:  # a run that was killed right after the result has left it
            shutil.rmtree(stage.folder / STATE, ignore_errors=True)
        return
    for needed in stage.needs:
        if "diverged" in read_result(accelerator, needed):
            _record_divergence(accelerator, stage, 0, f"its {needed.name} diverged")
            return
    session = prepare_session(accelerator, options, data, stage)
    progress = load_checkpoint(accelerator, stage.folder / STATE) or Progress()
    try:
        with tracked(accelerator, options, stage.folder):
            while progress.epochs < stage.epochs:
                progress, new_best = _run_epoch(session, progress)
                save_checkpoint(accelerator, stage.folder / STATE, progress, new_best)
        _finish(session, progress)
    except Diverged as reason:
        if accelerator.is_main_process:
            write_curves(stage.folder, progress)
        _record_divergence(accelerator, stage, min(progress.epochs + 1, stage.epochs), str(reason))
    accelerator.free_memory()


def _record_divergence(accelerator: Accelerator, stage: Stage, epoch: int, reason: str) -> None:
    """The result of a stage that broke down; the other stages go on."""
    accelerator.print(f"{stage.title} diverged: {reason}.")
    if accelerator.is_main_process:
        write_result(stage.folder, None, {"diverged": epoch})
        shutil.rmtree(stage.folder / STATE, ignore_errors=True)
    accelerator.wait_for_everyone()


def _run_epoch(session: Session, progress: Progress) -> tuple[Progress, dict[str, torch.Tensor] | None]:
    """Train and validate one epoch; the progress after it, and its evaluated weights if they are to be kept as best.

    All random numbers are keyed by the epoch, so that it does not matter what ran before in this process.
    """
    accelerator, stage, epoch = session.accelerator, session.stage, progress.epochs
    title = f"{stage.title} epoch {epoch + 1}/{stage.epochs}"
    seed_globals(stage.seed, stage.kind, epoch, accelerator.process_index)
    session.schedule.step(epoch)
    if session.options.sched == "plateau":
        losses = [row[_LOSS_COLUMN] for row in progress.metrics]
        follow_plateau(session.optimizer, losses, session.options.patience_epochs)
    lr = session.optimizer.param_groups[0]["lr"]
    start = time.perf_counter()
    loss = _train(session, epoch, title)
    _merge_without_steps(session)
    seconds = time.perf_counter() - start
    if isinstance(session.average, AveragedModel):
        session.average.update_parameters(session.bare_model)
    with trained_weights_put_back(session):
        use_evaluated_weights(session)
        scores = evaluate(session, ("val",)).scores["val"]
        by_loss = session.options.keep_by == "loss" or scores["auroc"] is None
        score = -scores["log_loss"] if by_loss else scores["auroc"]
        new_best = progress.best_score is None or score > progress.best_score
        weights = None
        if new_best and stage.keeps_best:
            weights = {name: value.clone() for name, value in accelerator.get_state_dict(session.model).items()}
    merges = session.tally.rows(epoch + 1, with_ranks=new_best or looks_at_ranks(epoch + 1, stage.epochs))
    accelerator.print(f"{title}: loss {loss:.4f}, {_line(scores)}")
    log_epoch(accelerator, epoch + 1, lr, loss, scores, merges)
    after = Progress(
        epochs=epoch + 1,
        metrics=[*progress.metrics, [epoch + 1, lr, loss, *(scores[name] for name in METRICS)]],
        merges=[*progress.merges, *merges],
        seconds=[*progress.seconds, seconds],
        best_epoch=epoch + 1 if new_best else progress.best_epoch,
        best_score=score if new_best else progress.best_score,
    )
    if accelerator.is_main_process:
        write_curves(stage.folder, after)
    return after, weights


def _train(session: Session, epoch: int, title: str) -> float:
    """Train for one epoch, without merging in the cooldown; the mean loss."""
    options, stage = session.options, session.stage
    session.loaders["train"].set_epoch(epoch)
    if stage.arm.criterion:
        cooldown = epoch >= stage.epochs - options.cooldown_epochs
        session.wrapped.merge_prob = 0 if cooldown else merge_settings(stage.arm, options)["merge_prob"]
    return train_epoch(
        session.accelerator,
        session.model,
        session.optimizer,
        session.loaders["train"],
        partial(session.as_input, views=epoch_views(session, epoch)),
        session.loss,
        options.clip_grad,
        title,
        _ema_update(session, epoch),
        session.tally.merged_pairs if stage.arm.criterion else None,
    )


def _merge_without_steps(session: Session) -> None:
    """The rounds of an arm that has any: they are evaluated with the epoch, and training goes on from them.

    In a cooldown, whose probability is 0, they merge nothing.
    """
    rounds = rounds_after_epoch(session.stage.arm, session.options, len(session.data.val))
    if rounds:
        session.wrapped.merge(rounds=rounds)


def _ema_update(session: Session, epoch: int) -> Callable[[], None] | None:
    """What follows each step of an arm that keeps a moving average; its decay grows with the steps of the stage."""
    if not isinstance(session.average, ModelEmaV3):
        return None
    model = session.bare_model
    steps = count(1 + epoch * (len(session.loaders["train"]) // session.accelerator.gradient_accumulation_steps))
    return lambda: session.average.update(model, step=next(steps))


def _line(scores: dict[str, float | None]) -> str:
    figures = (f"{name} {scores[name]:.4f}" for name in ("accuracy", "auroc") if scores[name] is not None)
    return ", ".join(f"val {figure}" for figure in figures)


def _left(report: CompactionReport) -> str:
    macs, parameters = (after / before for before, after in (report.macs, report.parameters))
    return f"{percent(macs, 1)} of the multiplications and {percent(parameters, 1)} of the parameters left"


def _finish(session: Session, progress: Progress) -> None:
    """Score the last epoch, then the one to keep, and write what remains of the stage."""
    accelerator, data, stage = session.accelerator, session.data, session.stage
    parts = ("val", "test") if stage.kind == "arm" else ("val",)
    use_evaluated_weights(session)
    kept = last = evaluate(session, parts)
    if session.options.compact and stage.arm.criterion:
        weights = accelerator.get_state_dict(session.model)
        if accelerator.is_main_process:
            write_weights(stage.folder / LAST_WEIGHTS, weights)
    epoch = progress.epochs
    state = stage.folder / STATE
    if stage.keeps_best and progress.best_epoch < epoch:
        session.bare_model.load_state_dict(load_file(best_weights(state, progress.best_epoch)))
        kept = evaluate(session, parts)
        epoch = progress.best_epoch
    result: dict[str, Any] = {
        "epoch": epoch,
        "kept": kept.scores,
        "last": last.scores,
        "merges": total_merges(progress.merges) if stage.arm.criterion else {},
    }
    weights = accelerator.get_state_dict(session.model)
    if accelerator.is_main_process:
        write_curves(stage.folder, progress)
        for part, probabilities in kept.probabilities.items():
            write_predictions(stage.folder, part, data.task, data.splits[part], probabilities)
        if stage.fold is not None and stage.kind == "arm":  # those of all folds are scored together
            for part, probabilities in last.probabilities.items():
                write_predictions(stage.folder, last_part(part), data.task, data.splits[part], probabilities)
        if session.smaller:
            write_smaller(session)
            accelerator.print(f"{stage.title}: {_left(session.smaller)}, {_line(kept.scores['val'])}")
        write_result(stage.folder, None if session.smaller else weights, result)
        shutil.rmtree(state, ignore_errors=True)
    accelerator.wait_for_everyone()
