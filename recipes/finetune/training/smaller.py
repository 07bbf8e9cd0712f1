"""Models made smaller ahead of a stage: by what merging has made equal, or to the size that this gave by usual ways.

The usual ways are channel pruning as torch-pruning does it: the same share of the channels of every layer goes, those
with the smallest norms, or random ones; and clusters by k-means, of which the means stay.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import nn

from inmerge_optim.compaction import CompactionReport, Removal, compact, compact_clusters, compare, remove_channels

from ..errors import InputError, first_line
from ..files import read_json, write_json
from ..options import Options
from ..runs.layout import SMALLER
from .arms import COMPACT, Reduction, wrap_optimizer
from .models import Learnt
from .optim import create_optimizer
from .randomness import seed_globals

FINAL_ROUNDS = 1500
_SEARCH = 9  # halvings of the range of shares in which that of a number of multiplications is looked for
_NEAR_ENOUGH = 0.002  # of that number
_EXAMPLES = 2


def check_smaller() -> None:
    """Refuse arms of smaller models where what they need isn't installed."""
    try:
        import torch_pruning as torch_pruning
    except ImportError as error:
        raise InputError(
            f"--compact needs torch-pruning, and it can't be imported ({first_line(error)}): pip install "
            '"inmerge_optim[compact]"'
        ) from error


def input_size(options: Options, data: Learnt) -> tuple[int, ...]:
    """The shape of the batch that smaller models are made on, which their files tell."""
    return _EXAMPLES, options.in_chans, data.size, data.size


def make_smaller(
    model: nn.Module,
    options: Options,
    data: Learnt,
    seed: int,
    way: Reduction,
    size_of: Path | None,
    device: torch.device,
) -> tuple[nn.Module, CompactionReport]:
    """A smaller model, and what was taken out.

    Args:
        model: with the weights that it is made from, on the CPU.
        way: how it is made.
        size_of: the folder of the stage whose size is aimed at, where that is not what comes of the way.
        device: where kernels are merged.
    """
    inputs = torch.randn(input_size(options, data), generator=torch.Generator().manual_seed(0))
    with _told(options.model):
        if way.way == COMPACT:
            base = create_optimizer(options, model, options.lr)
            merging: Any = wrap_optimizer(way.merging, base, model, options, seed)
            model.to(device)
            merging.merge(rounds=options.final_rounds or FINAL_ROUNDS)
            return compact(model.cpu(), inputs)
        size = read_json(size_of / SMALLER)
        if way.way == "kmeans":
            left = {layer["name"]: layer["after"] for layer in size["layers"]}
            return compact_clusters(model, inputs, partial(_nearest, left=left, seed=seed))
        removed = _removed_by_pruning(model, inputs, way.way, size["macs"], seed)
        smaller = remove_channels(model, inputs, removed)
        return smaller, compare(model, smaller, inputs, removed)


@contextmanager
def _told(name: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, ImportError) as error:
        raise InputError(f"{name} can't be made smaller ({first_line(error)}): leave --compact out") from error


def write_size(folder: Path, report: CompactionReport) -> None:
    """What became of the model, as far as that is the same whenever it is done; its file tells what was taken out."""
    figures = ("parameters", "macs", "largest_difference", "largest_output")
    layers = [layer._asdict() for layer in report.layers]
    write_json(folder / SMALLER, {"layers": layers, **{name: getattr(report, name) for name in figures}})


def _nearest(name: str, kernels: torch.Tensor, left: Mapping[str, int], seed: int) -> list[list[int]]:
    """The clusters that k-means finds in a layer's kernels, as many as are to be left."""
    if left[name] == len(kernels):
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fewer distinct kernels than clusters
        labels = KMeans(left[name], n_init=4, random_state=seed).fit_predict(kernels.numpy())
    clusters = [np.flatnonzero(labels == label).tolist() for label in range(left[name])]
    return [cluster for cluster in clusters if len(cluster) > 1]


def _removed_by_pruning(model: nn.Module, inputs: torch.Tensor, way: str, macs: list[int], seed: int) -> list[Removal]:
    """What is taken out, layer by layer, to come to a number of multiplications as near as shares can.

    Args:
        macs: of the whole model, and that number.
    """
    whole, aim = macs
    low, high = 0.0, 1.0
    best: tuple[float, list[Removal]] = (whole / aim - 1, [])
    for _ in range(_SEARCH):
        if best[0] < _NEAR_ENOUGH:
            break
        share = (low + high) / 2
        removed, found = _pruned(model, inputs, way, share, seed)
        best = min(best, (abs(found - aim) / aim, removed))
        low, high = (share, high) if found > aim else (low, share)
    return best[1]


def _pruned(model: nn.Module, inputs: torch.Tensor, way: str, share: float, seed: int) -> tuple[list[Removal], int]:
    """What goes when a share of each layer's channels does, and the multiplications that are left."""
    import torch_pruning

    whole, pruned = model, copy.deepcopy(model).eval()
    importance: dict[str, Any] = {
        "l1-pruned": partial(torch_pruning.importance.MagnitudeImportance, p=1),
        "l2-pruned": partial(torch_pruning.importance.MagnitudeImportance, p=2),
        "random-pruned": torch_pruning.importance.RandomImportance,
    }
    seed_globals(seed, "random channels", 0, rank=0)
    names = {module: name for name, module in pruned.named_modules()}
    pruner = torch_pruning.pruner.BasePruner(
        pruned,
        inputs,
        importance[way](),
        pruning_ratio=share,
        ignored_layers=[_last_layer(pruned, inputs)],
        in_channel_groups={},  # its defaults are shared by all pruners
        out_channel_groups={},
    )
    removed = []
    for group in pruner.step(interactive=True):
        dependency, channels = group[0]
        removed.append((names[dependency.target.module], tuple(channels)))
        group.prune()
    return removed, compare(whole, pruned, inputs, removed).macs[1]


def _last_layer(model: nn.Module, inputs: torch.Tensor) -> nn.Module:
    """The convolution or linear layer that is run last, whose outputs are the classes."""
    run: list[nn.Module] = []
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(lambda layer, *_: run.append(layer)) for layer in layers]
    with torch.no_grad():
        model(inputs)
    for hook in hooks:
        hook.remove()
    return run[-1]
