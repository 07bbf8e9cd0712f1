"""The fast paths merge what the reference merges."""

from __future__ import annotations

import io
import subprocess
import sys
import tracemalloc
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_weights import DTYPES, thresholds, weights

from inmerge_optim.drawing import Pairs, draw_layers
from inmerge_optim.kernels import Tallies, merge_layers_
from inmerge_optim.merging import COSINE_UNIT, DrawnLayer, merge_layer_, pair_cosines
from inmerge_optim.settings import CRITERIA, Rule, parse_threshold


def drawn(weight, groups=1, threshold=0.3, criterion="similar", merge_weight=0.8, merge_prob=1.0, seed=0):
    """Return a layer with the pairs that a seed draws."""
    rule = Rule(merge_weight, parse_threshold(threshold), criterion)
    rng = np.random.default_rng(seed)
    (pairs,) = draw_layers([(len(weight), groups)], [merge_prob], rng, [rule.needs_order])
    return DrawnLayer(weight, pairs, rule)


def check_same(*layers):
    """Merge copies of layers on the fast path and by the reference, compare them, and return the counts of merges."""
    fast = [layer._replace(weight=layer.weight.clone()) for layer in layers]
    plain = [layer._replace(weight=layer.weight.clone()) for layer in layers]
    tallies = Tallies(len(layers))
    with mock.patch("inmerge_optim.kernels.merge_layer_", side_effect=AssertionError("it went the reference's way")):
        merge_layers_(dict(enumerate(fast)), tallies)
    for (count, units), layer, copy in zip(tallies.read(), plain, fast, strict=True):
        expected_count, expected_units = merge_layer_(layer).tolist()
        assert count == expected_count
        assert abs(units - expected_units) <= count * (2 * layer.weight[0].numel() + 1)
        assert torch.equal(copy.weight.nan_to_num(7), layer.weight.nan_to_num(7))
    return [count for count, _ in tallies.read()]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(weights(), min_size=1, max_size=3),
    st.integers(0, 2**32),
    st.sampled_from([0.3, 1.0]),
    st.floats(0, 1),
    thresholds(),
    st.sampled_from(CRITERIA),
)
def test_the_host_merges_what_the_reference_merges(drawn_weights, seed, merge_prob, merge_weight, threshold, criterion):
    layers = [
        drawn(weight, groups, threshold, criterion, merge_weight, merge_prob, seed + index)
        for index, (weight, groups) in enumerate(drawn_weights)
    ]
    check_same(*[layer for layer in layers if layer.pairs.picked.size] or [drawn(torch.eye(2))])


def test_the_host_needs_no_numpy_2():
    weight = torch.randn(64, 8, 3, 3, generator=torch.Generator().manual_seed(0)) + 0.5
    with mock.patch.object(np, "vecdot", create=True), pytest.MonkeyPatch.context() as patch:
        patch.delattr(np, "vecdot")
        assert check_same(drawn(weight, threshold=0.2)) > [0]


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pairs_at_the_threshold_are_judged_as_the_reference_does(dtype, criterion):
    """A float32 dot product can't tell them from it: the strict comparison needs the reference's own cosine."""
    weight = (torch.randn(40, 4608, generator=torch.Generator().manual_seed(0)) + 0.6).to(dtype)
    layer = drawn(weight, criterion=criterion)
    rows, donors = (torch.from_numpy(side) for side in layer.pairs[:2])
    cosines = pair_cosines(weight[rows].double(), weight[donors].double())
    for cosine in cosines[:6].tolist():
        for threshold in (cosine, cosine - COSINE_UNIT):
            check_same(drawn(weight, threshold=threshold, criterion=criterion))


def test_pairs_of_nearly_one_cosine_are_told_apart_at_a_quantile():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, 2000, generator=generator) + 1e-3 * torch.randn(200, 2000, generator=generator)
    weight[::3] = weight[:1] * torch.logspace(-6, 6, 67)[:, None]  # parallel, of one cosine
    for seed in range(20):
        assert 0 < check_same(drawn(weight, threshold="q0.5", seed=seed))[0] < 200


@pytest.mark.parametrize(
    "layout",
    [
        lambda weight: weight.to(memory_format=torch.channels_last),
        lambda weight: torch.stack((weight, weight))[1],
        lambda weight: torch.cat((weight, weight), 1)[:, :8],
        lambda weight: weight.transpose(2, 3),
        lambda weight: weight[::2],
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_may_lie_in_memory_as_they_like(layout, dtype):
    whole = torch.randn(64, 8, 3, 3, generator=torch.Generator().manual_seed(0)).to(dtype) + 0.5
    weight, expected = layout(whole.clone()), layout(whole.clone())
    tallies = Tallies(1)
    with mock.patch("inmerge_optim.kernels.merge_layer_", side_effect=AssertionError("it went the reference's way")):
        merge_layers_({0: drawn(weight)}, tallies)
    count = merge_layer_(drawn(expected))[0]
    assert tallies.read()[0][0] == count > 0
    assert torch.equal(weight, expected)


class Subclass(torch.Tensor):
    """A tensor whose memory need not be what it looks like."""


@pytest.mark.parametrize(
    "make",
    [
        lambda weight: weight.reshape(8, 64).t().contiguous().t(),  # kernels lie across the rows
        lambda weight: weight.reshape(8, 32, 2)[..., 0],
        lambda weight: weight.reshape(8, 64).as_subclass(Subclass),
    ],
)
def test_what_has_no_rows_in_memory_goes_the_way_of_the_reference(make):
    whole = torch.randn(512, generator=torch.Generator().manual_seed(0)) + 0.5
    weight, expected, tallies = make(whole.clone()), make(whole.clone()), Tallies(1)
    merge_layers_({0: drawn(weight)}, tallies)
    count = merge_layer_(drawn(expected))[0]
    assert tallies.read()[0][0] == count > 0
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("contiguous", [True, False])
def test_partners_may_come_from_elsewhere(contiguous):
    generator = torch.Generator().manual_seed(0)
    weight, donors = (torch.randn(9, 4, 3, 3, generator=generator) + 0.5 for _ in range(2))
    if not contiguous:
        weight = weight.to(memory_format=torch.channels_last)
    picked, partners = np.array([1, 4, 8]), np.array([2, 0, 2])
    layer = DrawnLayer(weight, Pairs(picked, partners, 0.0, np.empty(0, np.int64)), Rule(0.8, parse_threshold(0.0)))
    result, tallies = weight.clone(), Tallies(1)
    merge_layers_({0: layer._replace(weight=result, donors=donors.flatten(1))}, tallies)
    assert tallies.read()[0][0] == 3
    expected = weight.clone()
    expected[picked] = torch.lerp(weight[picked], donors[partners], 0.2)
    assert torch.allclose(result, expected)


@pytest.mark.parametrize("threshold", [0.3, -1.0])
def test_a_merge_takes_no_more_memory_than_two_copies_of_the_drawn_rows(threshold):
    """With all pairs accepted, too; torch's own memory is that of the blocks that are blended."""
    weight = torch.randn(512, 512, 3, 3, generator=torch.Generator().manual_seed(0))
    layer, tallies = drawn(weight, threshold=threshold, merge_prob=0.3), Tallies(1)
    drawn_rows = layer.pairs.picked.size * weight[0].nbytes
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        tracemalloc.start()
        merge_layers_({0: layer}, tallies)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert peak + max(np.cumsum(sizes), default=0) < 2 * drawn_rows


def test_a_merge_shows_in_the_version_that_autograd_checks():
    weight = torch.ones(4, 9, requires_grad=True)
    loss = (weight**2).sum()
    with torch.no_grad():
        merge_layers_({0: drawn(weight.detach())}, Tallies(1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_triton_kernels_are_not_loaded_without_a_gpu():
    code = (
        "import sys, numpy, torch; from inmerge_optim import kernels, drawing, merging, settings; "
        "(pairs,) = drawing.draw_layers([(4, 1)], [1.0], numpy.random.default_rng(0), [False]); "
        "layer = merging.DrawnLayer(torch.ones(4, 9), pairs, settings.Rule(0.8, settings.Threshold('cosine', 0.3))); "
        "tallies = kernels.Tallies(1); kernels.merge_layers_({0: layer}, tallies); assert tallies.read()[0][0] == 4; "
        "assert 'inmerge_optim.triton_kernels' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tallies_are_of_the_device_that_they_are_loaded_to():
    tallies, file = Tallies(1), io.BytesIO()
    merge_layers_({0: drawn(torch.ones(8, 2))}, tallies)
    torch.save(tallies, file)
    loaded = {}
    for device in ("cpu", "meta"):
        file.seek(0)
        loaded[device] = torch.load(file, map_location=device, weights_only=False)
        assert loaded[device].on(torch.device(device)).device.type == device
    assert loaded["cpu"].read() == tallies.read() != [[0, 0]]
    assert loaded["meta"].on(torch.device("cpu")).tolist() == [[0, 0]]
