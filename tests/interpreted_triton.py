"""Triton's kernels against the reference, on a GPU or interpreted; test_triton_kernels.py runs this file by itself.

Triton reads TRITON_INTERPRET when it is imported, and other tests need it as it is.
"""

from __future__ import annotations

import os
from collections import Counter
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_weights import DTYPES, weights
from torch.utils._python_dispatch import TorchDispatchMode

from inmerge_optim import triton_kernels
from inmerge_optim.drawing import draw_layers
from inmerge_optim.merging import DrawnLayer, merge_layer_, to_device
from inmerge_optim.settings import Rule, parse_threshold

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about NaN

# The interpreter has no bfloat16.
KNOWN = [dtype for dtype in DTYPES if dtype != torch.bfloat16 or not INTERPRETED]


def drawn(weight, groups=1, threshold=0.3, criterion="similar", merge_weight=0.8, seed=0):
    """Return a layer with its kernels as rows, and the pairs that a seed draws."""
    (pairs,) = draw_layers([(len(weight), groups)], [1.0], np.random.default_rng(seed), [False])
    rows = weight.to(DEVICE).reshape(len(weight), -1)
    return DrawnLayer(rows, pairs, Rule(merge_weight, parse_threshold(threshold), criterion))


def check_same(*layers):
    """Merge copies of layers by Triton and by the reference, and compare them and their tallies."""
    plain = [layer._replace(weight=layer.weight.clone()) for layer in layers]
    tallies = torch.zeros(len(layers), 2, dtype=torch.int64, device=DEVICE)
    triton_kernels.merge_on_gpu_(dict(enumerate(layers)), tallies)
    assert tallies.tolist() == [merge_layer_(layer).tolist() for layer in plain]
    for layer, expected in zip(layers, plain, strict=True):
        assert torch.equal(layer.weight.nan_to_num(7), expected.weight.nan_to_num(7))
    return tallies[:, 0].tolist()


@settings(max_examples=20 if INTERPRETED else 200, deadline=None)  # the interpreter takes milliseconds per pair
@given(
    st.lists(weights(KNOWN), min_size=1, max_size=3),
    st.integers(0, 2**32),
    st.lists(st.floats(0, 1), min_size=3, max_size=3),
    st.one_of(st.floats(-1, 1), st.floats(-3, 6).map(lambda number: f"{number}sd")),
    st.sampled_from(["similar", "dissimilar"]),
)
def test_it_merges_what_the_reference_merges(drawn_weights, seed, merge_weights, threshold, criterion):
    dtype = drawn_weights[0][0].dtype
    layers = [
        drawn(weight.to(dtype), groups, threshold, criterion, merge_weight, seed + index)
        for index, ((weight, groups), merge_weight) in enumerate(zip(drawn_weights, merge_weights, strict=False))
    ]
    check_same(*[layer for layer in layers if layer.pairs.picked.size] or [drawn(torch.eye(2))])


@pytest.mark.parametrize("dtype", KNOWN)
def test_rows_may_be_longer_than_a_block_and_lie_apart(dtype):
    whole = torch.randn(12, 1300, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype) + 1
    weight, expected = whole.clone()[:, :1100], whole.clone()[:, :1100]
    tallies = torch.zeros(1, 2, dtype=torch.int64, device=DEVICE)
    triton_kernels.merge_on_gpu_({0: drawn(weight)._replace(weight=weight)}, tallies)
    assert tallies[0].tolist() == merge_layer_(drawn(expected)._replace(weight=expected)).tolist()
    assert torch.equal(weight, expected)
    assert tallies[0, 0] > 0


@pytest.mark.parametrize("merge_weight", [0.1, 0.3, 0.5, 0.8, 0.9])
@pytest.mark.parametrize("dtype", KNOWN)
def test_equal_kernels_stay_equal_to_the_bit(dtype, merge_weight):
    weight = torch.randn(1, 577, generator=torch.Generator().manual_seed(0)).to(dtype).repeat(8, 1)
    layer = drawn(weight, merge_weight=merge_weight)
    before = layer.weight.clone()
    assert check_same(layer) == [8]
    assert torch.equal(layer.weight, before)


def test_partners_may_come_from_elsewhere_and_counts_add_up():
    generator = torch.Generator().manual_seed(0)
    layer = drawn(torch.randn(6, 9, generator=generator), threshold=-1.0)
    donors = torch.randn(6, 9, generator=generator).to(DEVICE)
    expected = torch.lerp(layer.weight[layer.pairs.picked], donors[layer.pairs.partners], 0.2)
    tallies = torch.full((3, 2), 5, dtype=torch.int64, device=DEVICE)
    triton_kernels.merge_on_gpu_({1: layer._replace(donors=donors)}, tallies)
    assert tallies[:, 0].tolist() == [5, 11, 5]
    assert torch.allclose(layer.weight[layer.pairs.picked], expected)


class Operations(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layers", [1, 20])
def test_any_number_of_layers_takes_one_upload_and_three_launches(layers):
    several = {index: drawn(torch.randn(4, 9) + 1) for index in range(layers)}
    tallies = torch.zeros(layers, 2, dtype=torch.int64, device=DEVICE)
    kernels, operations = mock.MagicMock(), Operations()
    launched = dict.fromkeys(("_judge", "_blend", "_write_back"), kernels)
    with mock.patch.multiple(triton_kernels, to_device=mock.Mock(wraps=to_device), **launched), operations:
        triton_kernels.merge_on_gpu_(several, tallies)
        assert triton_kernels.to_device.call_count == 1
    assert [call.args for call in kernels.__getitem__.call_args_list] == [((4 * layers,),)] * 3
    assert operations.counts.pop("_to_copy", 0) == (not INTERPRETED)
    on_the_host = {"lift_fresh", "split_with_sizes", "is_pinned", "_pin_memory", "pin_memory"}
    assert operations.counts.keys() <= {"empty"} | on_the_host
