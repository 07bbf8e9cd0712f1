"""How many dimensions the kernels of a layer spread over: what merging may lower, watched over the epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from inmerge_optim.selection import KernelLayer, layer_modules
from inmerge_optim.sharding import is_sharded
from inmerge_optim.similarity import check_kernels

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def effective_rank(weight: Tensor, groups: int = 1) -> float:
    """Return how many dimensions the kernels of a layer spread over: exp of the entropy of their singular values.

    Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007: of the matrix whose n
    rows are the kernels, as they are (neither centred nor scaled to one length), the singular values over their sum
    are taken for probabilities. Kernels that are all alike have 1, orthogonal ones of equal length n.

    Args:
        weight: floating point, of any shape, with the kernels on dim 0; a sharded one is gathered.
        groups: the groups of the convolution, which have a matrix each; the mean over them is returned.

    Returns:
        From 1 to min(n / groups, d) for kernels of d weights; 0 where all are zero, NaN where one is not finite.

    Raises:
        TypeError: the weight is not of floating point numbers of 16 bits or more.
        ValueError: ``groups`` does not divide its kernels.

    Example:
        >>> round(effective_rank(torch.eye(4)), 6), round(effective_rank(torch.ones(4, 9)), 6)
        (4.0, 1.0)
    """
    return float(_effective_ranks(_gram_matrices(weight, groups)).mean())


def kernel_ranks(model: nn.Module, layers: Sequence[KernelLayer]) -> dict[str, float]:
    """Return the effective rank of the kernels of each selected layer, by name.

    Decompositions of matrices of one size are made in one batch. It is for now and then (the recipes call it after
    each epoch), not for every step, and every rank of sharded weights must call it.

    Args:
        model: holds the weights; DDP, compiled and accelerate-prepared models are unwrapped.
        layers: of ``kernel_layers(model)``, or of an optimizer that merges (``optimizer.layers``).

    Returns:
        By a layer's name what effective_rank says of its weight, the layers in their order.

    Raises:
        AttributeError: ``model`` has no layer of that name.

    Example:
        >>> from inmerge_optim import kernel_layers
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 2, bias=False), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.Flatten())
        >>> _ = model[0].weight.data.copy_(torch.eye(2, 4).view(2, 1, 2, 2))
        >>> ranks = kernel_ranks(model, kernel_layers(model, names=["0"]))
        >>> {name: round(rank, 6) for name, rank in ranks.items()}
        {'0': 2.0}
    """
    selected = [layer for layer in layers if layer.selected]
    modules = layer_modules(model, selected)
    grams = {layer.name: _gram_matrices(cast(Tensor, modules[layer.name].weight), layer.groups) for layer in selected}
    found: dict[str, float] = {}
    for kind in {(gram.shape[-1], gram.device) for gram in grams.values()}:
        alike = {name: gram for name, gram in grams.items() if (gram.shape[-1], gram.device) == kind}
        ranks = _effective_ranks(torch.cat(list(alike.values()))).split([len(gram) for gram in alike.values()])
        found.update((name, float(rank.mean())) for name, rank in zip(alike, ranks, strict=True))
    return {name: found[name] for name in grams}


def _gram_matrices(weight: Tensor, groups: int) -> Tensor:
    """Return the Gram matrices of the groups' kernels, to some scale, on the smaller side: (groups, k, k), float64."""
    check_kernels(weight, groups)
    weight = weight.detach()
    if is_sharded(weight):
        weight = cast("DTensor", weight).full_tensor()
    rows = weight.reshape(groups, weight.shape[0] // groups, -1)
    rows = rows.to("cpu" if weight.device.type == "mps" else weight.device, torch.float64)  # MPS has no float64
    if weight.dtype == torch.float64:  # the squares of other numbers are within its range
        largest = rows.abs().amax((1, 2), keepdim=True)
        rows = rows / torch.where(largest > 0, largest, 1)
    return rows @ rows.mT if rows.shape[1] <= rows.shape[2] else rows.mT @ rows


def _effective_ranks(grams: Tensor) -> Tensor:
    """Return the effective rank of each matrix (b,), from its Gram matrix, whose eigenvalues are its squares.

    That takes a tenth of the time of a singular value decomposition, and in double precision errs by less than single
    weights are rounded.
    """
    finite = grams.isfinite().all(dim=(1, 2))  # which the decomposition asks for
    values = torch.linalg.eigvalsh(torch.where(finite[:, None, None], grams, 0)).clamp(min=0).sqrt()
    totals = values.sum(1, keepdim=True)
    ranks = torch.special.entr(values / torch.where(totals > 0, totals, 1)).sum(1).exp()
    return torch.where(finite, torch.where(totals.squeeze(1) > 0, ranks, 0), math.nan)
