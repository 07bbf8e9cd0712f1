"""scikit-learn's bundled digits: real images for a demo that downloads nothing."""

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from ..data.images import ImageData, Split, resize
from ..data.tasks import Task
from ..errors import InputError
from .options import DatasetOptions
from .source import Source


def load_digits_data(image_size: int, split_seed: int) -> ImageData:
    """The 1,797 grey digits of 8 x 8 pixels at `image_size`, split 70 : 15 : 15, stratified by class."""
    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = bunch.target.astype(np.int64)
    train, held_out = train_test_split(
        np.arange(len(labels)), test_size=0.3, stratify=labels, random_state=split_seed, shuffle=True
    )
    val, test = train_test_split(held_out, test_size=0.5, stratify=labels[held_out], random_state=split_seed)

    def split(rows: np.ndarray) -> Split:
        return Split(resize(images[rows], image_size), labels[rows], [str(row) for row in rows])

    return ImageData("digits", Task("multi-class", tuple("0123456789")), split(train), split(val), split(test))


def _check(options: DatasetOptions) -> None:
    if options.source_size != 28 or options.data_dir or options.allow_modified or options.prepared_dir:
        raise InputError(
            "--source-size, --data-dir, --allow-modified and --prepared-dir have no effect on digits: leave them out"
        )


def _load(options: DatasetOptions) -> ImageData:
    return load_digits_data(options.image_size or 28, options.split_seed)


DIGITS = Source(_check, _load)
