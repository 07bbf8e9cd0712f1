"""Fine-tune a timm CNN on your own images, with and without in-model merging.

python recipes/imagefolder.py --data-dir my_images --prepare-only
accelerate launch recipes/imagefolder.py --data-dir my_images --model resnet18 --seeds 0 1 2
"""

from finetune.errors import exit_on_input_error
from finetune.options import parse_options
from finetune.sources.options import OwnImagesOptions


def main(argv: list[str] | None = None) -> None:
    """Run the recipe with these arguments, by default those of the command line."""
    exit_on_input_error(lambda: _run(parse_options(OwnImagesOptions, argv)))


def _run(options: OwnImagesOptions) -> None:
    # Not before the options are read: --help and mistakes in them are answered at once.
    from finetune.recipe import trial_of
    from finetune.reports.look import look_at
    from finetune.sources.imagefolder import find_own_images
    from finetune.trial import check_trial
    from finetune.tuning import run_tuned

    trial = trial_of(options)
    if options.prepare_only:
        check_trial(options)
        print(look_at(find_own_images(options, allow_missing=True), options.image_size))
        return
    run_tuned(trial)


if __name__ == "__main__":
    main()
