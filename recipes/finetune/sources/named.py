"""The data sets that --dataset names. One is added here, and nowhere else."""

from ..data.images import ImageData
from ..errors import InputError, near_names
from .digits import DIGITS
from .medmnist import MEDMNIST, NAMES
from .options import DatasetOptions
from .source import Source

SOURCES: dict[str, Source] = {**dict.fromkeys(NAMES, MEDMNIST), "digits": DIGITS}


def check_dataset(options: DatasetOptions) -> None:
    """Refuse an unknown data set, and options that have no effect on it."""
    if options.dataset not in SOURCES:
        hint = near_names(options.dataset, SOURCES) or f": choose from {', '.join(SOURCES)}"
        raise InputError(f"--dataset {options.dataset} is no 2D set of MedMNIST{hint}")
    SOURCES[options.dataset].check(options)


def load_dataset(options: DatasetOptions) -> ImageData:
    """Read the data set that the options name."""
    return SOURCES[options.dataset].load(options)
