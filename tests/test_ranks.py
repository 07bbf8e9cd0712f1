"""How many dimensions kernels spread over, against singular values by NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm
import torch
from torch import nn

from inmerge_optim import effective_rank, kernel_layers, kernel_ranks, merge_kernels_

pytestmark = pytest.mark.portable


def plain_effective_rank(matrix):
    values = np.linalg.svd(matrix, compute_uv=False)
    shares = values[values > 0] / values.sum()
    return math.exp(-(shares * np.log(shares)).sum())


@pytest.mark.parametrize(("shape", "groups"), [((24, 3, 3, 3), 1), ((24, 40), 3), ((90, 8), 1), ((8,), 2)])
@pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        (1.0, torch.float32),
        (1e-30, torch.float32),
        (1e30, torch.float32),
        (1e-200, torch.float64),
        (1e200, torch.float64),
    ],
)
def test_the_effective_rank_is_that_of_the_singular_values(shape, groups, scale, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    parts = np.split(weight.double().reshape(len(weight), -1).numpy(), groups)
    expected = np.mean([plain_effective_rank(part) for part in parts])
    assert effective_rank(weight * scale, groups) == pytest.approx(expected, rel=1e-5)


def test_the_effective_rank_of_plain_cases():
    assert effective_rank(torch.eye(6).repeat(2, 1)) == pytest.approx(6)
    assert effective_rank(torch.arange(1.0, 7.0).outer(torch.ones(9))) == pytest.approx(1, abs=1e-5)
    assert effective_rank(torch.zeros(4, 9)) == 0
    assert math.isnan(effective_rank(torch.tensor([[1.0, math.inf], [0.0, 1.0]])))
    with pytest.raises(ValueError, match="groups is 2"):
        effective_rank(torch.ones(3, 3), groups=2)


def test_merging_lowers_the_effective_rank():
    weight = torch.randn(32, 9, generator=torch.Generator().manual_seed(0))
    before = effective_rank(weight)
    settings = {"merge_prob": 1.0, "merge_weight": 0.5, "similarity_threshold": -1.0}
    merge_kernels_(weight, **settings, rng=np.random.default_rng(0))
    assert effective_rank(weight) < before


def test_ranks_of_layers_are_those_of_their_weights():
    model = timm.create_model("resnext26ts")
    model.stages[3][0].conv2_kxk.conv.weight.data[0] = math.nan
    layers = kernel_layers(model)
    found = kernel_ranks(model, layers)
    assert list(found) == [layer.name for layer in layers if layer.selected]
    for layer in layers:
        if layer.selected:
            assert found[layer.name] == pytest.approx(
                effective_rank(model.get_submodule(layer.name).weight, layer.groups), rel=1e-9, nan_ok=True
            )
    assert sum(map(math.isnan, found.values())) == 1


def test_ranks_of_a_wrapped_model_are_those_of_the_model():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten())
    layers = kernel_layers(model, names=["2"])
    assert kernel_ranks(nn.DataParallel(model), layers) == pytest.approx(kernel_ranks(model, layers))


def test_kernels_of_other_numbers_have_no_rank():
    with pytest.raises(TypeError, match="int8"):
        effective_rank(torch.ones(3, 3, dtype=torch.int8))
    with pytest.raises(TypeError, match="float8_e4m3fn"):
        effective_rank(torch.ones(3, 3).to(torch.float8_e4m3fn))
