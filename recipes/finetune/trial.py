"""The paired trial: for each seed a backbone stage, then every arm from its last weights."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration
from torch import nn

from .data.images import ImageData
from .data.label_noise import with_label_noise
from .data.twins import note_near_twins, settle_leaks
from .errors import InputError, damage_told, first_line
from .judging.metrics import has_auroc
from .options import Options
from .reports.pages import write_report
from .reports.terminal import table
from .runs.finished import FinishedRun, current_summary
from .runs.folds import join_folds
from .runs.layout import BACKBONE, CONFIG, REPORT, TENSORBOARD, stage_folder
from .runs.lock import hold_run
from .runs.looks import record_look
from .runs.sections import Section, write_sections
from .runs.settings import (
    check_run_folder,
    check_same_data,
    check_same_versions,
    launch_of,
    package_versions,
    write_settings,
)
from .runs.summaries import read_summary, write_summary
from .signals import Stopped
from .training.arms import arm_of, check_arms, own_options, wrap_optimizer
from .training.augment import check_augmentations
from .training.averages import has_batch_norm
from .training.models import (
    bare_model,
    check_checkpoint,
    check_forward,
    check_model_name,
    create_model,
    origin_of,
    use_grad_checkpointing,
)
from .training.optim import create_optimizer
from .training.peers import LostPeer, is_lost_peer, watched_peers
from .training.plan import arm_stage, backbone_stage
from .training.randomness import be_deterministic, seed_globals
from .training.smaller import check_smaller
from .training.stage import run_stage
from .training.trackers import check_tracker

AddSections = Callable[[FinishedRun, Options, ImageData], list[Section]]
# The main process alone scores and pictures the finished arms, while the others wait.
_LONGEST_WAIT = timedelta(hours=3)


def run_trial(
    options: Options,
    load_data: Callable[[], ImageData],
    name: str,
    *,
    main_first: bool = True,
    add_sections: AddSections | None = None,
) -> None:
    """Run the trial, or what is left of it, and print its table.

    Everything that can be wrong with the input is checked before anything is written.

    Args:
        load_data: reads the data set; called once the options are known to be sound.
        name: the default name of the run folder.
        main_first: let the main process load first, so that it alone downloads. Not for loading that takes long, where
            the others' waiting would time out.
        add_sections: what the recipe has to tell beyond the trial's own figures; the main process calls it.
    """
    check_trial(options)
    run = options.output or Path("runs") / name
    accelerator = _accelerator(options, run)
    with _told_what_is_kept(run, options), hold_run(run, accelerator), watched_peers():
        _run_or_go_on(accelerator, options, run, load_data, main_first, add_sections)


def check_trial(options: Options) -> None:
    """Refuse what can be known to be wrong before any data are read; a data set may take hours to prepare."""
    check_model_name(options.model)
    check_arms(options)
    check_augmentations(options.aug)
    check_tracker(options.tracker)
    model = bare_model(options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the stages warn when they wrap
        for arm in options.arms:
            wrap_optimizer(arm_of(arm), create_optimizer(options, model, options.lr), model, options, options.seeds[0])
    if options.compact:
        check_smaller()
    if options.recalibrate_bn and not has_batch_norm(model):
        raise InputError(f"--recalibrate-bn has no effect on {options.model}, which has no batch norm: leave it out")
    if options.grad_checkpointing:
        use_grad_checkpointing(model, options.model)
    if options.pretrained and options.checkpoint:
        check_checkpoint(options)


@contextmanager
def _told_what_is_kept(run: Path, options: Options) -> Iterator[None]:
    """Say of a signal, of a dead worker and of a lost process what the run folder keeps, and how to go on."""
    try:
        yield
    except (Stopped, RuntimeError) as error:
        again = "give the same command again" + ("" if options.resume else " with --resume")
        kept = f"{run} keeps all up to the last whole epoch: {again}"
        if not (run / CONFIG).exists():
            kept = "nothing was begun: give the same command again"
        if isinstance(error, Stopped):
            error.kept = kept
            raise
        text = first_line(error)
        if text.startswith("DataLoader worker"):
            raise InputError(f"{text.strip('. ')}, as when memory runs out; choose fewer --workers; {kept}") from error
        if is_lost_peer(error):
            raise LostPeer(f"another process of the launch has ended ({text}); {kept}") from error
        raise


def _run_or_go_on(
    accelerator: Accelerator,
    options: Options,
    run: Path,
    load_data: Callable[[], ImageData],
    main_first: bool,
    add_sections: AddSections | None,
) -> None:
    data = _begin(accelerator, options, run, load_data, main_first)
    if data is not None:
        for seed in options.seeds:
            for stage in (BACKBONE, *options.arms):
                _run_stage(accelerator, options, data, run, seed, stage)
        if accelerator.is_main_process:
            _judge(run, options, data, add_sections)
    if accelerator.is_main_process:
        with damage_told(run) if data is None else nullcontext():
            tell_trial(run)
    accelerator.wait_for_everyone()  # the launch's process group stays: other trials of a zoo may follow


def _begin(
    accelerator: Accelerator,
    options: Options,
    run: Path,
    load_data: Callable[[], ImageData],
    main_first: bool,
    checked: bool = False,
) -> ImageData | None:
    """Check everything, and write the settings of a run that is new; the data, or None if it is judged already.

    Args:
        checked: whoever holds the folder has found that it may be used: what was begun there since is to go on.
    """
    per_process = _images_per_pass(options, accelerator.num_processes)
    launch = launch_of(accelerator)
    with damage_told(run):
        check_run_folder(run, replace(options, resume=True) if checked else options, launch)
        if _is_judged(run, options):
            return None
    with accelerator.main_process_first() if main_first else nullcontext():
        data = _load(accelerator, options, load_data)
    model = _check_data(options, min(data.folds or [data], key=lambda part: len(part.train)), per_process)
    with damage_told(run):
        check_same_data(run, data)
        check_same_versions(run, options)
    if options.keep_by == "auroc" and not all(has_auroc(data.task, part.val.labels) for part in data.folds or [data]):
        which = "A" if data.folds else "The"
        accelerator.print(
            f"{which} validation split of {data.name} has a single class, which leaves AUROC undefined: the epoch "
            "with the lowest validation log loss is kept."
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_settings(run, options, launch, note_near_twins(data), origin_of(model, options))
    accelerator.wait_for_everyone()
    return data


def _run_stage(accelerator: Accelerator, options: Options, data: ImageData, run: Path, seed: int, name: str) -> None:
    """Run BACKBONE or an arm of a seed, or what is left of it, on every fold where there are folds.

    Its folder is locked as well as the run's, for the stages of a run may be left to other processes.
    """
    with hold_run(stage_folder(run, seed, name), accelerator):
        for fold, part in enumerate(data.folds) if data.folds else [(None, data)]:
            if name == BACKBONE:
                stage = backbone_stage(options, run, seed, fold)
            else:
                stage = arm_stage(options, run, seed, name, fold)
            run_stage(accelerator, options, part, stage)
        if data.folds and accelerator.is_main_process:
            join_folds(run, seed, name, len(data.folds), data.task)


def _judge(run: Path, options: Options, data: ImageData, add_sections: AddSections | None) -> None:
    record_look(run, options.seeds, options.arms, package_versions())
    finished = FinishedRun(run)
    if add_sections and finished.arms:
        write_sections(run, add_sections(finished, options, data))
    (run / REPORT).unlink(missing_ok=True)  # that of an earlier look
    write_summary(run, finished.summary)
    write_report(finished)


def tell_trial(run: Path) -> None:
    """Print the table of a judged run, with its report made where that is missing."""
    if not (run / REPORT).exists():  # it was killed right after the summary
        write_report(FinishedRun(run))
    print(f"\n{table(current_summary(run))}\n\nReport: {run / REPORT}")


BEGIN, JUDGE = "begin", "judge"
Part = str | tuple[int, str]  # BEGIN; a seed's BACKBONE or an arm of it; JUDGE. Each needs those before it.


def run_part(
    options: Options, load_data: Callable[[], ImageData], part: Part, add_sections: AddSections | None
) -> bool:
    """Run a part of a trial in a process of its own, alone; whoever starts the parts holds the run folder's lock.

    A part that was killed goes on when it is run again, the beginning too, as the folder was checked before it.

    Args:
        options: with the run folder as their output.

    Returns:
        Whether there is more to do: False where BEGIN finds that the run is judged already.
    """
    run = options.output
    accelerator = _accelerator(options, run)
    if part == BEGIN:
        return _begin(accelerator, options, run, load_data, main_first=False, checked=True) is not None
    data = _load(accelerator, options, load_data)
    if part == JUDGE:
        _judge(run, options, data, add_sections)
    else:
        _run_stage(accelerator, options, data, run, *part)
    return True


def _load(accelerator: Accelerator, options: Options, load_data: Callable[[], ImageData]) -> ImageData:
    data = _settle_leaks(accelerator, options, load_data())
    return _limit_train(options, with_label_noise(data, options.label_noise, options.split_seed))


def _is_judged(run: Path, options: Options) -> bool:
    """Whether the run has a summary of all the seeds and arms that are asked for."""
    summary = read_summary(run)
    if summary is None:
        return False
    arms = {*summary["arms"], *summary.get("diverged", {})}
    return set(summary["seeds"]) == set(options.seeds) and arms == set(options.arms)


def _accelerator(options: Options, run: Path) -> Accelerator:
    """An accelerator that splits batches over the processes, with all made deterministic that can be."""
    be_deterministic()
    here, devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.accelerator.device_count()
    if 0 < devices < here:
        raise InputError(
            f"the launcher started {here} processes on this machine, which shows {devices} GPU(s): launch one for each"
        )
    try:
        accelerator = Accelerator(
            # Without this accelerate takes the processes of torchrun on the CPU for so many runs of their own.
            cpu=not torch.accelerator.is_available(),
            mixed_precision=options.mixed_precision,
            gradient_accumulation_steps=options.grad_accum_steps,
            dataloader_config=DataLoaderConfiguration(split_batches=True),
            log_with=None if options.tracker == "none" else options.tracker,
            project_config=ProjectConfiguration(logging_dir=str(run / TENSORBOARD)),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_LONGEST_WAIT)],
        )
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--mixed-precision {options.mixed_precision} is not possible here ({reason})") from error
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise InputError(
            f"the launcher started {launched} processes, and accelerate joined {accelerator.num_processes}: on the CPU "
            "launch with torchrun, elsewhere see that each process has a device"
        )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise InputError(
            f"the launcher asks for {accelerator.distributed_type.value}, but the recipes keep the whole of a small "
            "model on each process: launch with --multi_gpu, which is DDP"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # accelerate would train in float32 without a word
        raise InputError("--mixed-precision fp16 is not possible on the CPU: choose bf16 or no")
    return accelerator


def _images_per_pass(options: Options, processes: int) -> int:
    """Images per forward pass and process."""
    parts = processes * options.grad_accum_steps
    if options.batch_size % parts:
        raise InputError(
            f"--batch-size {options.batch_size} can't be shared by {processes} processes and "
            f"{options.grad_accum_steps} accumulation steps: choose a multiple of {parts}"
        )
    return options.batch_size // parts


def _settle_leaks(accelerator: Accelerator, options: Options, data: ImageData) -> ImageData:
    data, sentences = settle_leaks(data, options.drop_twins)
    for sentence in sentences:
        accelerator.print(f"{sentence}.")
    return data


def _limit_train(options: Options, data: ImageData) -> ImageData:
    if options.limit_train is None:
        return data
    if options.limit_train >= len(data.train):
        raise InputError(
            f"--limit-train {options.limit_train} has no effect on the {len(data.train)} training images of "
            f"{data.name}: choose fewer, or leave it out"
        )
    if data.folds:
        return replace(data, folds=tuple(_limit_train(options, fold) for fold in data.folds))
    return replace(data, train=data.train.limited(options.limit_train, options.split_seed))


def _check_data(options: Options, data: ImageData, per_process: int) -> nn.Module:
    """Refuse options that don't go with the data, and try the model, which is returned, on the data's shape."""
    if options.in_chans < data.channels:
        raise InputError(f"--in-chans 1 needs grey images, and {data.name} has {data.channels} channels: leave it out")
    if options.batch_size > len(data.train):
        raise InputError(
            f"--batch-size {options.batch_size} is more than the {len(data.train)} training images of {data.name}: "
            "choose a smaller one"
        )
    if options.smoothing and data.task.multi_label:
        raise InputError(f"--smoothing has no effect on the labels of {data.name}, which has no classes: leave it out")
    for name in options.arms:
        if data.task.multi_label and own_options(arm_of(name), options).smoothing:
            raise InputError(
                f"--arms {name} smooths classes, and {data.name} has labels in place of them: leave it out"
            )
    fresh = not options.resume
    seed_globals(options.seeds[0], "initialisation", 0, rank=0)
    model = create_model(options, data, pretrained=options.pretrained and (fresh or options.checkpoint is not None))
    check_forward(model, options, data, per_process)
    return model
