"""A stage at work: what accelerate has prepared for it, and how its batches become inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from inmerge_optim.compaction import CompactionReport

from ..data import tasks
from ..data.images import ImageData
from ..options import Options
from .arms import COMPACT, own_options, wrap_optimizer
from .augment import Draws, augment, draw_augmentations
from .averages import create_average, has_batch_norm
from .batches import (
    channel_statistics,
    crop,
    crop_corners,
    eval_loader,
    flip_mask,
    model_input,
    train_loader,
)
from .epoch import Batch
from .merge_tally import MergeTally, watched_layers
from .models import create_model, load_model, use_grad_checkpointing
from .optim import create_optimizer, create_schedule
from .plan import Stage
from .randomness import seed_globals
from .smaller import make_smaller


@dataclass(frozen=True)
class Session:
    """What a stage works with.

    Attributes:
        model, optimizer, loaders: as accelerate has prepared them; a loader per split.
        wrapped: the optimizer before that, whose settings can be changed between epochs.
        tally: what was merged.
        average: holds the weights to evaluate, where these are an average.
        as_input: from a batch to what the model takes; for training with the views of its epoch.
        loss: from logits and labels.
        smaller: what was taken out of the model, if anything.
    """

    accelerator: Accelerator
    options: Options
    data: ImageData
    stage: Stage
    model: nn.Module
    optimizer: Optimizer
    wrapped: Any
    schedule: Scheduler
    loaders: dict[str, Any]
    tally: MergeTally
    average: ModelEmaV3 | AveragedModel | None
    as_input: Callable[..., torch.Tensor]
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    smaller: CompactionReport | None

    @property
    def recalibrates(self) -> bool:
        """Whether batch norm's statistics are estimated anew before evaluations, as also where blending made them."""
        blended = self.stage.arm.smaller is not None and self.stage.arm.smaller.way == COMPACT
        return self.options.recalibrate_bn or (blended and has_batch_norm(self.bare_model))

    @property
    def bare_model(self) -> nn.Module:
        """The model without what accelerate wrapped around it."""
        return self.accelerator.unwrap_model(self.model)


def prepare_session(accelerator: Accelerator, options: Options, data: ImageData, stage: Stage) -> Session:
    """Create everything that the stage needs, as it is before its first epoch."""
    options = own_options(stage.arm, options)
    seed_globals(stage.seed, "initialisation", 0, rank=0)
    if stage.start is None:
        model = create_model(options, data, pretrained=options.pretrained)
    else:
        model = load_model(options, data, stage.start)
    smaller = None
    if stage.arm.smaller:
        model, smaller = make_smaller(
            model, options, data, stage.seed, stage.arm.smaller, stage.size_of, accelerator.device
        )
    if options.grad_checkpointing:
        use_grad_checkpointing(model, options.model)
    memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
    model.to(memory_format=memory_format)
    config = model.pretrained_cfg
    wrapped = wrap_optimizer(stage.arm, create_optimizer(options, model, stage.lr), model, options, stage.seed)
    watched = watched_layers(model, stage.arm, options) if stage.kind == "arm" else []
    schedule = create_schedule(options, wrapped, stage.kind, stage.epochs)
    average = create_average(stage.arm.average, model) if stage.arm.average else None
    if options.compile:
        model.compile()  # in place, so that the names of its weights stay
    tally = MergeTally(model, wrapped, watched)
    loaders = _loaders(accelerator, options, data, stage)
    if accelerator.scaler is not None:  # one of its own, as the scale that another stage came to is no start for this
        accelerator.scaler = torch.amp.GradScaler(accelerator.device.type)
    model, optimizer, *prepared = accelerator.prepare(model, wrapped, *loaders.values())
    if average is not None:
        average = accelerator.prepare_model(average, evaluation_mode=True)  # part of the checkpoints, but not trained
    mean, std = (values.to(accelerator.device) for values in channel_statistics(config, options.in_chans))
    weights = options.class_weights and tasks.balanced_weights(data.task, data.train.labels).to(accelerator.device)
    return Session(
        accelerator,
        options,
        data,
        stage,
        model,
        optimizer,
        wrapped,
        schedule,
        dict(zip(loaders, prepared, strict=True)),
        tally,
        average,
        as_input=partial(_as_input, mean=mean, std=std, size=data.size, memory_format=memory_format),
        loss=partial(tasks.loss, data.task, weights=weights, smoothing=options.smoothing),
        smaller=smaller,
    )


def _loaders(accelerator: Accelerator, options: Options, data: ImageData, stage: Stage) -> dict[str, Any]:
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
    held_out = {part: eval_loader(data.splits[part], batch_size=batch_size, **loading) for part in ("val", "test")}
    return {"train": train, **held_out}


def _as_input(
    batch: Batch,
    mean: torch.Tensor,
    std: torch.Tensor,
    size: int,
    memory_format: torch.memory_format,
    views: Draws | None = None,
) -> torch.Tensor:
    rows = batch["rows"]
    of_batch = {name: values[rows] for name, values in (views or {}).items()}
    images = crop(batch["images"], size, of_batch.pop("corners", None))
    flipped = of_batch.pop("hflips", None)
    return model_input(augment(images, of_batch), mean, std, flipped).contiguous(memory_format=memory_format)


def epoch_views(session: Session, epoch: int) -> Draws:
    """How each training image is seen in an epoch, on the device: where its crop begins, flips and augmentation."""
    options, data, stage = session.options, session.data, session.stage
    of_epoch = (stage.seed, stage.kind, epoch)
    views = draw_augmentations(options.aug, len(data.train), *of_epoch)
    margin = data.train.images.shape[-1] - data.size
    if margin:
        views["corners"] = crop_corners(len(data.train), margin, *of_epoch)
    if options.hflip:
        views["hflips"] = flip_mask(len(data.train), options.hflip, *of_epoch)
    return {name: values.to(session.accelerator.device) for name, values in views.items()}
