"""Sweep over the settings of in-model merging, as the paper's Fig. 2 does, on any data set of the recipes.

python recipes/sensitivity.py --dataset pneumoniamnist --model resnet18 --sweep skip_layers=0,5,10 merge_prob=0.1,0.3
python recipes/sensitivity.py --config recipes/configs/paper_fig2.yaml --data-dir DIR
"""

import sys
from dataclasses import dataclass, fields
from typing import Any

from finetune.errors import exit_on_input_error
from finetune.options import parse_options
from finetune.sources.options import options_of_data, with_own_options
from tyro.conf import Suppress


@dataclass(kw_only=True)
class SweepOptions:
    """Fine-tune a timm CNN with in-model merging at every point of a sweep over its settings, from the same backbones.

    With --dataset chestxray14 and --dataset imagefolder it takes the options of the recipes for these as well.
    """

    dataset: str
    """A 2D set of MedMNIST, digits, chestxray14, or imagefolder for one's own images."""
    sweep: tuple[str, ...] = ()
    """A setting and its values: skip_layers=0,5,10 (L_s), similarity_threshold=dissimilar,0.1,4sd,q0.9 (tau),
    merge_weight=0.5:0.95:0.15 (alpha), merge_prob=0.1,0.3 (p). Given several times, each setting is swept by itself,
    with the options' values for the others."""
    crossed: bool = False
    """Run all values of all settings with each other."""
    confirm_seeds: tuple[int, ...] = ()
    """Seeds on which the point that was best on validation is run anew, beside the baseline."""
    arms: Suppress[tuple[str, ...]] = ()


def main(argv: list[str] | None = None) -> None:
    """Run the sweep with these arguments, by default those of the command line."""
    exit_on_input_error(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> None:
    of_data = options_of_data(argv)
    found: Any = parse_options(with_own_options(SweepOptions, of_data), _gathered(argv))
    # Not before the options are read: --help and mistakes in them are answered at once.
    from finetune.sweep import run_sweep
    from finetune.training.points import read_sweeps, sweep_arms
    from finetune.tuning import refuse_tuning

    refuse_tuning(found)
    arms = sweep_arms(read_sweeps(found.sweep), found, found.crossed)
    values = {field.name: getattr(found, field.name) for field in fields(of_data)}
    run_sweep("sensitivity", of_data(**values | {"arms": arms, "config": None}), found.confirm_seeds)


def _gathered(argv: list[str]) -> list[str]:
    """The words with the values of all --sweep after the first one of them, as the parser takes a list."""
    values: list[str] = []
    rest: list[str] = []
    taking = False
    for word in argv:
        if word.startswith("--"):
            flag, is_, value = word.partition("=")
            taking = flag == "--sweep"
            if taking:
                values += [value] if is_ else []
                continue
        (values if taking else rest).append(word)
    return [*rest, "--sweep", *values] if values else rest


if __name__ == "__main__":
    main()
