"""Fine-tune a timm CNN on ChestX-ray14, with and without in-model merging.

python recipes/chestxray.py --data-dir DIR --prepare-only
accelerate launch recipes/chestxray.py --data-dir DIR --config recipes/configs/paper_chestxray14.yaml
"""

from functools import partial

from finetune.errors import exit_on_input_error
from finetune.options import parse_options
from finetune.sources.options import ChestXrayOptions


def main(argv: list[str] | None = None) -> None:
    """Run the recipe with these arguments, by default those of the command line."""
    exit_on_input_error(lambda: _run(parse_options(ChestXrayOptions, argv)))


def _run(options: ChestXrayOptions) -> None:
    # Not before the options are read: --help and mistakes in them are answered at once.
    from finetune.grid import Trial
    from finetune.reports.chestxray14 import chestxray_sections
    from finetune.sources.chestxray14 import check_chestxray14, load_chestxray14
    from finetune.sources.nih_labels import NAME
    from finetune.sources.nih_tree import read_boxes
    from finetune.trial import check_trial
    from finetune.tuning import run_tuned

    check_chestxray14(options)
    if options.prepare_only:
        check_trial(options)
        data = load_chestxray14(options)
        counts = [f"{len(split):,} in {part}" for part, split in data.splits.items()]
        print(f"{NAME} is prepared: {', '.join(counts)}")
        return
    findings = read_boxes(options.data_dir) if options.data_dir else None
    sections = partial(chestxray_sections, findings=findings)
    run_tuned(
        Trial(options, partial(load_chestxray14, options), f"{NAME}-{options.model}", False, add_sections=sections)
    )


if __name__ == "__main__":
    main()
