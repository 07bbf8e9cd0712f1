"""In-model merging (InMerge) for PyTorch: similar kernels of deep layers are merged while a CNN is fine-tuned.

The optimizer that merges, in one line around another:

    InMergeOptimizer    wraps any torch optimizer; merges after each of its steps
    NoMergeWarning      says that next to no pair is similar enough to be merged
    check_replicas      whether the ranks of a distributed run still hold the same weights

Which layers:

    kernel_layers       the layers of a model in order of depth, which are merged and why the others are not
    KernelLayer         what it says of one of them

How similar their kernels are:

    kernel_similarity   the cosines of all pairs of kernels of one weight
    similarity_profile  the cosines of each layer, and what a step would merge
    LayerProfile        what it says of one of them
    effective_rank      how many dimensions the kernels of one weight spread over
    kernel_ranks        the same for each layer that is merged

The method on one weight, for custom loops:

    draw_pairs          the random choices of one step
    merge_kernels_      one step of the method

Smaller models:

    compact             takes out equal channels, so that a smaller model computes the same
    CompactionReport    what it has done
    remove_channels     takes the same channels out of a model that is built anew
    save_compacted      writes the smaller model to a file
    load_compacted      builds it again from there

Weights from files, as the command ``inmerge`` and the recipes read them:

    read_checkpoint     reads a file without running code in it, and compares it with the model
    CheckpointError     says what is wrong with it

The method is from Wang, Almakky, Ma, Saeed, Yaqub: "In-Model Merging for Enhancing the Robustness of Medical Imaging
Classification Models", arXiv 2502.20516; this is an independent implementation, and no medical device.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inmerge_optim.compacted_files import load_compacted, save_compacted
    from inmerge_optim.compaction import CompactionReport, compact, remove_channels
    from inmerge_optim.drawing import draw_pairs
    from inmerge_optim.merging import merge_kernels_
    from inmerge_optim.models import CheckpointError, read_checkpoint
    from inmerge_optim.optimizer import InMergeOptimizer, NoMergeWarning
    from inmerge_optim.ranks import effective_rank, kernel_ranks
    from inmerge_optim.replicas import check_replicas
    from inmerge_optim.selection import KernelLayer, kernel_layers
    from inmerge_optim.similarity import LayerProfile, kernel_similarity, similarity_profile

__version__ = "0.2.0"

_HOMES = {
    "CheckpointError": "models",
    "CompactionReport": "compaction",
    "InMergeOptimizer": "optimizer",
    "KernelLayer": "selection",
    "LayerProfile": "similarity",
    "NoMergeWarning": "optimizer",
    "check_replicas": "replicas",
    "compact": "compaction",
    "draw_pairs": "drawing",
    "effective_rank": "ranks",
    "kernel_layers": "selection",
    "kernel_ranks": "ranks",
    "kernel_similarity": "similarity",
    "load_compacted": "compacted_files",
    "merge_kernels_": "merging",
    "read_checkpoint": "models",
    "remove_channels": "compaction",
    "save_compacted": "compacted_files",
    "similarity_profile": "similarity",
}

__all__ = [
    "CheckpointError",
    "CompactionReport",
    "InMergeOptimizer",
    "KernelLayer",
    "LayerProfile",
    "NoMergeWarning",
    "check_replicas",
    "compact",
    "draw_pairs",
    "effective_rank",
    "kernel_layers",
    "kernel_ranks",
    "kernel_similarity",
    "load_compacted",
    "merge_kernels_",
    "read_checkpoint",
    "remove_channels",
    "save_compacted",
    "similarity_profile",
]


def __getattr__(name: str) -> Any:
    # Names are imported when they are asked for, so that the command line answers --help without loading torch.
    if name in _HOMES:
        return getattr(import_module(f"inmerge_optim.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
