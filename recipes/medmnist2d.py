"""Fine-tune a timm CNN on a 2D data set of MedMNIST, with and without in-model merging.

python recipes/medmnist2d.py --dataset pneumoniamnist --model resnet18
accelerate launch recipes/medmnist2d.py --config recipes/configs/paper_medmnist.yaml --dataset bloodmnist
"""

from functools import partial

from finetune.errors import exit_on_input_error
from finetune.options import parse_options
from finetune.sources.options import DatasetOptions


def main(argv: list[str] | None = None) -> None:
    """Run the recipe with these arguments, by default those of the command line."""
    exit_on_input_error(lambda: _run(parse_options(DatasetOptions, argv)))


def _run(options: DatasetOptions) -> None:
    # Not before the options are read: --help and mistakes in them are answered at once.
    from finetune.grid import Trial
    from finetune.sources.named import check_dataset, load_dataset
    from finetune.tuning import run_tuned

    check_dataset(options)
    run_tuned(Trial(options, partial(load_dataset, options), f"{options.dataset}-{options.model}"))


if __name__ == "__main__":
    main()
