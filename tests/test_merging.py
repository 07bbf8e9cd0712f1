"""The method on one weight: draws, acceptance, merge, against Algorithm 1 as plain loops."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from inmerge_optim import draw_pairs, merge_kernels_
from inmerge_optim.merging import CRITERIA, blend_rows

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PAPER = {"merge_prob": 0.3, "merge_weight": 0.8, "similarity_threshold": 0.3}


def merged(weight, seed=0, **changes):
    """Return a merged copy of ``weight`` and the count."""
    weight = weight.clone()
    count = merge_kernels_(weight, **{**PAPER, **changes}, rng=np.random.default_rng(seed))
    return weight, int(count)


@st.composite
def weights(draw):
    """Weights of any shape whose kernels are similar in part, with zero, tiny, huge and non-finite ones among them."""
    group_size, groups = draw(st.integers(1, 7)), draw(st.integers(1, 3))
    shape = draw(st.sampled_from([(), (5,), (3, 2), (2, 3, 3), (1, 2, 2, 2)]))
    dtype = draw(st.sampled_from(DTYPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kernels = rng.normal(size=(groups * group_size, *shape)) + draw(st.sampled_from([0.0, 0.7])) * rng.normal(
        size=shape
    )
    for row in range(len(kernels)):
        kind = draw(st.sampled_from(["plain"] * 6 + ["zero", "tiny", "huge", "nan", "inf"]))
        kernels[row] *= {"zero": 0.0, "tiny": 1e-4, "huge": 1e3}.get(kind, 1.0)
        if kind in ("nan", "inf"):
            kernels[row].flat[-1] = math.nan if kind == "nan" else -math.inf
    weight = torch.tensor(kernels).to(dtype)
    if weight.dim() == 4 and draw(st.booleans()):
        weight = weight.to(memory_format=torch.channels_last)
    return weight, groups


@settings(max_examples=300, deadline=None)
@given(
    weights(),
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.floats(0, 1),
    st.floats(-1, 1),
    st.sampled_from(CRITERIA),
)
def test_merging_equals_algorithm_1_as_plain_loops(drawn, seed, merge_prob, merge_weight, threshold, criterion):
    weight, groups = drawn
    rng = np.random.default_rng(seed)
    picked, partners = draw_pairs(len(weight), groups, merge_prob, rng)
    pairs = list(zip(picked.tolist(), partners.tolist(), strict=True))
    kernels = weight.double().reshape(len(weight), -1).tolist()
    for i, j in pairs:  # a cosine this near to tau may fall on either side in single precision
        assume(not abs(oracle.cosine(kernels[i], kernels[j]) - threshold) < 1e-5)
    rule = {"merge_weight": merge_weight, "similarity_threshold": threshold, "criterion": criterion}
    expected, changed = oracle.merge(kernels, pairs, shuffle=rng.permutation(len(pairs)).tolist(), **rule)

    result, count = merged(weight, seed, groups=groups, merge_prob=merge_prob, **rule)

    assert count == len(changed)
    assert result.dtype == weight.dtype
    assert result.stride() == weight.stride()
    untouched = [i for i in range(len(weight)) if i not in changed]
    assert torch.equal(result[untouched].nan_to_num(7), weight[untouched].nan_to_num(7))
    precision = torch.finfo(weight.dtype)
    flat = torch.tensor(expected, dtype=torch.float64)[changed]
    scale = max(1.0, flat.abs().max().item()) if changed else 1.0
    close = torch.allclose(
        result.double().reshape(len(weight), -1)[changed], flat, rtol=2 * precision.eps, atol=2 * precision.eps * scale
    )
    assert close


def test_acceptance_is_strict():
    orthogonal = torch.eye(4)
    assert merged(orthogonal, merge_prob=1.0, similarity_threshold=0.0)[1] == 0
    assert merged(orthogonal, merge_prob=1.0, similarity_threshold=0.0, criterion="dissimilar")[1] == 4
    assert merged(orthogonal, merge_prob=1.0, similarity_threshold=-0.1)[1] == 4


def test_zero_kernels_have_cosine_0():
    zero = torch.zeros(4, 9)
    assert merged(zero, merge_prob=1.0, similarity_threshold=0.0)[1] == 0
    assert merged(zero, merge_prob=1.0, similarity_threshold=-0.1)[1] == 4


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_kernels_neither_merge_nor_spread(criterion, value):
    weight = torch.ones(6, 4)
    weight[2, 1] = value
    for seed in range(20):
        result, _ = merged(weight, seed, merge_prob=1.0, similarity_threshold=-1.0, criterion=criterion)
        assert torch.equal(result[2].nan_to_num(7), weight[2].nan_to_num(7))
        assert result[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("merge_weight", [0.1, 0.3, 0.5, 0.8, 0.9])
def test_equal_kernels_stay_equal_to_the_bit(dtype, merge_weight):
    weight = torch.randn(1, 64, 3, 3, generator=torch.Generator().manual_seed(0)).to(dtype).repeat(8, 1, 1, 1)
    result, count = merged(weight, merge_prob=1.0, merge_weight=merge_weight)
    assert count == 8
    assert torch.equal(result, weight)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_cosines_do_not_depend_on_the_scale_of_the_kernels(scale):
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)) + 0.5
    _, plain = merged(weight, merge_prob=1.0)
    _, scaled = merged(weight * scale, merge_prob=1.0)
    assert plain == scaled > 0


def test_reads_come_from_the_weights_as_they_were():
    weight = torch.tensor([[1.0, 0.0], [1.0, 0.1]])
    result, count = merged(weight, merge_prob=1.0, merge_weight=0.5)
    assert count == 2
    assert torch.allclose(result, torch.tensor([[1.0, 0.05], [1.0, 0.05]]))


def test_any_merges_as_many_as_similar_regardless_of_cosine():
    weight = torch.randn(64, 9, generator=torch.Generator().manual_seed(0)) + 0.3
    similar, count = merged(weight, merge_prob=1.0)
    any_, any_count = merged(weight, merge_prob=1.0, criterion="any")
    assert 0 < count == any_count < 64
    assert not torch.equal(similar, any_)


def test_merge_weight_ends():
    weight = torch.randn(8, 9, generator=torch.Generator().manual_seed(0))
    everything = {"merge_prob": 1.0, "similarity_threshold": -1.0}
    assert torch.equal(merged(weight, merge_weight=1.0, **everything)[0], weight)
    _, partners = draw_pairs(8, 1, 1.0, np.random.default_rng(0))
    assert torch.equal(merged(weight, merge_weight=0.0, **everything)[0], weight[torch.from_numpy(partners)])


def test_blend_does_not_depend_on_the_layout_of_the_rows():
    own, donors = torch.randn(2, 3, 1009, generator=torch.Generator().manual_seed(0)).unbind()
    whole = blend_rows(own, donors, 0.8)
    parts = [blend_rows(own[:, at : at + 1], donors[:, at : at + 1], 0.8) for at in range(own.shape[1])]
    assert torch.equal(whole, torch.cat(parts, 1))


def test_a_merge_reads_no_data_on_the_host():
    with FakeTensorMode(allow_non_fake_inputs=True):
        for criterion in CRITERIA:
            weight = torch.empty(32, 8, 3, 3)
            count = merge_kernels_(weight, **PAPER, criterion=criterion, rng=np.random.default_rng(0))
            assert count.shape == ()


def test_inference_and_autocast_do_not_change_the_arithmetic():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) + 0.3
    plain = merged(weight, merge_prob=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = merged(weight, merge_prob=1.0)
    assert plain[1] == cast[1]
    assert torch.equal(plain[0], cast[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge_prob": 1.2}, "merge_prob is 1.2, but it must be a number from 0 to 1"),
        ({"merge_weight": -0.1}, "merge_weight is -0.1"),
        ({"similarity_threshold": math.nan}, "similarity_threshold is nan"),
        ({"similarity_threshold": "much"}, "similarity_threshold is 'much'"),
        ({"criterion": "alike"}, "criterion is 'alike', but it must be one of similar, dissimilar, any"),
        ({"groups": 3}, "groups is 3"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        merged(torch.ones(4, 2), **changes)


def test_integer_weights_are_refused():
    with pytest.raises(TypeError, match=r"torch.int8"):
        merged(torch.ones(4, 2, dtype=torch.int8))


def test_kernels_are_picked_with_probability_p():
    rng = np.random.default_rng(0)
    counts = np.zeros(50)
    for _ in range(4000):
        picked, _ = draw_pairs(50, 1, 0.3, rng)
        counts[picked] += 1
    deviation = math.sqrt(4000 * 0.3 * 0.7)
    assert np.abs(counts - 1200).max() < 4.5 * deviation
    assert abs(counts.sum() - 60_000) < 4 * math.sqrt(50) * deviation


def test_partners_are_uniform_over_the_others_of_the_group():
    rng = np.random.default_rng(0)
    counts = np.zeros((12, 12))
    for _ in range(6000):
        picked, partners = draw_pairs(12, 3, 1.0, rng)
        counts[picked, partners] += 1
    group = np.arange(12) // 4
    allowed = (group[:, None] == group) & ~np.eye(12, dtype=bool)
    assert counts[~allowed].sum() == 0
    assert np.abs(counts[allowed] - 2000).max() < 4.5 * math.sqrt(6000 * (1 / 3) * (2 / 3))


@given(st.integers(1, 40), st.integers(1, 8), st.floats(0, 1), st.integers(0, 2**32))
def test_draws_are_valid_whatever_the_layer(group_size, groups, merge_prob, seed):
    picked, partners = draw_pairs(group_size * groups, groups, merge_prob, np.random.default_rng(seed))
    assert picked.dtype == partners.dtype == np.int64
    assert (np.diff(picked) > 0).all()
    assert (picked != partners).all()
    assert (picked // group_size == partners // group_size).all()
    if group_size == 1 or merge_prob == 0:
        assert picked.size == 0
    elif merge_prob == 1:
        assert picked.size == group_size * groups


def test_draws_leave_the_global_generators_alone():
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    merged(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)))
    assert (np.random.get_state()[1] == before[0]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[1])
