"""The method on one weight: draws, acceptance, merge, against Algorithm 1 as plain loops."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_weights import DTYPES, thresholds, weights
from torch._subclasses.fake_tensor import FakeTensorMode

from inmerge_optim import draw_pairs, merge_kernels_, similarity_profile
from inmerge_optim.drawing import draw_layers
from inmerge_optim.merging import (
    COSINE_UNIT,
    DrawnLayer,
    accept_pairs,
    blend_rows,
    merge_layer_,
    pair_cosines,
    take_rows,
    to_device,
)
from inmerge_optim.settings import CRITERIA, Rule, Threshold, parse_threshold

pytestmark = pytest.mark.portable

PAPER = {"merge_prob": 0.3, "merge_weight": 0.8, "similarity_threshold": 0.3}


def merged(weight, seed=0, **changes):
    """Return a merged copy of ``weight`` and the count."""
    weight = weight.clone()
    count = merge_kernels_(weight, **{**PAPER, **changes}, rng=np.random.default_rng(seed))
    return weight, int(count)


@settings(max_examples=300, deadline=None)
@given(
    weights(),
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.floats(0, 1),
    thresholds(),
    st.sampled_from(CRITERIA),
)
def test_merging_equals_algorithm_1_as_plain_loops(drawn, seed, merge_prob, merge_weight, threshold, criterion):
    weight, groups = drawn
    uniforms = np.random.default_rng(seed).random(len(weight)).tolist()
    pairs = oracle.draw(uniforms, groups, merge_prob)
    ordered = criterion == "random_pairs" or str(threshold).startswith("q")
    (choices,) = draw_layers([(len(weight), groups)], [merge_prob], np.random.default_rng(seed), [ordered])
    assert pairs == list(zip(choices.picked.tolist(), choices.partners.tolist(), strict=True))
    kernels = weight.double().reshape(len(weight), -1).tolist()
    rule = {"merge_weight": merge_weight, "similarity_threshold": threshold, "criterion": criterion}
    chance = {"rounding": choices.rounding, "order": choices.order.tolist()}
    expected, changed = oracle.merge(kernels, pairs, **chance, **rule)

    result, count = merged(weight, seed, groups=groups, merge_prob=merge_prob, **rule)

    assert count == len(changed)
    assert result.dtype == weight.dtype
    assert result.stride() == weight.stride()
    untouched = [i for i in range(len(weight)) if i not in changed]
    assert torch.equal(result[untouched].nan_to_num(7), weight[untouched].nan_to_num(7))
    for i in changed:
        exact = torch.tensor(expected[i], dtype=torch.float64)
        largest = max(map(abs, kernels[i] + kernels[dict(pairs)[i]]))
        error = (result[i].double().flatten() - exact).abs().max()
        assert error <= 2 * torch.finfo(weight.dtype).eps * largest + torch.finfo(weight.dtype).smallest_normal


@settings(max_examples=50, deadline=None)
@given(weights(), st.integers(0, 2**32), thresholds(), st.sampled_from(CRITERIA))
def test_the_tally_is_the_count_of_the_merged_pairs_and_the_sum_of_their_cosines(drawn, seed, threshold, criterion):
    weight, groups = drawn
    rule = Rule(0.8, parse_threshold(threshold), criterion)
    (pairs,) = draw_layers([(len(weight), groups)], [0.5], np.random.default_rng(seed), [True])
    kernels = weight.double().reshape(len(weight), -1).tolist()
    places = list(zip(pairs.picked.tolist(), pairs.partners.tolist(), strict=True))
    chance = {"rounding": pairs.rounding, "order": pairs.order.tolist()}
    _, changed = oracle.merge(
        kernels, places, merge_weight=0.8, similarity_threshold=threshold, criterion=criterion, **chance
    )
    cosines = dict(zip(pairs.picked.tolist(), oracle.pair_cosines(kernels, places), strict=True))

    count, units = merge_layer_(DrawnLayer(weight.clone(), pairs, rule)).tolist()

    assert count == len(changed)
    assert units == round(sum(cosines[kernel] for kernel in changed) / COSINE_UNIT)


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


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, 2.0**-100), (torch.float32, 2.0**100), (torch.float64, 2.0**-700), (torch.float64, 2.0**700)],
)
def test_cosines_do_not_depend_on_the_scale_of_the_kernels(dtype, scale):
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0), dtype=dtype) + 0.5
    _, plain = merged(weight, merge_prob=1.0)
    _, scaled = merged(weight * scale, merge_prob=1.0)
    assert plain == scaled > 0
    own, donors = weight[:8].double(), weight[8:].double()
    assert torch.equal(pair_cosines(own * scale, donors), pair_cosines(own, donors))
    assert torch.equal(pair_cosines(own, donors * scale), pair_cosines(own, donors))


def test_reads_come_from_the_weights_as_they_were():
    weight = torch.tensor([[1.0, 0.0], [1.0, 0.1]])
    result, count = merged(weight, merge_prob=1.0, merge_weight=0.5)
    assert count == 2
    assert torch.allclose(result, torch.tensor([[1.0, 0.05], [1.0, 0.05]]))


def test_random_pairs_merges_as_many_as_similar_whatever_their_cosine():
    weight = torch.randn(64, 9, generator=torch.Generator().manual_seed(0)) + 0.3
    weight[::4, 0] = math.nan  # no merge is lost to a pair that has no cosine
    for seed in range(20):
        similar, count = merged(weight, seed, merge_prob=1.0)
        random, random_count = merged(weight, seed, merge_prob=1.0, criterion="random_pairs")
        assert 0 < count == random_count < 48
        assert not torch.equal(similar.nan_to_num(7), random.nan_to_num(7))


def test_random_pairs_merges_each_pair_equally_often():
    weight = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 2)
    weight += torch.arange(12).view(6, 2) / 1e4  # so that merging changes each
    counts, total = torch.zeros(6), 0
    for seed in range(1000):
        result, count = merged(weight, seed, merge_prob=1.0, criterion="random_pairs")
        counts += (result != weight).any(1)
        total += count
    assert counts.sum() == total
    assert (counts - total / 6).abs().max() < 4.5 * math.sqrt(total / 6)


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


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_pairs_are_judged_on_the_device_of_the_weight(device, criterion):
    with FakeTensorMode():
        rows = take_rows(torch.empty(9, 2, 3, 3, device=device), torch.arange(6, device=device))
        cosines, order = pair_cosines(rows, rows), torch.arange(6, device=device)
        for threshold in (0.3, "q0.9"):
            accepted = accept_pairs(cosines, 18, Rule(0.8, parse_threshold(threshold), criterion), 0.5, order)
            assert (accepted.device.type, accepted.dtype) == (device, torch.bool)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float64), ("cuda", torch.float64), ("mps", torch.float32)])
def test_rows_are_as_precise_as_a_device_allows(device, dtype):
    with FakeTensorMode():
        rows = take_rows(torch.empty(9, 2, 3, device=device), torch.arange(4, device=device))
    assert (rows.dtype, rows.shape) == (dtype, (4, 6))


def test_indices_go_to_the_device_of_the_weight():
    picked, order = to_device([np.array([1, 2]), np.array([3])], torch.device("meta"))
    assert (picked.device.type, picked.dtype, picked.shape) == ("meta", torch.int64, (2,))
    assert order.shape == (1,)
    assert [part.tolist() for part in to_device([np.array([1, 2]), np.array([3])], torch.device("cpu"))] == [
        [1, 2],
        [3],
    ]


@pytest.mark.parametrize("length", [400, 1152])
@pytest.mark.parametrize("deviations", [1, 2, 3])
def test_standard_deviations_accept_the_normal_tail_of_random_weights(deviations, length):
    weight = torch.randn(4000, length, generator=torch.Generator().manual_seed(0))
    settings = {"merge_prob": 1.0, "merge_weight": 1.0, "similarity_threshold": f"{deviations}sd"}
    steps = 1 if deviations < 3 else 5
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


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize(("kernels", "merge_prob"), [(2, 1.0), (3, 1.0), (8, 0.3), (200, 0.3)])
def test_a_quantile_accepts_its_share_however_few_kernels_there_are(kernels, merge_prob, share):
    weight = torch.randn(kernels, 5, generator=torch.Generator().manual_seed(0))
    settings = {"merge_prob": merge_prob, "merge_weight": 1.0, "similarity_threshold": f"q{share}"}
    steps, drawn, accepted = 300, 0, 0
    for seed in range(steps):
        pairs = draw_pairs(kernels, 1, merge_prob, np.random.default_rng(seed))[0].size
        _, count = merged(weight, seed, **settings)
        assert abs(count - (1 - share) * pairs) < 1
        drawn, accepted = drawn + pairs, accepted + count
    assert abs(accepted - (1 - share) * drawn) < 4.5 * math.sqrt(steps * 0.25)  # the roundings' standard deviation


def test_a_quantile_takes_the_highest_cosines_of_the_finite_pairs():
    weight = torch.randn(40, 9, generator=torch.Generator().manual_seed(0))
    weight[3, 0] = math.nan
    (pairs,) = draw_layers([(40, 1)], [1.0], np.random.default_rng(0), [True])
    cosines = pair_cosines(weight.double(), weight[torch.from_numpy(pairs.partners)].double()).nan_to_num(-2)
    finite = int((cosines > -2).sum())
    result, count = merged(weight, merge_prob=1.0, similarity_threshold="q0.75")
    changed = (result != weight).any(1) & weight.isfinite().all(1)
    assert changed.sum() == count == finite - math.floor(0.75 * finite + pairs.rounding)
    assert cosines[changed].min() > cosines[~changed].max()


def test_a_quantiles_rounding_is_done_in_double_precision():
    cosines, order, rule = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64), torch.arange(4), "similar"
    just_below = 1 - 1e-9  # in float32 it would be 1, and one more pair not above the quantile
    for share, above in ((0.0, 4), (0.25, 3), (0.5, 2)):
        accepted = accept_pairs(cosines, 9, Rule(0.8, Threshold("quantile", share), rule), just_below, order)
        assert int(accepted.sum()) == above


@pytest.mark.parametrize("criterion", CRITERIA)
def test_few_pairs_and_equal_ones_have_quantiles_too(criterion):
    settings = {"merge_prob": 1.0, "similarity_threshold": "q0.5", "criterion": criterion}
    assert merged(torch.randn(1, 4), **settings)[1] == 0
    assert merged(torch.randn(8, 4), **settings | {"merge_prob": 0.0})[1] == 0
    assert merged(torch.full((8, 4), math.nan), **settings)[1] == 0


def test_pairs_of_one_cosine_take_turns_at_a_quantile():
    alike = torch.outer(torch.logspace(-3, 3, 9), torch.linspace(-1, 2, 31))
    settings = {"merge_prob": 1.0, "merge_weight": 0.5, "similarity_threshold": "q0.5"}
    counts, steps = torch.zeros(9), 1000
    for seed in range(steps):
        result, count = merged(alike, seed, **settings)
        changed = (result != alike).any(1)
        assert count == changed.sum()
        assert count in (4, 5)
        counts += changed
    assert (counts - steps / 2).abs().max() < 4.5 * math.sqrt(steps / 4)


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
        ({"criterion": "alike"}, "criterion is 'alike', but it must be one of similar, dissimilar, random_pairs"),
        ({"groups": 3}, "groups is 3"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        merged(torch.ones(4, 2), **changes)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn])
def test_weights_of_other_numbers_are_refused(dtype):
    with pytest.raises(TypeError, match=rf"weight is {dtype} of shape \(4, 2\), but kernels are merged in"):
        merged(torch.ones(4, 2).to(dtype))


def test_a_weight_without_kernels_and_an_rng_that_is_none_are_refused():
    with pytest.raises(TypeError, match=r"of shape \(\), but kernels"):
        merged(torch.tensor(1.0))
    with pytest.raises(TypeError, match="rng is 0, but it must be a NumPy generator"):
        merge_kernels_(torch.ones(4, 2), **PAPER, rng=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_finite_kernels_stay_finite_however_large(dtype):
    largest = torch.finfo(dtype).max
    weight = torch.tensor([[largest, largest / 2], [-largest, largest]], dtype=torch.float64).to(dtype)
    for merge_weight in (0.0, 0.2, 0.5, 0.8, 1.0):
        result, count = merged(weight, merge_prob=1.0, merge_weight=merge_weight, similarity_threshold=-1.0)
        assert count == 2
        assert result.isfinite().all()


def test_kernels_are_picked_with_probability_p():
    rng = np.random.default_rng(0)
    counts = np.zeros(50)
    for _ in range(4000):
        picked, _ = draw_pairs(50, 1, 0.3, rng)
        counts[picked] += 1
    deviation = math.sqrt(4000 * 0.3 * 0.7)
    assert np.abs(counts - 1200).max() < 4.5 * deviation
    assert abs(counts.sum() - 60_000) < 4 * math.sqrt(50) * deviation


@pytest.mark.parametrize(("kernels", "groups", "merge_prob"), [(6, 1, 0.9), (24, 1, 0.9), (4, 1, 0.34), (12, 3, 1.0)])
def test_partners_are_uniform_over_the_others_of_the_group(kernels, groups, merge_prob):
    rng, draws = np.random.default_rng(0), 6000
    counts = np.zeros((kernels, kernels))
    for _ in range(draws):
        picked, partners = draw_pairs(kernels, groups, merge_prob, rng)
        counts[picked, partners] += 1
    size = kernels // groups
    group = np.arange(kernels) // size
    allowed = (group[:, None] == group) & ~np.eye(kernels, dtype=bool)
    assert counts[~allowed].sum() == 0
    expected = draws * merge_prob / (size - 1)
    chi_squared = ((counts[allowed] - expected) ** 2 / expected).sum()
    freedom = allowed.sum()
    assert abs(chi_squared - freedom) < 4.5 * math.sqrt(2 * freedom)


def test_layers_drawn_together_have_each_its_own_uniforms_in_their_order():
    layers, probs = [(6, 1), (8, 4), (5, 5), (0, 1), (9, 3)], [0.5, 1.0, 1.0, 1.0, 0.0]
    drawn = draw_layers(layers, probs, np.random.default_rng(3), [False] * 5)
    uniforms = np.random.default_rng(3).random(28).tolist()
    for pairs, (kernels, groups), prob in zip(drawn, layers, probs, strict=True):
        own, uniforms = uniforms[:kernels], uniforms[kernels:]
        expected = oracle.draw(own, groups, prob)
        assert list(zip(pairs.picked.tolist(), pairs.partners.tolist(), strict=True)) == expected
        assert pairs.order.size == 0
    assert len({pairs.rounding for pairs in drawn}) == 5


def test_the_pairs_do_not_depend_on_whether_an_order_is_drawn():
    layers, probs = [(40, 1), (30, 2)], [0.5, 0.5]
    plain, ordered = (draw_layers(layers, probs, np.random.default_rng(0), [wish] * 2) for wish in (False, True))
    for pairs, other in zip(plain, ordered, strict=True):
        assert np.array_equal(pairs.picked, other.picked)
        assert np.array_equal(pairs.partners, other.partners)
        assert pairs.rounding == other.rounding
        assert sorted(other.order.tolist()) == list(range(pairs.picked.size))


class Uniforms:
    """A generator whose uniform numbers are known beforehand."""

    def __init__(self, *numbers):
        self.numbers = np.array(numbers, np.float64)

    def random(self, count):
        taken, self.numbers = self.numbers[:count], self.numbers[count:]
        return taken


@pytest.mark.parametrize(
    ("kernels", "groups", "prob", "message"),
    [
        (8, 1, 1.5, "merge_prob is 1.5, but it must be a number from 0 to 1"),
        (8, 1, float("nan"), "merge_prob is nan"),
        (8, 3, 0.3, "groups is 3, but it must divide the 8 kernels"),
        (8, 0, 0.3, "groups is 0, but it must be an int from 1"),
        (0, 1, 0.3, "kernels is 0, but it must be an int from 1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(kernels, groups, prob, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        draw_pairs(kernels, groups, prob, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("prob", "uniforms"),
    [
        (0.0, [0.0, 0.0, 0.0, 0.5]),  # none is below 0
        (0.3, [0.3, 0.0, np.nextafter(0.3, 0), 0.2999999]),  # p itself is not below p
        (0.34, [np.nextafter(0.34, 0)] * 4),  # the place of the last number below p is rounded up to the end
        (5e-324, [0.0, 5e-324, 0.0, 1e-323]),
        (1.0, [0.0, 1 / 3, np.nextafter(2 / 3, 0), np.nextafter(1.0, 0)]),
    ],
)
def test_a_kernel_is_drawn_where_its_uniform_number_is_below_p(prob, uniforms):
    picked, partners = draw_pairs(4, 1, prob, Uniforms(*uniforms, 0.5))
    assert list(zip(picked.tolist(), partners.tolist(), strict=True)) == oracle.draw(uniforms, 1, prob)


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
