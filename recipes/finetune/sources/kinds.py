"""The sources by the options of the recipes for them, for those who take the data of any recipe."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..data.images import ImageData
from ..options import Options
from .chestxray14 import check_chestxray14, load_chestxray14
from .imagefolder import check_own_images, load_own_images, name_of
from .named import check_dataset, load_dataset
from .nih_labels import NAME as CHESTXRAY14
from .options import ChestXrayOptions, DatasetOptions, OwnImagesOptions


@dataclass(frozen=True)
class Kind:
    """Where images come from, as the recipe for them has it.

    Attributes:
        check: refuses what can't be used, before anything is read.
        load: reads the images.
        name: of the data, for the run folder.
        main_first: as run_trial has it.
    """

    check: Callable[[Any], None]
    load: Callable[[Any], ImageData]
    name: Callable[[Any], str]
    main_first: bool = False


KINDS: dict[type[Options], Kind] = {
    DatasetOptions: Kind(check_dataset, load_dataset, lambda options: options.dataset, main_first=True),
    ChestXrayOptions: Kind(check_chestxray14, load_chestxray14, lambda options: CHESTXRAY14),
    OwnImagesOptions: Kind(check_own_images, load_own_images, name_of),
}
