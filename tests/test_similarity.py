"""What kernels look like: profiles against plain NumPy, the random null, and predicted against counted merges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from scipy import stats
from torch import nn

from inmerge_optim import (
    InMergeOptimizer,
    draw_pairs,
    kernel_similarity,
    merge_kernels_,
    similarity,
    similarity_profile,
)
from inmerge_optim.similarity import QUANTILES, random_share_above, threshold_for_rate

pytestmark = pytest.mark.portable


def plain_cosines(weight, groups=1):
    """Cosines of all pairs of two kernels of the same group, (n / groups choose 2) per group, in float64."""
    rows = weight.detach().double().flatten(1).numpy()
    found = []
    for group in np.split(rows, groups):
        norms = np.linalg.norm(group, axis=1)
        unit = group / np.where(norms > 0, norms, 1)[:, None]
        found.append((unit @ unit.T)[np.triu_indices(len(group), 1)])
    return np.concatenate(found)


def random_conv(kernels, channels, size=3, groups=1, seed=0):
    torch.manual_seed(seed)
    return nn.Conv2d(channels, kernels, size, groups=groups, bias=False)


def profile_of(conv, **settings):
    (profile,) = similarity_profile(nn.Sequential(conv), names=["0"], **settings)
    return profile


@pytest.fixture
def small_blocks(monkeypatch):
    """Split layers as wide ones are split."""
    monkeypatch.setattr(similarity, "_BLOCK", 50)


def test_similarity_is_the_cosine_within_groups_and_nan_between_them():
    weight = torch.randn(12, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    found = kernel_similarity(weight, groups=3)
    expected = nn.functional.cosine_similarity(weight.flatten(1)[:, None], weight.flatten(1)[None], dim=2)
    same = torch.arange(12)[:, None] // 4 == torch.arange(12)[None] // 4
    assert torch.allclose(found[same], expected[same], atol=1e-6)
    assert found[~same].isnan().all()


@pytest.mark.parametrize("block", [50, 2**20])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("length", [3, 27, 1000])
def test_similarity_is_symmetric_to_the_bit(length, groups, block, monkeypatch):
    """Which a matrix product is not: its bits depend on the processor, and on where a number stands in the result."""
    monkeypatch.setattr(similarity, "_BLOCK", block)
    weight = torch.randn(60, length, generator=torch.Generator().manual_seed(0))
    found = kernel_similarity(weight, groups)
    assert torch.equal(found.nan_to_num(7), found.T.nan_to_num(7))


def test_a_product_without_symmetry_becomes_symmetric(monkeypatch):
    """As on processors whose products are asymmetric; from the values above the diagonal, and on it."""

    def blocks(rows):
        yield 0, 0, torch.arange(9.0).reshape(1, 3, 3)

    monkeypatch.setattr(similarity, "_blocks", blocks)
    assert kernel_similarity(torch.ones(3, 2)).tolist() == [[0, 1, 2], [1, 4, 5], [2, 5, 8]]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("kernels", "groups"), [(64, 1), (60, 3), (60, 30), (7, 1), (4, 4)])
def test_blocks_make_no_difference(kernels, groups):
    weight = random_conv(kernels, 4 * groups, groups=groups).weight
    blocked, profile = kernel_similarity(weight, groups), profile_of(random_conv(kernels, 4 * groups, groups=groups))
    similarity._BLOCK = 2**20
    assert torch.allclose(blocked, kernel_similarity(weight, groups), atol=1e-6, equal_nan=True)
    whole = profile_of(random_conv(kernels, 4 * groups, groups=groups))
    assert np.abs(profile.histogram - whole.histogram).sum() <= 4  # cosines on the edge of a bin
    pairs = (*profile.most_similar, *profile.least_similar)
    expected = (*whole.most_similar, *whole.least_similar)
    assert [pair.cosine for pair in pairs] == pytest.approx([pair.cosine for pair in expected], abs=1e-6)
    for pair in pairs:
        assert blocked[pair.first, pair.second].item() == pytest.approx(pair.cosine, abs=1e-6)
    drawable = kernels * (kernels // groups - 1) / 2
    assert profile.share_above_threshold == pytest.approx(whole.share_above_threshold, abs=2.5 / max(drawable, 1))


@pytest.mark.parametrize("shape", [(1, 5000, 2), (300, 64, 2), (2, 1025, 1), (1, 3, 3)])
def test_no_block_is_larger_than_the_bound(shape):
    blocks = [block.numel() for _, _, block in similarity._blocks(torch.zeros(shape))]
    assert max(blocks) <= 2**20
    assert len(blocks) < 2 + 4 * shape[0] * shape[1] ** 2 / 2**20  # nor needlessly small


def test_zero_and_non_finite_kernels():
    weight = torch.tensor([[0.0, 0.0], [1.0, 0.0], [math.inf, 1.0], [1e-30, 1e-30], [1e30, 1e30]])
    found = kernel_similarity(weight)
    assert found[0].tolist()[:2] == [0, 0]
    assert found[2].isnan().all()
    assert found[3, 4].item() == pytest.approx(1)
    assert found[1, 4].item() == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_cosines_have_at_least_single_precision(dtype):
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = kernel_similarity(weight)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert np.allclose(found.double()[np.triu_indices(5, 1)].numpy(), plain_cosines(weight), atol=1e-6)


def test_bad_weights_are_refused():
    with pytest.raises(TypeError, match="int64"):
        kernel_similarity(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="groups is 2"):
        kernel_similarity(torch.ones(3, 3), groups=2)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 16, 27, 128, 4608, 100_000])
def test_the_random_share_is_the_beta_distributions_tail(length):
    for threshold in (-0.999, -0.3, -0.01, 0.0, 0.001, 0.05, 0.3, 0.7, 0.999):
        expected = 0.5 if length == 1 else stats.beta.sf((1 + threshold) / 2, (length - 1) / 2, (length - 1) / 2)
        assert random_share_above(threshold, length) == pytest.approx(expected, rel=1e-9, abs=1e-14)
    assert random_share_above(1, length) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize(("groups", "channels"), [(1, 8), (4, 32)])
def test_random_kernels_are_as_similar_as_the_null_says(groups, channels):
    conv = random_conv(1024, channels, size=1, groups=groups)
    nn.init.normal_(conv.weight)  # of random direction, which uniform weights are not
    profile = profile_of(conv, similarity_threshold=0.3)
    pairs = 1024 * (1024 // groups - 1) / 2
    null = random_share_above(0.3, profile.row_length)
    assert profile.random_share_above_threshold == null
    # Pairs that share a kernel are uncorrelated, and so the share varies as if all pairs were independent.
    assert abs(profile.share_above_threshold - null) < 4 * math.sqrt(null * (1 - null) / pairs)
    assert abs(profile.mean) < 4 / math.sqrt(profile.row_length * pairs)


def real_model(name, shared_file):
    model = timm.create_model(name) if name == "efficientnet_lite0" else getattr(torchvision.models, name)()
    model.load_state_dict(load_file(shared_file(f"weights/{name}.safetensors")))
    return model


@pytest.mark.parametrize("name", ["efficientnet_lite0", "squeezenet1_1"])
def test_the_profile_of_real_weights_agrees_with_numpy(name, shared_file):
    model = real_model(name, shared_file)
    profiles = similarity_profile(model, merge_prob=0.3, similarity_threshold=0.3, pairs=3)
    assert [profile.depth for profile in profiles if profile.depth is not None] == sorted(
        profile.depth for profile in profiles if profile.depth is not None
    )
    for profile in profiles:
        weight = model.get_submodule(profile.name).weight
        norms = weight.detach().flatten(1).norm(dim=1).numpy()
        assert profile.dead_kernels == tuple(np.flatnonzero(norms <= 1e-3 * norms.max()))
        assert (profile.kernels, profile.row_length) == (len(weight), weight[0].numel())
        if profile.kernels == profile.groups:
            assert profile.mean is profile.quantiles is profile.share_above_threshold is None
            assert profile.expected_merges == 0
            continue
        cosines = plain_cosines(weight, profile.groups)
        assert profile.mean == pytest.approx(cosines.mean(), abs=1e-6)
        assert profile.share_above_threshold == pytest.approx((cosines > 0.3).mean(), abs=2 / len(cosines))
        for share, quantile in profile.quantiles.items():
            near = np.quantile(cosines, share, method="lower"), np.quantile(cosines, share, method="higher")
            assert near[0] - 1.1e-4 < quantile < near[1] + 1.1e-4
        assert [pair.cosine for pair in profile.most_similar] == pytest.approx(np.sort(cosines)[:-4:-1], abs=1e-6)
        assert [pair.cosine for pair in profile.least_similar] == pytest.approx(np.sort(cosines)[:3], abs=1e-6)
        full = kernel_similarity(weight, profile.groups)
        for pair in (*profile.most_similar, *profile.least_similar):
            assert full[pair.first, pair.second].item() == pytest.approx(pair.cosine, abs=1e-6)
        if profile.selected:
            assert profile.expected_merges == pytest.approx(
                0.3 * profile.kernels * profile.share_above_threshold, rel=1e-12
            )


def predicted(profiles):
    """The profiles of selected layers by name."""
    return {profile.name: profile for profile in profiles if profile.selected}


def assert_within_sampling_error(merged, profile, steps):
    # A kernel merges at most once a step, each on its own, so the variance is at most that of a Poisson count.
    expected = steps * profile.expected_merges
    assert abs(merged - expected) < 4.5 * math.sqrt(expected) + 1e-9, profile.name


def frozen_counts(model, names, steps, **settings):
    """Merges and draws that an optimizer counts whose steps and merges leave the weights as they are."""
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = InMergeOptimizer(base, model, merge_weight=1.0, names=names, **settings)
    for name in names:
        weight = model.get_submodule(name).weight
        weight.grad = torch.zeros_like(weight)
    for _ in range(steps):
        optimizer.step()
    return optimizer.merge_counts()


@pytest.mark.parametrize(("name", "rate"), [("efficientnet_lite0", 0.0044), ("squeezenet1_1", 0.0168)])
def test_predicted_merges_are_those_that_the_optimizer_counts(name, rate, shared_file):
    model, steps = real_model(name, shared_file), 60
    before = {key: value.clone() for key, value in model.state_dict().items()}
    profiles = predicted(similarity_profile(model))
    counts = frozen_counts(model, list(profiles), steps)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert counts.keys() == profiles.keys()
    for layer, profile in profiles.items():
        assert_within_sampling_error(counts[layer]["merged"], profile, steps)
        assert abs(counts[layer]["drawn"] - steps * profile.expected_draws) < 4.5 * math.sqrt(
            steps * profile.expected_draws
        )
    total = sum(count["merged"] for count in counts.values())
    expected = steps * sum(profile.expected_merges for profile in profiles.values())
    assert abs(total - expected) < 3 * math.sqrt(expected)
    draws = steps * sum(profile.expected_draws for profile in profiles.values())
    assert expected / draws == pytest.approx(rate, abs=5e-5)


@pytest.mark.parametrize("threshold", [0.05, "1.5sd", "q0.9", "q0"])
def test_predicted_merges_of_a_grouped_model_are_those_that_the_optimizer_counts(threshold):
    torch.manual_seed(0)
    model, steps = timm.create_model("resnext26ts"), 20
    settings = {"merge_prob": 0.5, "similarity_threshold": threshold}
    profiles = predicted(similarity_profile(model, 0.8, **settings))
    assert any(profile.groups > 1 for profile in profiles.values())
    counts = frozen_counts(model, list(profiles), steps, **settings)
    for name, profile in profiles.items():
        assert profile.expected_merges > 1
        assert_within_sampling_error(counts[name]["merged"], profile, steps)


def test_a_quantile_is_predicted_for_few_and_for_non_finite_kernels():
    conv, steps = random_conv(12, 4), 2000
    conv.weight.data[3, 0, 0, 0] = math.nan
    settings = {"merge_prob": 0.4, "similarity_threshold": "q0.8"}
    profile = profile_of(conv, **settings)
    merged = sum(
        merge_kernels_(conv.weight.detach(), **settings, merge_weight=1.0, rng=np.random.default_rng(seed)).item()
        for seed in range(steps)
    )
    assert_within_sampling_error(merged, profile, steps)
    cosines = plain_cosines(conv.weight[[*range(3), *range(4, 12)]])
    assert (cosines > profile.threshold).mean() == pytest.approx(0.2, abs=0.01)
    assert profile.share_above_threshold == pytest.approx(0.2 * len(cosines) / (12 * 11 / 2))


@pytest.mark.parametrize("kernels", [2, 3, 8])
@pytest.mark.parametrize("share", [0, 0.5, 0.9, 0.99, 1])
def test_a_quantile_merges_its_share_of_however_few_pairs(share, kernels):
    """Of F finite drawn pairs, floor(share F + v) are not above it, with v uniform: an expected share for every F."""
    rng, steps = np.random.default_rng(0), 20_000
    finite = np.array([draw_pairs(kernels, 1, 0.4, rng)[0].size for _ in range(steps)])
    merged = finite - np.floor(share * finite + rng.random(steps))
    profile = profile_of(random_conv(kernels, 4), merge_prob=0.4, similarity_threshold=f"q{share}")
    assert profile.expected_merges == pytest.approx((1 - share) * 0.4 * kernels)
    assert_within_sampling_error(merged.sum(), profile, steps)


def test_thresholds_that_fit_each_layer_in_a_profile():
    conv = random_conv(256, 8)
    absolute, relative = (
        profile_of(conv, similarity_threshold=2 / math.sqrt(72)),
        profile_of(conv, similarity_threshold="2sd"),
    )
    assert relative == absolute
    assert profile_of(conv, similarity_threshold="-20sd").share_above_threshold == 1
    beyond = profile_of(conv, similarity_threshold="20sd")
    assert beyond.share_above_threshold == beyond.expected_merges == beyond.random_share_above_threshold == 0
    assert beyond.threshold == 20 / math.sqrt(72)
    ends = [profile_of(conv, similarity_threshold=text).threshold for text in ("q0", "q1")]
    cosines = plain_cosines(conv.weight)
    assert ends == pytest.approx([cosines.min(), cosines.max()], abs=1e-4)
    quantile = profile_of(conv, similarity_threshold="q0.9")
    assert quantile.threshold == pytest.approx(np.quantile(cosines, 0.9), abs=2e-4)
    assert quantile.expected_merges == pytest.approx(0.1 * quantile.expected_draws)


def test_the_threshold_for_a_rate_gives_that_rate(shared_file):
    model = real_model("squeezenet1_1", shared_file)
    threshold = threshold_for_rate(similarity_profile(model), 0.05)
    profiles = similarity_profile(model, similarity_threshold=threshold)
    draws = sum(profile.expected_draws for profile in profiles)
    assert sum(profile.expected_merges for profile in profiles) / draws == pytest.approx(0.05, abs=5e-4)


def test_no_threshold_gives_a_rate_when_nothing_is_selected():
    profiles = similarity_profile(nn.Sequential(nn.Conv2d(3, 3, 1, groups=3)), names=["0"])
    assert threshold_for_rate(profiles, 0.05) is None
    with pytest.raises(ValueError, match="rate is 1"):
        threshold_for_rate(profiles, 1)


def test_dead_and_non_finite_kernels_in_a_profile():
    conv = random_conv(6, 4)
    conv.weight.data[2] = 0
    conv.weight.data[4] *= 1e-5
    conv.weight.data[5, 0, 0, 0] = math.nan
    profile = profile_of(conv, similarity_threshold=-1, merge_prob=1)
    assert profile.dead_kernels == (2, 4)
    assert profile.histogram.sum() == 5 * 4 // 2
    assert profile.expected_merges == pytest.approx(5 * 4 / 5)  # a partner that is not finite is never merged with
    assert not math.isnan(profile.mean)


def test_parametrized_layers_are_described_and_not_selected():
    conv = torch.nn.utils.parametrizations.weight_norm(random_conv(6, 4))
    profile = profile_of(conv)
    assert (profile.selected, profile.reason, profile.expected_draws) == (False, "parametrized", 0)
    assert profile.mean == pytest.approx(plain_cosines(conv.weight).mean(), abs=1e-6)


def test_quantiles_ascend_and_lie_in_range():
    profile = profile_of(random_conv(64, 8))
    values = [profile.quantiles[share] for share in QUANTILES]
    assert values == sorted(values)
    assert values[0] >= -1
    assert values[-1] <= 1


def test_settings_are_checked():
    with pytest.raises(ValueError, match="merge_prob is 2"):
        profile_of(random_conv(4, 4), merge_prob=2)
    with pytest.raises(ValueError, match="meta device"):
        profile_of(random_conv(4, 4).to("meta"))


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.complex64])
def test_kernels_of_other_numbers_have_no_cosines(dtype):
    model = nn.Sequential(random_conv(4, 4), nn.ReLU(), random_conv(6, 4), nn.Flatten())
    model[0].weight = nn.Parameter(model[0].weight.data.to(dtype))
    other, profile = similarity_profile(model, names=["2", "0"], exclude=["0"])[::-1]
    assert (other.name, other.reason, other.kernels, other.row_length) == ("0", "excluded", 4, 36)
    assert other.mean is other.quantiles is other.share_above_threshold is None
    assert other.dead_kernels == other.most_similar == ()
    assert profile.mean is not None
    with pytest.raises(TypeError, match="16 bits"):
        kernel_similarity(model[0].weight)
