"""The data that a run was trained on, opened again by what its config.yaml says."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from ..data.images import ImageData
from ..errors import InputError
from ..options import Options, parse_options
from .kinds import KINDS
from .options import ChestXrayOptions, DatasetOptions, OwnImagesOptions

# Per kind of options an option that it alone has.
_TOLD_BY: dict[str, type[Options]] = {
    "dataset": DatasetOptions,
    "csv": OwnImagesOptions,
    "hub": ChestXrayOptions,  # own images have it too, and come first
}


def reopened(config: Path, settings: dict[str, Any], elsewhere: dict[str, Path | None]) -> tuple[Options, ImageData]:
    """The options of a run and its data.

    Args:
        config: the run's config.yaml.
        settings: its content.
        elsewhere: options that say where files lie now, such as data_dir; None: where they lay.
    """
    kind = next((found for name, found in _TOLD_BY.items() if name in settings), None)
    if kind is None:
        raise InputError(f"{config} names no data that a recipe knows: give the run folder of a recipe")
    known = {field.name for field in fields(kind)}
    words = [
        word
        for name, path in elsewhere.items()
        if path is not None and name in known
        for word in (f"--{name.replace('_', '-')}", str(path))
    ]
    options = parse_options(kind, ["--config", str(config), *words])
    KINDS[kind].check(options)
    return options, KINDS[kind].load(options)
