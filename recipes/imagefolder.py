"""Fine-tune a timm CNN on your own images, with and without in-model merging.

python recipes/imagefolder.py --data-dir my_images --prepare-only
accelerate launch recipes/imagefolder.py --data-dir my_images --model resnet18 --seeds 0 1 2
"""

from finetune.errors import exit_on_input_error
from finetune.options import parse_options
from finetune.sources.imagefolder import OwnImagesOptions, check_own_images, load_own_images
from finetune.trial import run_trial


def main(argv: list[str] | None = None) -> None:
    """Run the recipe with these arguments, by default those of the command line."""
    exit_on_input_error(lambda: _run(parse_options(OwnImagesOptions, argv)))


def _run(options: OwnImagesOptions) -> None:
    check_own_images(options)
    source = options.data_dir.resolve().name if options.data_dir else options.hub.rstrip("/").rpartition("/")[2]
    run_trial(options, lambda: load_own_images(options), f"{source}-{options.model}", main_first=False)


if __name__ == "__main__":
    main()
