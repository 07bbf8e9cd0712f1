"""Fine-tune a timm CNN on a 2D data set of MedMNIST, with and without in-model merging.

python recipes/medmnist2d.py --dataset pneumoniamnist --model resnet18
accelerate launch recipes/medmnist2d.py --config recipes/configs/paper_medmnist.yaml --dataset bloodmnist
"""

from finetune.errors import exit_on_input_error
from finetune.options import parse_options
from finetune.sources.options import DatasetOptions


def main(argv: list[str] | None = None) -> None:
    """Run the recipe with these arguments, by default those of the command line."""
    exit_on_input_error(lambda: _run(parse_options(DatasetOptions, argv)))


def _run(options: DatasetOptions) -> None:
    # Not before the options are read: --help and mistakes in them are answered at once.
    from finetune.recipe import trial_of
    from finetune.tuning import run_tuned

    run_tuned(trial_of(options))


if __name__ == "__main__":
    main()
