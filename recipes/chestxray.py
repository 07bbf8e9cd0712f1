"""Fine-tune a timm CNN on ChestX-ray14, with and without in-model merging.

python recipes/chestxray.py --data-dir DIR --prepare-only
accelerate launch recipes/chestxray.py --data-dir DIR --config recipes/configs/paper_chestxray14.yaml
"""

from finetune.errors import exit_on_input_error
from finetune.options import parse_options
from finetune.sources.options import ChestXrayOptions


def main(argv: list[str] | None = None) -> None:
    """Run the recipe with these arguments, by default those of the command line."""
    exit_on_input_error(lambda: _run(parse_options(ChestXrayOptions, argv)))


def _run(options: ChestXrayOptions) -> None:
    # Not before the options are read: --help and mistakes in them are answered at once.
    from finetune.recipe import trial_of
    from finetune.trial import check_trial
    from finetune.tuning import run_tuned

    trial = trial_of(options)
    if options.prepare_only:
        check_trial(options)
        data = trial.load_data()
        counts = [f"{len(split):,} in {part}" for part, split in data.splits.items()]
        print(f"{data.name} is prepared: {', '.join(counts)}")
        return
    run_tuned(trial)


if __name__ == "__main__":
    main()
