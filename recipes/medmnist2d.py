"""Fine-tune a timm CNN on a 2D data set of MedMNIST, with and without in-model merging.

python recipes/medmnist2d.py --dataset pneumoniamnist --model resnet18
accelerate launch recipes/medmnist2d.py --config recipes/configs/paper_medmnist.yaml --dataset bloodmnist
"""

from dataclasses import dataclass
from typing import Literal

from finetune.data.images import ImageData
from finetune.errors import InputError, exit_on_input_error, near_names
from finetune.options import Options, parse_options
from finetune.sources.digits import load_digits_data
from finetune.sources.medmnist import NAMES, load_medmnist
from finetune.trial import AddSections, run_trial


@dataclass(kw_only=True)
class MedMNISTOptions(Options):
    """Fine-tune a timm CNN on a 2D data set of MedMNIST, with and without in-model merging, from the same backbone."""

    dataset: str
    """A 2D set of MedMNIST (pneumoniamnist, bloodmnist ...), or digits, which come with scikit-learn."""
    source_size: Literal[28, 64, 128, 224] = 28
    """The file of MedMNIST to read, by the side of its images in pixels."""
    allow_modified: bool = False
    """Accept a file that is not MedMNIST's, by its md5."""


def main(argv: list[str] | None = None) -> None:
    """Run the recipe with these arguments, by default those of the command line."""
    exit_on_input_error(lambda: run(parse_options(MedMNISTOptions, argv)))


def run(options: MedMNISTOptions, add_sections: AddSections | None = None) -> None:
    """Run the trial that the options ask for; see run_trial for `add_sections`."""
    check_dataset(options)
    run_trial(options, lambda: _load(options), f"{options.dataset}-{options.model}", add_sections=add_sections)


def check_dataset(options: MedMNISTOptions) -> None:
    """Refuse an unknown data set, and options that have no effect on it."""
    known = [*NAMES, "digits"]
    if options.dataset not in known:
        hint = near_names(options.dataset, known) or f": choose from {', '.join(known)}"
        raise InputError(f"--dataset {options.dataset} is no 2D set of MedMNIST{hint}")
    if options.dataset == "digits":
        if options.source_size != 28 or options.data_dir or options.allow_modified:
            raise InputError("--source-size, --data-dir and --allow-modified have no effect on digits: leave them out")
    elif options.split_seed and options.limit_train is None:
        raise InputError(
            f"--split-seed has no effect on {options.dataset}, which has official splits, without --limit-train: leave "
            "it out"
        )


def _load(options: MedMNISTOptions) -> ImageData:
    if options.dataset == "digits":
        return load_digits_data(options.image_size or 28, options.split_seed)
    return load_medmnist(
        options.dataset, options.source_size, options.image_size, options.data_dir, options.allow_modified
    )


if __name__ == "__main__":
    main()
