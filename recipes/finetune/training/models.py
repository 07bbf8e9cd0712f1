"""timm models: by name, with the weights that were asked for, and able to do what the trial needs."""

from pathlib import Path
from typing import Any, Protocol

import timm
import torch
from safetensors.torch import load_file
from torch import nn

from inmerge_optim.compacted_files import is_compacted, load_compacted
from inmerge_optim.models import CheckpointError, ModelError, check_name, create_timm_model, read_checkpoint

from ..data.images import ImageData
from ..data.tasks import Task
from ..errors import InputError, first_line
from ..options import Options
from . import squeezenet as squeezenet  # registers it with timm


class Learnt(Protocol):
    """What a model depends on of its data: ImageData, and what a run folder tells of it."""

    @property
    def task(self) -> Task: ...

    @property
    def size(self) -> int: ...


def check_model_name(name: str) -> None:
    """Refuse a name that timm's registry doesn't have, offering near ones."""
    try:
        check_name(name)
    except ModelError as error:
        raise InputError(f"--model {error}") from error


def bare_model(options: Options) -> nn.Module:
    """The model with random weights and timm's own classifier: for what can be checked before there are data."""
    try:
        return create_timm_model(options.model, in_chans=options.in_chans)
    except ModelError as error:
        raise InputError(f"--model {error}: choose another one") from error


def create_model(options: Options, data: Learnt, pretrained: bool) -> nn.Module:
    """The model with a new classifier for the task; `pretrained` loads --checkpoint, or else the hub's weights."""
    config = timm.get_pretrained_cfg(options.model)
    settings: dict[str, Any] = {"num_classes": len(data.task.classes), "in_chans": options.in_chans}
    if config is not None and config.fixed_input_size:
        settings["img_size"] = data.size
    try:
        if pretrained and options.checkpoint:
            check_checkpoint(options)
            settings["pretrained_cfg_overlay"] = {"file": str(options.checkpoint), "custom_load": False}
        return create_timm_model(options.model, pretrained=pretrained, **settings)
    except CheckpointError as error:
        raise InputError(f"{error}: pass --no-pretrained, or a local file with --checkpoint FILE") from error
    except ModelError as error:
        raise InputError(f"--model {error}: choose another one") from error


def load_model(options: Options, data: Learnt, weights: Path) -> nn.Module:
    """The model as a stage has left it, made smaller or not, from the weights in its folder."""
    model = create_model(options, data, pretrained=False)
    if not is_compacted(weights):
        model.load_state_dict(load_file(weights))
        return model
    try:
        return load_compacted(weights, model)
    except (CheckpointError, ImportError) as error:
        raise InputError(f"{weights} can't be loaded ({first_line(error)})") from error


def origin_of(model: nn.Module, options: Options) -> dict[str, Any]:
    """Which of timm's weights a model was begun with, by their exact tag, and what they expect of images."""
    config: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]  # timm's models have it
    name, tag = config.get("architecture") or options.model, config.get("tag")
    found = {"name": f"{name}.{tag}" if tag else name, "mean": list(config["mean"]), "std": list(config["std"])}
    if options.pretrained and not options.checkpoint:
        found["weights"] = config.get("hf_hub_id") or config.get("url") or None
    return found


def use_grad_checkpointing(model: nn.Module, name: str) -> None:
    """Let the model compute its activations again in the backward pass."""
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise InputError(f"--grad-checkpointing: timm's {name} can't do it: leave it out") from error


def check_checkpoint(options: Options) -> None:
    """Compare the file with the model but for the classifier, which is made anew."""
    try:
        read_checkpoint(options.checkpoint, create_timm_model(options.model), classifier=False)
    except CheckpointError as error:
        raise InputError(f"--checkpoint {error}") from error


def check_forward(model: nn.Module, options: Options, data: ImageData, per_process: int) -> None:
    """Train-mode forward of a batch as small as each process sees, so that a size that the model can't take is told
    before anything is written. The model's batch norm statistics are changed.
    """
    size = data.size
    count = min(per_process, 2)
    model.train()
    try:
        with torch.no_grad():
            output = model(torch.zeros(count, options.in_chans, size, size))
    except (RuntimeError, ValueError, AssertionError) as error:
        if "more than 1 value per channel" in str(error):
            raise InputError(
                f"{options.model} reduces {size} x {size} images to single values, which batch norm can't train on "
                "with one image per process and pass: choose a larger --batch-size or --image-size"
            ) from error
        raise InputError(
            f"--image-size {size} does not fit {options.model} ({first_line(error)}): choose a larger --image-size, "
            "or the model's own"
        ) from error
    expected = (count, len(data.task.classes))
    if output.shape != expected or not output.isfinite().all():
        raise InputError(
            f"{options.model} gives an output of shape {tuple(output.shape)} for {size} x {size} images, not finite "
            f"{expected}: choose another --model or a larger --image-size"
        )
