"""What a data set that --dataset names has to bring along."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..data.images import ImageData
from ..options import Options


@dataclass(kw_only=True)
class DatasetOptions(Options):
    """Fine-tune a timm CNN on a 2D data set of MedMNIST, with and without in-model merging, from the same backbone."""

    dataset: str
    """A 2D set of MedMNIST (pneumoniamnist, bloodmnist ...), or digits, which come with scikit-learn."""
    source_size: Literal[28, 64, 128, 224] = 28
    """The file of MedMNIST to read, by the side of its images in pixels."""
    allow_modified: bool = False
    """Accept a file that is not MedMNIST's, by its md5."""
    prepared_dir: Path | None = None
    """Where images of 128 and 224 pixels are prepared, once, to be read by memory map. None: beside the caches of the
    datasets library (HF_DATASETS_CACHE)."""


@dataclass(frozen=True)
class Source:
    """A data set.

    Attributes:
        check: refuses options that have no effect on it, before anything is read or written.
        load: reads it, split and at the size that the options ask for.
    """

    check: Callable[[DatasetOptions], None]
    load: Callable[[DatasetOptions], ImageData]
