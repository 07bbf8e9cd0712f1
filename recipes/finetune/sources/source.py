"""What a data set that --dataset names has to bring along."""

from collections.abc import Callable
from dataclasses import dataclass

from ..data.images import ImageData
from .options import DatasetOptions


@dataclass(frozen=True)
class Source:
    """A data set.

    Attributes:
        check: refuses options that have no effect on it, before anything is read or written.
        load: reads it, split and at the size that the options ask for.
    """

    check: Callable[[DatasetOptions], None]
    load: Callable[[DatasetOptions], ImageData]
