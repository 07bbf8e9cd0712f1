"""What a model that a run has kept says of image files, to CSV.

python recipes/predict.py runs/pneumoniamnist-resnet18 new/*.png
python recipes/predict.py runs/mine scan.dcm folder_of_images --seed 2 --arm baseline --output scans.csv
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from finetune.errors import InputError, damage_told, exit_on_input_error
from finetune.files import check_written_here, write_csv
from finetune.options import whole
from tyro.conf import Positional

if TYPE_CHECKING:
    from finetune.prediction import Kept


@dataclass(kw_only=True)
class PredictOptions:
    """Say what a model that a run has kept sees in image files, each prepared as the run's own images were."""

    run: Positional[Path]
    """The run folder of a recipe."""
    images: Positional[tuple[Path, ...]]
    """Image files, and folders of them: PNG, JPEG, TIFF, BMP, WEBP, and DICOM where pydicom is installed."""
    seed: int | None = None
    """The model of which seed. None: the first of the run."""
    arm: str | None = None
    """The model of which arm. None: the only one beside the baseline."""
    allow_missing: bool = False
    """Go on without images that are missing or can't be read."""
    output: Path = Path("predictions.csv")
    """Where the table is written."""


def main(argv: list[str] | None = None) -> None:
    """Predict what these arguments ask for, by default those of the command line."""
    exit_on_input_error(lambda: _run(tyro.cli(PredictOptions, args=argv)))


def _run(options: PredictOptions) -> None:
    # Not before the options are read: --help and mistakes in them are answered at once.
    from finetune.data.catalogue import check_complete
    from finetune.prediction import kept_model, predict_files, table_of
    from finetune.runs.finished import FinishedRun

    output = whole("--output", options.output)
    check_written_here(output, b"image,prob_")
    paths = _files([whole("an image", path) for path in options.images])
    folder = whole("the run folder", options.run)
    with damage_told(folder):
        kept = kept_model(FinishedRun(folder), options.seed, options.arm)
        found, left_out = predict_files(kept, paths)
        table = table_of(kept, found)
    lacking = [f"{path} {reason}" for path, reason in left_out.items()]
    check_complete(lacking, len(paths), "can't be used", options.allow_missing)
    write_csv(output, *table)
    print("\n".join([*(f"Left out: {text}." for text in lacking), _sentence(kept, len(found)), str(output)]))


def _files(given: list[Path]) -> list[Path]:
    """The files, and those of the folders, each once."""
    if not given:
        raise InputError("no image is given: name files or folders after the run folder")
    from finetune.sources.folders import find_image_files

    found: list[Path] = []
    for path in given:
        inside = [Path(file.path) for file in find_image_files(path)[0]] if path.is_dir() else [path]
        if not inside:
            raise InputError(f"{path} holds no image: name another folder, or files")
        found += inside
    return list(dict.fromkeys(found))


def _sentence(kept: "Kept", count: int) -> str:
    cuts = [f"{kept.task.classes[k]} from {cut:.4g}" for k, cut in kept.thresholds.items()]
    thresholds = f"; called positive, as chosen on validation: {', '.join(cuts)}" if cuts else ""
    images = "1 image" if count == 1 else f"{count:,} images"
    models = f"the mean of {kept.run.folds} folds' models of " if kept.run.folds else ""
    return f"{images} by {models}{kept.arm}, seed {kept.seed}, of {kept.run.name}{thresholds}"


if __name__ == "__main__":
    main()
