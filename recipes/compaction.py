"""What smaller models cost: merging that makes channels equal, and the usual pruning at the same size, on any data set.

python recipes/compaction.py --dataset pneumoniamnist --model resnet18 --thresholds 0.2 0.3 0.4 --rounds 0 300
python recipes/compaction.py --config compaction.yaml --dataset breastmnist --data-dir DIR
"""

import sys
from dataclasses import dataclass, fields
from typing import Any

from finetune.errors import exit_on_input_error
from finetune.options import parse_options
from finetune.sources.options import options_of_data, with_own_options
from tyro.conf import Suppress


@dataclass(kw_only=True)
class CompactionOptions:
    """Merge at several thresholds, take out what is equal, and set the models beside pruned ones of the same size.

    All start from the same backbones. With --dataset chestxray14 and --dataset imagefolder it takes the options of the
    recipes for these as well. Needs inmerge_optim[compact].
    """

    dataset: str
    """A 2D set of MedMNIST, digits, chestxray14, or imagefolder for one's own images."""
    thresholds: tuple[str, ...] = ("0.2", "0.3", "0.4")
    """Values of tau: the lower, the more merges and the smaller the models."""
    rounds: tuple[int, ...] = (0,)
    """Rounds of merging without a step after each epoch of the merging arms."""
    ways: tuple[str, ...] = ("l1-pruned", "l2-pruned", "random-pruned", "kmeans")
    """What each smaller model is set beside, at its size: the backbone without its channels of the smallest norms, or
    random ones, or with those made one that k-means puts together; trained for as many epochs as the merging arms."""
    compact: Suppress[bool] = True
    arms: Suppress[tuple[str, ...]] = ()
    similarity_threshold: Suppress[float | str] = 0.3
    merge_rounds: Suppress[int | None] = None


def main(argv: list[str] | None = None) -> None:
    """Run the comparison with these arguments, by default those of the command line."""
    exit_on_input_error(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> None:
    of_data = options_of_data(argv)
    found: Any = parse_options(with_own_options(CompactionOptions, of_data), argv)
    # Not before the options are read: --help and mistakes in them are answered at once.
    from finetune.sweep import run_sweep
    from finetune.training.points import compaction_arms
    from finetune.tuning import refuse_tuning

    refuse_tuning(found)
    arms = compaction_arms(found.thresholds, found.rounds, found.ways)
    values = {field.name: getattr(found, field.name) for field in fields(of_data)}
    if len(found.rounds) == 1 and found.rounds[0]:
        values["merge_rounds"] = found.rounds[0]
    run_sweep("compaction", of_data(**values | {"arms": arms, "config": None}))


if __name__ == "__main__":
    main()
