"""In-model merging (InMerge) for PyTorch: similar kernels of deep layers are merged while a CNN is fine-tuned."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inmerge_optim.drawing import draw_pairs
    from inmerge_optim.merging import merge_kernels_
    from inmerge_optim.optimizer import InMergeOptimizer, NoMergeWarning
    from inmerge_optim.replicas import check_replicas
    from inmerge_optim.selection import KernelLayer, kernel_layers
    from inmerge_optim.similarity import effective_rank, kernel_ranks, kernel_similarity, similarity_profile

__version__ = "0.1.0"

_HOMES = {
    "InMergeOptimizer": "optimizer",
    "KernelLayer": "selection",
    "NoMergeWarning": "optimizer",
    "check_replicas": "replicas",
    "draw_pairs": "drawing",
    "effective_rank": "similarity",
    "kernel_layers": "selection",
    "kernel_ranks": "similarity",
    "kernel_similarity": "similarity",
    "merge_kernels_": "merging",
    "similarity_profile": "similarity",
}

__all__ = [
    "InMergeOptimizer",
    "KernelLayer",
    "NoMergeWarning",
    "check_replicas",
    "draw_pairs",
    "effective_rank",
    "kernel_layers",
    "kernel_ranks",
    "kernel_similarity",
    "merge_kernels_",
    "similarity_profile",
]


def __getattr__(name: str) -> Any:
    # Names are imported when they are asked for, so that the command line answers --help without loading torch.
    if name in _HOMES:
        return getattr(import_module(f"inmerge_optim.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
