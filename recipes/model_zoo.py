"""Run the paired trial for every model of a list on every data set of another, in one job or many.

python recipes/model_zoo.py --models resnet34 vgg19 densenet121 --datasets bloodmnist
python recipes/model_zoo.py --models resnet34 vgg19 densenet121 --datasets bloodmnist --shard 1/2
"""

import re
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import InputError, damage_told, exit_on_input_error, is_main_process
from finetune.files import write_json
from finetune.options import BASELINE, parse_options
from finetune.sources.options import DatasetOptions
from tyro.conf import Suppress

if TYPE_CHECKING:
    from finetune.grid import Outcome, Trial

# What the paper gives as L_s.
PAPER_SKIP_LAYERS = {"vgg16": 10, "vgg19": 10, "resnet34": 30}


@dataclass(kw_only=True)
class ZooOptions(DatasetOptions):
    """Run the paired trial for every model on every 2D data set of MedMNIST, each over all seeds; a stopped zoo goes on
    by the same command.
    """

    models: tuple[str, ...]
    """timm models with convolutions."""
    datasets: tuple[str, ...]
    """2D sets of MedMNIST, or digits."""
    shard: str = "1/1"
    """i/n: run the i-th, (i + n)-th ... of the trials alone. Jobs with other i may run at the same time."""
    skip_layers: int | float | None = None  # type: ignore[assignment]
    """Shallow convolutions that are never merged. None: the paper's number for vgg16, vgg19 (10) and resnet34 (30), a
    fraction of 0.6 for the others."""
    output: Path = Path("runs/zoo")
    """The zoo's folder, with a run folder per trial, zoo.csv, zoo.md, zoo.png and pooled.json."""
    model: Suppress[str] = ""
    dataset: Suppress[str] = ""
    resume: Suppress[bool] = True


def main(argv: list[str] | None = None) -> None:
    """Run the zoo with these arguments, by default those of the command line; exit code 1 if a cell failed."""
    failed: list[str] = []
    exit_on_input_error(lambda: failed.extend(_run(argv)))
    if failed:
        raise SystemExit(1)


def _run(argv: list[str] | None) -> list[str]:
    """Run the cells of the shard that are not done yet, and return the names of those that failed."""
    options = parse_options(ZooOptions, argv)
    # Not before the options are read: --help and mistakes in them are answered at once.
    from finetune.grid import run_on_ray, run_or_fail
    from finetune.runs.settings import check_run_folder
    from finetune.trial import check_trial
    from finetune.tuning import refuse_tuning
    from finetune.zoo import check_zoo, declare_family, errors_of, member, write_zoo

    refuse_tuning(options)
    cells = _cells(options)
    mine = _shard(options.shard, cells)
    check_zoo(options.output)
    for cell in cells:
        with damage_told(cell.output):
            check_run_folder(cell.output, cell, launch={})
    for cell in cells[: len(options.models)]:  # each model once: what is wrong with it is so on all data
        check_trial(cell)
    options.output.mkdir(parents=True, exist_ok=True)
    compared = [(cell, arm) for cell in cells for arm in cell.arms if arm != BASELINE]
    declare_family(options.output, [member(cell.dataset, cell.model, arm) for cell, arm in compared])
    if options.engine == "ray":
        for trial, outcome in run_on_ray([_trial(cell) for cell in mine]):
            _record(trial.options, outcome)
    else:
        for place, cell in enumerate(mine, 1):
            print(f"\n{cell.output.name}, {place} of {len(mine)}", flush=True)
            _record(cell, run_or_fail(_trial(cell)))
    text = write_zoo(options.output)
    print(f"\n{text}\nTable and picture: {options.output / 'zoo.md'}, {options.output / 'zoo.png'}")
    names = {cell.output.name for cell in mine}
    return [name for name in errors_of(options.output) if name in names]


def _cells(options: ZooOptions) -> list[DatasetOptions]:
    """The options of each trial: those of medmnist2d.py, so that it and report.py can take any of the run folders."""
    from finetune.sources.named import check_dataset
    from finetune.training.arms import with_compacted_arms

    for name, values in (("models", options.models), ("datasets", options.datasets)):
        if not values:
            raise InputError(f"--{name} is empty: name one or more")
        if len(set(values)) < len(values):
            raise InputError(f"--{name} {' '.join(values)} names one twice")
    if options.checkpoint and len(options.models) > 1:
        raise InputError(f"--checkpoint {options.checkpoint} holds the weights of one model: name that one in --models")
    shared = {field.name: getattr(options, field.name) for field in fields(DatasetOptions)}
    cells = []
    for dataset in options.datasets:
        for model in options.models:
            skip = options.skip_layers
            if skip is None:
                skip = PAPER_SKIP_LAYERS.get(model.partition(".")[0], DatasetOptions.skip_layers)
            cell = DatasetOptions(**shared | {"dataset": dataset, "model": model, "skip_layers": skip})
            check_dataset(cell)
            cell = replace(cell, output=options.output / f"{dataset}-{model}", config=None)
            cells.append(with_compacted_arms(cell))
    return cells


def _shard(text: str, cells: list[DatasetOptions]) -> list[DatasetOptions]:
    found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if not found or int(found[1]) > int(found[2]):
        raise InputError(f"--shard {text} must be i/n with i from 1 to n, such as 1/4")
    return cells[int(found[1]) - 1 :: int(found[2])]


def _trial(cell: DatasetOptions) -> "Trial":
    from finetune.grid import Trial
    from finetune.sources.named import load_dataset
    from finetune.zoo import count_expected_merges

    return Trial(cell, partial(load_dataset, cell), cell.output.name, add_sections=count_expected_merges)


def _record(cell: DatasetOptions, outcome: "Outcome") -> None:
    """Write down why a trial failed, for the next call to try it again; one that another job works on is left to it."""
    from finetune.runs.lock import RunHeld
    from finetune.zoo import error_file

    error = error_file(cell.output)
    if isinstance(outcome, RunHeld):
        print(f"{cell.output.name} is left out here: {outcome}", flush=True)
    elif outcome is None:
        error.unlink(missing_ok=True)
    else:
        print(f"{cell.output.name} failed: {outcome.sentence}", flush=True)
        if is_main_process() or outcome.alone:
            write_json(error, {"error": outcome.sentence, "traceback": outcome.trace})
        if outcome.alone:
            raise InputError(
                f"{cell.output.name} failed in one process while the others wait for it, so that the launch ends: the "
                "same command goes on"
            )


if __name__ == "__main__":
    main()
