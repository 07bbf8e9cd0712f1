"""In-model merging (InMerge) for PyTorch: similar kernels of deep layers are merged while a CNN is fine-tuned."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inmerge_optim.layers import KernelLayer, kernel_layers
    from inmerge_optim.merging import draw_pairs, merge_kernels_
    from inmerge_optim.optimizer import InMergeOptimizer, NoMergeWarning
    from inmerge_optim.replicas import check_replicas

__version__ = "0.1.0"

_HOMES = {
    "InMergeOptimizer": "optimizer",
    "KernelLayer": "layers",
    "NoMergeWarning": "optimizer",
    "check_replicas": "replicas",
    "draw_pairs": "merging",
    "kernel_layers": "layers",
    "merge_kernels_": "merging",
}

__all__ = [
    "InMergeOptimizer",
    "KernelLayer",
    "NoMergeWarning",
    "check_replicas",
    "draw_pairs",
    "kernel_layers",
    "merge_kernels_",
]


def __getattr__(name: str) -> Any:
    # Names are imported when they are asked for, so that the command line answers --help without loading torch.
    if name in _HOMES:
        return getattr(import_module(f"inmerge_optim.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
