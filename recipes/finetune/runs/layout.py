"""Where files lie in a run folder: said here, and nowhere else."""

from pathlib import Path

# Of the run.
CONFIG = "config.yaml"
VERSIONS = "versions.json"
DATA = "data.json"
LOOKS = "looks.json"  # every time that the run was judged
SECTIONS = "sections.json"
SUMMARY = "summary.json"  # written last: where it stands, the run is finished
SUMMARY_TABLE = "summary.csv"
REPORT = "report.html"
PLOTS = "plots"
TENSORBOARD = "tensorboard"
LOCK = "inmerge.lock"  # there while a launch works in the folder
ROBUSTNESS = "robustness"  # a folder: what recipes/robustness.py found
FIGURES_TABLE = "figures.csv"  # in it, beside a SUMMARY and SECTIONS of its own

# Of a stage, in the folder that stage_folder names.
BACKBONE = "backbone"
STATE = "state"  # checkpoints, while the stage runs
CURVES = "metrics.csv"
MERGES = "merges.csv"
TIMING = "timing.json"  # of each epoch, and by itself, as everything else is the same whenever it is run
WEIGHTS = "model.safetensors"
SMALLER = "smaller.json"  # of a model that was made smaller: what of each layer is left
PROGRAM, ONNX = "model.pt2", "model.onnx"  # of one by merging, beside the weights: what other runtimes take
LAST_WEIGHTS = "last.safetensors"  # of a merging arm's last epoch, where a smaller model is made from them
CARD = "README.md"
RESULT = "result.json"  # written last: where it stands, the stage is finished
FOLDS = "folds.csv"  # in place of the weights, in a stage that is joined of those of its seed's folds


def stage_folder(run: Path, seed: int, stage: str, fold: int | None = None) -> Path:
    """The folder of a stage: BACKBONE, or an arm; in cross-validation of a fold, or what the folds are joined in."""
    return Path(run, f"seed_{seed}", *([] if fold is None else [f"fold_{fold}"]), stage)


def predictions_file(part: str) -> str:
    """The name of a stage's predictions of a split, "val" or "test"."""
    return f"predictions_{part}.csv"


def last_part(part: str) -> str:
    """What the last epoch's predictions of a split go by, which the stages of folds keep beside the best epoch's."""
    return f"last_{part}"
