"""What data sets add to the options of the recipes; no large library is imported: --help is answered at once."""

from collections.abc import Sequence
from dataclasses import dataclass, make_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from ..data.squares import Fit
from ..options import Options, config_values

HELD_OUT = 0.2


def default_prepared_dir() -> Path:
    """Where prepared images are kept if not in --prepared-dir."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "inmerge_optim"


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


@dataclass(kw_only=True)
class PreparedOptions(Options):
    """Options of recipes whose images are prepared once."""

    hub: str | None = None
    """In place of --data-dir: owner/name of a data set on the Hugging Face hub, or a folder of parquet files."""
    hub_revision: str = "main"
    """Branch, tag or commit on the hub; the commit is recorded."""
    image_size: int = 224
    """Side of what the model sees of a prepared image: a random crop in training, the middle elsewhere."""
    prepare_size: int | None = None
    """Side that the images are prepared at. None: 8/7 of --image-size. Equal to --image-size: resized without crop."""
    prepared_dir: Path | None = None
    """Where prepared images are kept. None: beside the caches of the datasets library (HF_DATASETS_CACHE)."""
    prepare_workers: int | None = None
    """Processes that decode while preparing. None: one per core."""
    prepare_only: bool = False
    """Prepare the images and stop. On several machines do this on each before the launch."""
    allow_missing: bool = False
    """Go on without images that are missing or can't be read."""

    @property
    def side(self) -> int:
        """Of the prepared squares."""
        return self.prepare_size or round(self.image_size * 8 / 7)

    @property
    def prepared_in(self) -> Path:
        """The folder of all prepared images."""
        return self.prepared_dir or default_prepared_dir()

    @property
    def processes(self) -> int:
        """That decode; 0: this one."""
        import joblib

        return joblib.cpu_count() if self.prepare_workers is None else self.prepare_workers


@dataclass(kw_only=True)
class ChestXrayOptions(PreparedOptions):
    """Fine-tune a timm CNN on ChestX-ray14, with and without in-model merging, from the same backbone."""

    val_fraction: float = 0.125
    """Share of the patients of the official training list that are held out for validation."""
    split_file: Path | None = None
    """A CSV of one's own folds in place of the official lists: with the columns case and split, as imagefolder.py's
    split.csv, or Image Index and fold, as nih_labels.csv of jrzech/reproduce-chexnet; each row train, val or test."""
    hflip: float = 0.5
    """Probability of a horizontal flip of a training image."""


@dataclass(kw_only=True)
class OwnImagesOptions(PreparedOptions):
    """Fine-tune a timm CNN on your own images, with and without in-model merging, from the same backbone.

    The images come as a folder per class (--data-dir), as a table of paths (--csv), or as a data set of the datasets
    library (--hub).
    """

    csv: Path | None = None
    """A table of the images, CSV, TSV or parquet, whose paths start from --data-dir, or else from where it lies."""
    image_column: str | None = None
    """Column of paths. This and the next: None: the one of a usual name, which is told."""
    label_columns: tuple[str, ...] = ()
    """Column of classes, or of labels joined by | or ;, or several columns of 0 and 1."""
    patient_column: str | None = None
    """Column that names the patient."""
    split_column: str | None = None
    """Column with train, val or test."""
    subgroup_columns: tuple[str, ...] = ()
    """Columns whose values the report tells apart."""
    allow_outside: bool = False
    """Read images of a table that lie outside of its folder."""
    patient_regex: str | None = None
    """Names the patient by its first group, searched for in an image's path: r"(\\d+)_" for 0017_left.png."""
    positive_class: str | None = None
    """Class 1 of two. None: the one that is not called normal, negative and the like, or else the second by name."""
    fit: Fit = "pad"
    """What becomes of an image that is not square: pad it with black, crop its longer side, or squash it."""
    window: str = "file"
    """What becomes black and white of more than 8 bits: center,width; or file: that of a DICOM file, and else as
    percentile, which takes the 1st and the 99th of each image."""
    split_file: Path | None = None
    """The split.csv of another run on these images, in place of the split that they come with or that is drawn."""
    val_fraction: float = HELD_OUT
    """Share of the patients, or cases, that are held out for validation, where the images come without it."""
    test_fraction: float = HELD_OUT
    """Share of the patients, or cases, that are held out for testing, where the images come without it."""
    folds: int | None = None
    """Cross-validate in so many folds of the patients, or cases: each is tested in one fold, validated on in the fold
    before it, and trained on in the others."""
    allow_twins: bool = False
    """Go on with images or patients that are in test and in another split."""


# By --dataset of the recipes that take the data of any other; all others are sets of medmnist2d.py.
_OF_DATASET: dict[str, type[Options]] = {"chestxray14": ChestXrayOptions, "imagefolder": OwnImagesOptions}


def options_of_data(argv: Sequence[str]) -> type[Options]:
    """The options of the recipe for --dataset, found ahead of the parser because it says which options there are."""
    given = [value for word, value in pairwise(argv) if word == "--dataset"]
    given += [word.removeprefix("--dataset=") for word in argv if word.startswith("--dataset=")]
    name = given[-1] if given else str(config_values(list(argv)).get("dataset", ""))
    return _OF_DATASET.get(name, DatasetOptions)


def with_own_options(own: type, of_data: type[Options]) -> type[Options]:
    """The options of the recipe for some data, and those that another recipe adds to them."""
    kind = make_dataclass(own.__name__, [], bases=(own, of_data), kw_only=True)
    kind.__doc__ = own.__doc__
    return kind
