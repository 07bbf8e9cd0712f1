"""timm models: by name, with the weights that were asked for, and able to do what the trial needs."""

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.models import load_state_dict
from torch import nn

from ..data.images import ImageData
from ..errors import InputError, near_names
from ..options import Options


def check_model_name(name: str) -> None:
    """Refuse a name that timm's registry doesn't have, offering near ones."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise InputError(f"--model {name} is unknown to timm{near_names(architecture, timm.list_models())}")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise InputError(
            f"--model {name}: timm's {architecture} has no weights {tag!r}, but {', '.join(tags) or 'none'}"
        )


def create_model(options: Options, data: ImageData, pretrained: bool) -> nn.Module:
    """The model with a new classifier for the task; `pretrained` loads --checkpoint, or else the hub's weights."""
    config = timm.get_pretrained_cfg(options.model)
    kwargs: dict[str, Any] = {"num_classes": len(data.task.classes), "in_chans": options.in_chans}
    if config is not None and config.fixed_input_size:
        kwargs["img_size"] = data.size
    if pretrained and options.checkpoint:
        check_checkpoint(options)
        kwargs["pretrained_cfg_overlay"] = {"file": str(options.checkpoint)}
    try:
        return timm.create_model(options.model, pretrained=pretrained, **kwargs)
    except Exception as error:  # whatever the hub's client, the network or a model's own constructor raise
        reason = _first_line(error)
        if pretrained and not options.checkpoint:
            raise InputError(
                f"the pretrained weights of {options.model} can't be had ({reason}): pass --no-pretrained, or a local "
                "file with --checkpoint FILE"
            ) from error
        raise InputError(
            f"timm can't build {options.model} with {kwargs} ({reason}): choose another --model"
        ) from error


def load_model(options: Options, data: ImageData, weights: Path) -> nn.Module:
    """The model as a stage has left it, from the weights in its folder."""
    model = create_model(options, data, pretrained=False)
    model.load_state_dict(load_file(weights))
    return model


def use_grad_checkpointing(model: nn.Module, name: str) -> None:
    """Let the model compute its activations again in the backward pass."""
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise InputError(f"--grad-checkpointing: timm's {name} can't do it: leave it out") from error


def check_checkpoint(options: Options) -> None:
    """Compare keys and shapes outside the classifier: timm alone loads another architecture's file without a word."""
    path = options.checkpoint
    try:
        found = load_state_dict(str(path), device="cpu")
    except Exception as error:  # missing, cut short, or no file of weights at all
        reason = _first_line(error)
        raise InputError(
            f"--checkpoint {path} can't be read as weights ({reason}): give a .safetensors or .pth file"
        ) from error
    reference = timm.create_model(options.model)
    classifier = reference.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))
    expected = {key: value for key, value in reference.state_dict().items() if not key.startswith(heads)}
    missing = [key for key in expected if key not in found and not key.endswith("num_batches_tracked")]
    foreign = [key for key in found if key not in expected and not key.startswith(heads)]
    differing = [key for key in expected if key in found and found[key].shape != expected[key].shape]
    if not (missing or foreign or differing):
        return
    if missing:
        detail = f"{missing[0]} and {len(missing) - 1} more are missing"
    elif differing:
        key = differing[0]
        detail = f"{key} has shape {tuple(found[key].shape)} in place of {tuple(expected[key].shape)}"
    else:
        detail = f"{foreign[0]} and {len(foreign) - 1} more are not part of it"
    raise InputError(
        f"--checkpoint {path} is no checkpoint of {options.model}: {detail}; give the --model it was saved from"
    )


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
            f"--image-size {size} does not fit {options.model} ({_first_line(error)}): choose a larger --image-size, "
            "or the model's own"
        ) from error
    expected = (count, len(data.task.classes))
    if output.shape != expected or not output.isfinite().all():
        raise InputError(
            f"{options.model} gives an output of shape {tuple(output.shape)} for {size} x {size} images, not finite "
            f"{expected}: choose another --model or a larger --image-size"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
