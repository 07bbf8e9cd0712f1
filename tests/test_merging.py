"""The method on one weight: draws, acceptance, merge, against Algorithm 1 as plain loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from inmerge_optim import draw_pairs, merge_kernels_, similarity_profile
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
    st.one_of(
        st.floats(-1, 1),
        st.floats(-3, 6).map(lambda number: f"{number}sd"),
        st.integers(0, 20).map(lambda number: f"q{number / 20}"),
    ),
    st.sampled_from(CRITERIA),
)
def test_merging_equals_algorithm_1_as_plain_loops(drawn, seed, merge_prob, merge_weight, threshold, criterion):
    weight, groups = drawn
    rng = np.random.default_rng(seed)
    picked, partners = draw_pairs(len(weight), groups, merge_prob, rng)
    pairs = list(zip(picked.tolist(), partners.tolist(), strict=True))
    kernels = weight.double().reshape(len(weight), -1).tolist()
    cosines = oracle.pair_cosines(kernels, pairs)
    tau = oracle.threshold_cosine(threshold, cosines, len(kernels[0]))
    for cosine in cosines:  # one this near to tau may fall on either side in single precision, unless it is tau
        own = str(threshold).startswith("q") and cosine == tau
        assume(cosine is None or own or abs(cosine - tau) >= 1e-5)
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
        for criterion, threshold in itertools.product(CRITERIA, (0.3, "4sd", "q0.9")):
            weight, settings = torch.empty(32, 8, 3, 3), PAPER | {"similarity_threshold": threshold}
            count = merge_kernels_(weight, **settings, criterion=criterion, rng=np.random.default_rng(0))
            assert count.shape == ()


@pytest.mark.parametrize("length", [400, 1152])
@pytest.mark.parametrize("deviations", [1, 2, 3])
def test_standard_deviations_accept_the_normal_tail_of_random_weights(deviations, length):
    weight = torch.randn(4000, length, generator=torch.Generator().manual_seed(0))
    settings = {"merge_prob": 1.0, "merge_weight": 1.0, "similarity_threshold": f"{deviations}sd"}
    steps = 2 if deviations < 3 else 10
    share = sum(merged(weight, seed, **settings)[1] for seed in range(steps)) / (4000 * steps)
    tail = math.erfc(deviations / math.sqrt(2)) / 2
    assert abs(share - tail) < 4.5 * math.sqrt(tail / (4000 * steps))


def test_four_standard_deviations_accept_what_the_normal_tail_says():
    """Three in a hundred thousand; the pairs of all kernels, of which a step draws some."""
    conv = torch.nn.Conv2d(512, 3000, 3)
    torch.nn.init.normal_(conv.weight, generator=torch.Generator().manual_seed(0))
    (profile,) = similarity_profile(torch.nn.Sequential(conv), names=["0"], similarity_threshold="4sd")
    pairs, tail = 3000 * 2999 / 2, math.erfc(4 / math.sqrt(2)) / 2
    assert abs(profile.share_above_threshold - tail) < 4.5 * math.sqrt(tail / pairs)
    assert profile.threshold == 4 / math.sqrt(4608)


@pytest.mark.parametrize(("kernels", "merge_prob"), [(1000, 1.0), (64, 0.3), (512, 0.3)])
def test_the_nine_tenths_quantile_accepts_a_tenth(kernels, merge_prob):
    weight = torch.randn(kernels, 9, generator=torch.Generator().manual_seed(0))
    settings = {"merge_prob": merge_prob, "merge_weight": 1.0, "similarity_threshold": "q0.9"}
    steps = 50
    drawn = [draw_pairs(kernels, 1, merge_prob, np.random.default_rng(seed))[0].size for seed in range(steps)]
    counts = [merged(weight, seed, **settings)[1] for seed in range(steps)]
    assert sum(counts) / sum(drawn) == pytest.approx(0.1, abs=0.004)
    assert all(abs(count - 0.1 * pairs) <= 0.5 + 1e-9 for count, pairs in zip(counts, drawn, strict=True))


def test_a_quantile_takes_the_highest_cosines_of_the_finite_pairs():
    weight = torch.randn(40, 9, generator=torch.Generator().manual_seed(0))
    weight[3, 0] = math.nan
    _, partners = draw_pairs(40, 1, 1.0, np.random.default_rng(0))
    cosines = torch.nn.functional.cosine_similarity(weight, weight[partners]).nan_to_num(-2)
    finite = int((cosines > -2).sum())
    result, count = merged(weight, merge_prob=1.0, similarity_threshold="q0.75")
    changed = (result != weight).any(1) & weight.isfinite().all(1)
    assert changed.sum() == count == finite - round(0.75 * finite)
    assert cosines[changed].min() > cosines[~changed].max()


@pytest.mark.parametrize("criterion", CRITERIA)
def test_few_pairs_and_equal_ones_have_quantiles_too(criterion):
    settings = {"merge_prob": 1.0, "similarity_threshold": "q0.5", "criterion": criterion}
    assert merged(torch.randn(1, 4), **settings)[1] == 0
    assert merged(torch.randn(8, 4), **settings | {"merge_prob": 0.0})[1] == 0
    assert merged(torch.full((8, 4), math.nan), **settings)[1] == 0
    # No cosine is above that of all.
    assert merged(torch.ones(8, 4), **settings)[1] == (8 if criterion == "dissimilar" else 0)


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
        ({"similarity_threshold": True}, "similarity_threshold is True"),
        *(
            (
                {"similarity_threshold": text},
                f"similarity_threshold is '{text}', but it must be a number from -1 to 1, '<k>sd' or 'q<share from 0",
            )
            for text in ("much", "0.3", "sd", "nansd", "infsd", "q", "q1.5", "q-0.1", "qnan", "q4sd", "")
        ),
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
