"""What sources have in common whose images are files, prepared once."""

from dataclasses import dataclass
from pathlib import Path

import datasets
import joblib

from ..errors import InputError
from ..options import Options


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
        return joblib.cpu_count() if self.prepare_workers is None else self.prepare_workers


def default_prepared_dir() -> Path:
    return Path(datasets.config.HF_DATASETS_CACHE) / "inmerge_optim"


def check_preparing(options: PreparedOptions) -> None:
    """Refuse options that contradict each other or are out of range."""
    if options.hub_revision != "main" and options.hub is None:
        raise InputError("--hub-revision has no effect without --hub: leave it out")
    if options.prepare_size is not None and options.prepare_size < options.image_size:
        raise InputError(
            f"--prepare-size {options.prepare_size} is less than --image-size {options.image_size}: choose a larger one"
        )
    if options.prepare_workers is not None and options.prepare_workers < 0:
        raise InputError(f"--prepare-workers must be at least 0, not {options.prepare_workers}")
