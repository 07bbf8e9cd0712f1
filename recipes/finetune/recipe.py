"""The trial that a recipe's options ask for, on the data that they name."""

from collections.abc import Callable
from functools import partial
from typing import Any

from .grid import Trial
from .options import Options
from .reports.chestxray14 import chestxray_sections
from .reports.own_images import own_sections
from .sources.kinds import KINDS
from .sources.nih_tree import read_boxes
from .sources.options import ChestXrayOptions, OwnImagesOptions
from .trial import AddSections


def _chestxray_sections(options: ChestXrayOptions) -> AddSections:
    return partial(chestxray_sections, findings=read_boxes(options.data_dir) if options.data_dir else None)


# What is told of some data beyond the trial's own figures.
_SECTIONS: dict[type[Options], Callable[[Any], AddSections]] = {
    ChestXrayOptions: _chestxray_sections,
    OwnImagesOptions: lambda options: own_sections,
}


def trial_of(options: Options) -> Trial:
    """The trial, once what the options say of the data was checked; an InputError where that can't be used."""
    kind, sections = KINDS[type(options)], _SECTIONS.get(type(options))
    kind.check(options)
    name = f"{kind.name(options)}-{options.model}"
    return Trial(options, partial(kind.load, options), name, kind.main_first, sections and sections(options))
