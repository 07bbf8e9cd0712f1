"""Files of compacted models: their weights, and what was taken out, from which Python builds them again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from inmerge_optim.compaction import CompactionReport, remove_channels
from inmerge_optim.inspection import write
from inmerge_optim.models import CheckpointError, ModelError, create_timm_model, first_line

_KEY = "inmerge_compacted"  # of the file's metadata
_LARGEST_INPUT = 2**28  # numbers, which a file may ask for
_DESCRIPTION = ("model", "settings", "input_size")


def save_compacted(
    path: str | Path, smaller: nn.Module, report: CompactionReport, description: Mapping[str, Any]
) -> None:
    """Write a compacted model as a .safetensors file from which load_compacted builds it again.

    Args:
        path: of the file; another of that name is replaced.
        smaller: of compact, as is ``report``.
        description: ``model``, a name in timm's registry, or None for a model of one's own; ``settings``, of
            ``timm.create_model``: ``num_classes`` and ``in_chans`` alone; ``input_size``, the shape of the batch that
            compact was given.

    Raises:
        OSError: the file can't be written; nothing is left half-written.
    """
    removed = [[name, list(taken)] for name, taken in report.removed]
    text = json.dumps({**{name: description[name] for name in _DESCRIPTION}, "removed": removed})
    weights = {name: values.contiguous() for name, values in smaller.state_dict().items()}
    write(Path(path), save(weights, metadata={_KEY: text}))


def is_compacted(path: str | Path) -> bool:
    """Say whether a .safetensors file is what save_compacted writes, by its header alone."""
    with safe_open(path, framework="pt") as file:
        return _KEY in (file.metadata() or {})


def load_compacted(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Build a compacted model again from its file; no code in it is run, and nothing is fetched.

    Args:
        path: what save_compacted or ``inmerge compact`` wrote.
        model: the model before compaction, with any weights; None where the file names one of timm's.

    Returns:
        The model, in eval mode.

    Raises:
        CheckpointError: the file is none of these, or is of another model; the sentence begins with its path.
        ImportError: torch-pruning is not installed.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {}).get(_KEY, "null"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path} can't be read ({first_line(error)}): give a file of inmerge compact") from error
    if not _is_description(found):
        raise CheckpointError(f"{path} doesn't say what was taken out: give a file of inmerge compact")
    name = found["model"]
    try:
        if model is None and (name is None or ":" in name):  # a hub is not asked for what a file names
            raise ModelError("it is of no model in timm's registry: pass the model before compaction")
        whole = create_timm_model(name, **found["settings"]) if model is None else model
        removed = [(str(layer), tuple(int(channel) for channel in taken)) for layer, taken in found["removed"]]
        smaller = remove_channels(whole, torch.zeros(found["input_size"]), removed)
        smaller.load_state_dict(weights)
    except (ModelError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {first_line(error)}") from error
    return smaller


def _is_description(found: Any) -> bool:
    """Say whether metadata are as save_compacted writes them, whoever has written the file."""
    if not isinstance(found, dict) or found.keys() != {*_DESCRIPTION, "removed"}:
        return False
    name, settings, size = (found[key] for key in _DESCRIPTION)
    return (
        (name is None or isinstance(name, str))
        and isinstance(settings, dict)
        and settings.keys() <= {"num_classes", "in_chans"}
        and isinstance(size, list)
        and all(type(length) is int and length > 0 for length in [*size, *settings.values()])
        and math.prod(size) <= _LARGEST_INPUT
    )
