"""The wrapper: what it leaves alone, what it merges and when, and what it refuses."""

from __future__ import annotations

import copy
import hashlib
import pickle
import warnings

import numpy as np
import oracle
import pytest
import timm
import timm.optim
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from inmerge_optim import InMergeOptimizer, NoMergeWarning, merge_kernels_
from inmerge_optim.optimizer import _generator, _is_zero

MERGE_ALL = {"merge_prob": 1.0, "similarity_threshold": -1.0}


def small_cnn(seed=0):
    """Return a CNN with the parts that optimizers treat apart: norms, biases, groups, a head; two layers to merge."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 2),
    )


def backward(model, step=0, second_order=False):
    """Set the gradients of a loss on a batch that the step's number determines, and return the loss."""
    generator = torch.Generator().manual_seed(step)
    images, labels = torch.randn(4, 3, 8, 8, generator=generator), torch.tensor([0, 1, 1, 0])
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward(create_graph=second_order)
    return loss


def train(model, optimizer, steps=5, start=0):
    """Run steps of an ordinary loop, through a closure, so that every optimizer can take part."""
    for step in range(start, start + steps):

        def closure(step=step):
            optimizer.zero_grad()
            return backward(model, step, second_order=getattr(optimizer, "is_second_order", False))

        optimizer.step(closure)


def wrap(model, base=None, **settings):
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) if base is None else base
    return InMergeOptimizer(base, model, **{"skip_layers": 1, **settings})


def step_rng(seed, step, names=("3", "5")):
    """Return the generator of a step: one uniform number per kernel comes first, in the order of the layers."""
    key = repr((seed, "step", step, *names)).encode()
    return np.random.default_rng(int.from_bytes(hashlib.sha256(key).digest(), "little"))


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def torch_optimizers():
    for name, kind in sorted(vars(torch.optim).items()):
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer:
            yield name


# Not for parameters like these: sparse gradients alone; two-dimensional parameters alone.
TORCH_EXCEPTIONS = {"SparseAdam", "Muon"}


@pytest.mark.parametrize("name", sorted(set(torch_optimizers()) - TORCH_EXCEPTIONS))
def test_without_merging_it_is_the_base_to_the_bit_for_torch(name):
    plain, wrapped = small_cnn(), small_cnn()
    bare = getattr(torch.optim, name)(plain.parameters(), lr=0.01)
    optimizer = wrap(wrapped, getattr(torch.optim, name)(wrapped.parameters(), lr=0.01), merge_prob=0.0)
    train(plain, bare)
    train(wrapped, optimizer)
    assert equal(plain, wrapped)
    assert not equal(plain, small_cnn())


def test_the_exceptions_of_torch_do_not_take_such_parameters():
    with pytest.raises(ValueError, match="2D"):
        torch.optim.Muon(small_cnn().parameters())
    model = small_cnn()
    optimizer = torch.optim.SparseAdam(model.parameters())
    backward(model)
    with pytest.raises(RuntimeError, match="dense gradients"):
        optimizer.step()


# bitsandbytes' and APEX's need a GPU to be built.
TIMM_OPTIMIZERS = [name for name in timm.optim.list_optimizers() if not name.startswith(("bnb", "fused"))]


@torch.compiler.set_stance("force_eager")  # Kron compiles its parts, which takes minutes
@pytest.mark.parametrize("name", TIMM_OPTIMIZERS)
def test_without_merging_it_is_the_base_to_the_bit_for_timm(name):
    plain, wrapped = small_cnn(), small_cnn()
    settings = {"opt": name, "lr": 1e-3, "weight_decay": 0.05}  # no decay for norms and biases: two groups
    torch.manual_seed(1)
    train(plain, timm.optim.create_optimizer_v2(plain, **settings))
    torch.manual_seed(1)
    optimizer = wrap(wrapped, timm.optim.create_optimizer_v2(wrapped, **settings), merge_prob=0.0)
    assert len(optimizer.param_groups) == 2
    train(wrapped, optimizer)
    assert equal(plain, wrapped)
    assert not equal(plain, small_cnn())


def test_without_merging_layer_decay_is_the_base_to_the_bit():
    models = []
    for wrapping in (False, True):
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", num_classes=2)
        optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
        if wrapping:
            assert len(optimizer.param_groups) > 4
            optimizer = InMergeOptimizer(optimizer, model, merge_prob=0.0)
        for step in range(3):
            optimizer.zero_grad()
            model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(step))).square().sum().backward()
            optimizer.step()
        models.append(model)
    assert equal(*models)


def test_each_step_is_the_bases_step_and_then_a_merge_of_each_selected_layer():
    expected, wrapped = small_cnn(), small_cnn()
    base = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
    optimizer = wrap(wrapped, similarity_threshold=0.0, merge_prob=0.7, seed=3)
    for step in range(4):
        train(expected, base, 1, start=step)
        uniforms = step_rng(3, step).random(20).tolist()
        draws = [oracle.draw(uniforms[:8], 2, 0.7), oracle.draw(uniforms[8:], 1, 0.7)]
        for place, pairs in zip((3, 5), draws, strict=True):
            weight = expected[place].weight.detach()
            before = weight.clone()
            for i, j in pairs:
                if torch.cosine_similarity(before[i].flatten(), before[j].flatten(), dim=0) > 0:
                    weight[i] = torch.lerp(before[i], before[j], 0.2)
        train(wrapped, optimizer, 1, start=step)
        for a, b in zip(expected.parameters(), wrapped.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-6)
    assert optimizer.merge_counts()["5"]["merged"] > 5
    assert {group["inmerge_step"] for group in optimizer.param_groups} == {4}


def test_biases_norms_and_optimizer_state_stay_as_the_base_left_them():
    plain, wrapped = small_cnn(), small_cnn()
    base, optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9), wrap(wrapped, **MERGE_ALL)
    train(plain, base, 1)
    train(wrapped, optimizer, 1)
    changed = [n for (n, a), b in zip(plain.named_parameters(), wrapped.parameters(), strict=True) if not a.equal(b)]
    assert changed == ["3.weight", "5.weight"]
    for a, b in zip(base.state.values(), optimizer.state.values(), strict=True):
        assert torch.equal(a["momentum_buffer"], b["momentum_buffer"])


@pytest.mark.parametrize("criterion", ["similar", "dissimilar", "random_pairs"])
def test_counts_have_the_mean_cosine_of_the_merged_pairs(criterion):
    model = small_cnn()
    optimizer = wrap(model, merge_prob=0.7, similarity_threshold=0.0, criterion=criterion, seed=3)
    assert optimizer.merge_counts()["5"] == {"drawn": 0, "merged": 0, "mean_cosine": None}
    cosines = []
    twin = small_cnn()
    base = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for step in range(4):
        twin.load_state_dict(model.state_dict())
        train(twin, base, 1, start=step)  # the weights as the base leaves them, from which the cosines are taken
        train(model, optimizer, 1, start=step)
        before, after = (net[5].weight.detach().flatten(1) for net in (twin, model))
        for i, j in oracle.draw(step_rng(3, step).random(20).tolist()[8:], 1, 0.7):
            if not torch.equal(before[i], after[i]):
                cosines.append(torch.cosine_similarity(before[i].double(), before[j].double(), dim=0).item())
    counts = optimizer.merge_counts()["5"]
    assert counts["merged"] == len(cosines) > 0
    assert counts["mean_cosine"] == pytest.approx(sum(cosines) / len(cosines), abs=1e-6)
    with torch.device("meta"):  # a default device, as of scripts that begin with torch.set_default_device("cuda")
        assert optimizer.merge_counts()["5"] == counts
        assert copy.deepcopy(optimizer).merge_counts() == optimizer.merge_counts()


def test_draws_are_the_same_whatever_other_layers_do():
    merged = []
    for frozen in (False, True):
        model = small_cnn()
        model[3].weight.requires_grad_(not frozen)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer = wrap(model, **MERGE_ALL)
        optimizer.step()
        merged.append(model)
    assert torch.equal(merged[0][5].weight, merged[1][5].weight)
    assert not torch.equal(merged[0][3].weight, merged[1][3].weight)
    assert torch.equal(merged[1][3].weight, small_cnn()[3].weight)


def test_the_global_generators_are_left_alone():
    model = small_cnn()
    optimizer = wrap(model, **MERGE_ALL)
    backward(model)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002


def test_no_two_seeds_steps_or_models_share_their_draws():
    drawn = {}
    for names in (("a", "b"), ("ab", ""), ("a", "c")):
        for seed in (0, 1, 2**32, 2**32 + 1):
            for kind, number in (("step", 0), ("step", 1), ("step", 2**32), ("round", 0)):
                drawn[seed, kind, number, names] = _generator(seed, kind, number, *names).random(4).tobytes()
    assert len(set(drawn.values())) == len(drawn)


def test_two_networks_of_one_seed_draw_apart_unless_their_layers_have_the_same_names():
    """A generator and a discriminator, say; the two of an ensemble are told to take seeds of their own."""
    plain, nested, twin = small_cnn(), nn.Sequential(small_cnn()), small_cnn()
    for model, names in ((plain, ["3", "5"]), (nested, ["0.3", "0.5"]), (twin, ["3", "5"])):
        optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=1e-30), names=names, merge_prob=0.5)
        optimizer.similarity_threshold = -1.0
        backward(model)
        optimizer.step()
    assert equal(plain, twin)
    assert not equal(plain, nested[0])


def test_seeds_and_steps_give_other_draws():
    weights = {}
    for seed in (0, 1):
        model = small_cnn()
        optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=1e-30), merge_prob=0.5, seed=seed, skip_layers=2)
        for step in range(2):
            backward(model)
            before = model[5].weight.detach().clone()
            optimizer.similarity_threshold = -1.0
            optimizer.step()
            weights[seed, step] = tuple((model[5].weight != before).flatten(1).any(1).tolist())
    assert len(set(weights.values())) == 4


def test_controls_merge_the_pairs_that_they_name():
    counts = {}
    for criterion in ("similar", "dissimilar", "random_pairs"):
        model = small_cnn()
        optimizer = wrap(model, merge_prob=1.0, similarity_threshold=0.0, criterion=criterion)
        backward(model)
        optimizer.step()
        counts[criterion] = [count["merged"] for count in optimizer.merge_counts().values()]
        assert [count["drawn"] for count in optimizer.merge_counts().values()] == [8, 12]
    assert counts["similar"] == counts["random_pairs"]
    assert [a + b for a, b in zip(counts["similar"], counts["dissimilar"], strict=True)] == [8, 12]


def test_settings_may_change_between_steps_and_are_checked_when_set():
    model = small_cnn()
    optimizer = wrap(model, **MERGE_ALL)
    optimizer.merge_prob = 0.0
    train(model, optimizer, 2)
    assert [count["drawn"] for count in optimizer.merge_counts().values()] == [0, 0]
    optimizer.merge_prob, optimizer.merge_weight, optimizer.similarity_threshold = 1.0, 0.5, -1.0
    train(model, optimizer, 1)
    assert [count["merged"] for count in optimizer.merge_counts().values()] == [8, 12]
    for name, value, message in [
        ("merge_weight", 2, "merge_weight is 2, but it must be a number from 0 to 1"),
        ("criterion", "disimilar", "criterion is 'disimilar', but it must be one of similar, dissimilar, random_pairs"),
        ("seed", -5, "seed is -5, but it must be an int from 0"),
    ]:
        before = getattr(optimizer, name)
        with pytest.raises(ValueError, match=message):
            setattr(optimizer, name, value)
        assert getattr(optimizer, name) == before


def test_thresholds_that_fit_each_layer_may_be_set_between_steps():
    model = small_cnn()
    optimizer = wrap(model, merge_prob=1.0, similarity_threshold="q0.75")
    assert "similarity_threshold='q0.75'" in repr(optimizer)
    train(model, optimizer, 1)
    assert optimizer.merge_counts()["5"]["merged"] == 3
    optimizer.similarity_threshold = "-20sd"
    train(model, optimizer, 1, start=1)
    assert optimizer.merge_counts()["5"]["merged"] == 3 + 12
    with pytest.raises(
        ValueError, match=r"similarity_threshold is '4SD', but it must be a number from -1 to 1, '<k>sd'"
    ):
        optimizer.similarity_threshold = "4SD"
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert copied.similarity_threshold == "-20sd"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"merge_prob": 1.2}, "merge_prob is 1.2"),
        ({"merge_weight": -1}, "merge_weight is -1"),
        ({"similarity_threshold": 1.5}, "similarity_threshold is 1.5, but it must be a number from -1 to 1"),
        ({"criterion": "alike"}, "criterion is 'alike'"),
        ({"seed": -1}, "seed is -1, but it must be an int from 0"),
        ({"skip_layers": 3}, "skip_layers is 3, but Sequential has 3 counted layers"),
        ({"names": "nothing"}, "no layer matches"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        wrap(small_cnn(), **settings)


def test_a_base_that_is_no_optimizer_or_wrapped_already_is_refused():
    model = small_cnn()
    with pytest.raises(TypeError, match=r"base_optimizer is a Sequential, but it must be a torch.optim.Optimizer"):
        InMergeOptimizer(model, model)
    with pytest.raises(TypeError, match="wrap the bare optimizer, once"):
        InMergeOptimizer(wrap(model), model)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Linear(4, 2), "Linear has no layer of the layer_types"),
        (lambda: timm.create_model("test_vit"), "no layer of VisionTransformer is selected for merging"),
    ],
)
def test_a_model_without_kernels_to_merge_is_refused(build, message):
    model = build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=message):
            InMergeOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)


def test_parameters_in_place_of_the_model_are_refused():
    model = small_cnn()
    with pytest.raises(TypeError, match=r"model is a generator, but it must be the torch.nn.Module whose parameters"):
        wrap(model.parameters(), torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_weights_that_are_no_plain_numbers_are_refused_by_the_name_of_their_layer(dtype):
    model = small_cnn()
    model[5].weight = nn.Parameter(model[5].weight.detach().to(dtype))
    with pytest.raises(TypeError, match=f"5 has a {str(dtype).removeprefix('torch.')} weight, but kernels"):
        wrap(model, names=["3", "5"])


def test_an_optimizer_of_another_model_is_refused():
    with pytest.raises(ValueError, match="none of the selected layers of Sequential has its weight in the optimizer"):
        wrap(small_cnn(), torch.optim.SGD(small_cnn().parameters(), lr=0.1))


def test_layers_say_what_is_bound():
    model = small_cnn()
    model[3].weight.requires_grad_(False)
    base = torch.optim.SGD([p for name, p in model.named_parameters() if name != "5.weight"], lr=0.1)
    with pytest.warns(UserWarning, match="1 of the 2 layers selected for merging are not in the optimizer.*: 5;"):
        layers = {layer.name: layer for layer in wrap(model, base).layers}
    assert (layers["0"].selected, layers["0"].reason) == (False, "shallow")
    assert (layers["3"].selected, layers["3"].reason) == (True, "frozen")
    assert (layers["5"].selected, layers["5"].reason) == (False, "not in the optimizer")


def test_the_repr_counts_the_layers_that_have_a_depth():
    head = nn.Conv2d(12, 4, 1)  # acts as fully connected
    model = nn.Sequential(*small_cnn()[:7], head, nn.Flatten(), nn.Linear(4, 2))
    assert "merging 2 of 3 layers" in repr(wrap(model))


@pytest.mark.parametrize(("merge_channels", "told"), [(False, ""), (True, "merge_channels=True, ")])
def test_the_repr_has_the_settings_and_how_many_layers_are_merged(merge_channels, told):
    settings = {"merge_prob": 0.5, "similarity_threshold": "4sd", "names": ["3", "5"]}
    optimizer = wrap(small_cnn(), merge_channels=merge_channels, **settings)
    assert repr(optimizer).startswith(
        "InMergeOptimizer(merge_prob=0.5, merge_weight=0.8, similarity_threshold='4sd', criterion='similar', seed=0, "
        f"every=1, merge_start=0, merge_stop=None, {told}merging 2 of 3 layers, base_optimizer="
        f"{type(optimizer.base_optimizer).__name__} ("
    )


@pytest.fixture(scope="module", params=[(0.99, "of 0.99:"), ("6sd", "of '6sd':")], ids=str)
def told_of_no_merges(request):
    """The warnings of eight steps that merge nothing, and how they name the threshold."""
    threshold, told = request.param
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 3000, 3), nn.BatchNorm2d(3000))
    optimizer = wrap(model, merge_prob=1.0, similarity_threshold=threshold)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(8):
            model(torch.randn(1, 1, 6, 6)).square().sum().backward()
            optimizer.step()
    return [warning for warning in caught if warning.category is NoMergeWarning], told


def test_one_warning_when_next_to_nothing_merges(told_of_no_merges):
    warned, told = told_of_no_merges
    assert [str(warning.message) for warning in warned] == [
        f"0 of the first 12000 drawn pairs of kernels were merged at a similarity_threshold {told} so far this run is "
        "nearly a plain baseline; a lower threshold, one that fits each layer ('4sd', 'q0.9') or a model with "
        "pretrained weights merges more"
    ]


def test_that_warning_names_the_line_of_the_user(told_of_no_merges):
    assert told_of_no_merges[0][0].filename == __file__


@pytest.mark.parametrize(("merged", "warned"), [(9, 1), (10, 0)])
def test_one_pair_in_a_thousand_is_enough_not_to_be_warned(merged, warned):
    optimizer = wrap(small_cnn())
    optimizer._drawn = {1: 10_000}
    optimizer._tallies.on(torch.device("cpu"))[1, 0] = merged
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer._warn_if_nothing_merges()
        optimizer._warn_if_nothing_merges()
    assert len(caught) == warned


def test_a_learning_rate_on_a_device_is_not_read():
    assert _is_zero(torch.tensor(0.0))
    assert not _is_zero(torch.empty((), device="meta"))


def test_no_warning_where_kernels_merge():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 3000, 3), nn.BatchNorm2d(3000))
    optimizer = wrap(model, **MERGE_ALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NoMergeWarning)
        for _ in range(5):
            model(torch.randn(1, 1, 6, 6)).square().sum().backward()
            optimizer.step()
    assert optimizer.merge_counts()["1"]["merged"] > 10_000


def test_merge_kernels_is_one_step_of_the_wrapper():
    wrapped, by_hand = small_cnn(), small_cnn()
    base = torch.optim.SGD(wrapped[5:].parameters(), lr=0.1)
    optimizer = wrap(wrapped, base, names=["5"], merge_prob=0.5, similarity_threshold=0.0)
    base = torch.optim.SGD(by_hand[5:].parameters(), lr=0.1)
    train(wrapped, optimizer, 1)
    train(by_hand, base, 1)
    rng = step_rng(0, 0, names=["5"])
    merge_kernels_(by_hand[5].weight, merge_prob=0.5, merge_weight=0.8, similarity_threshold=0.0, rng=rng)
    assert equal(wrapped[5:], by_hand[5:])


def test_checkpoints_resume_to_the_bit():
    straight, resumed = small_cnn(), small_cnn()
    settings = {"merge_prob": 0.5, "similarity_threshold": -1.0}
    train(straight, wrap(straight, **settings), 6)
    first = wrap(resumed, **settings)
    train(resumed, first, 3)
    saved = copy.deepcopy((resumed.state_dict(), first.state_dict()))
    resumed = small_cnn(seed=9)
    second = wrap(resumed, **settings)
    resumed.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    train(resumed, second, 3, start=3)
    assert equal(straight, resumed)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: parametrize.register_parametrization(layer, "weight", nn.Tanh()),
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    ],
    ids=["parametrized", "pruned"],
)
def test_a_weight_that_is_parametrized_or_pruned_after_wrapping_is_left_alone_from_then_on(change):
    merged, plain = small_cnn(), small_cnn()
    optimizer = wrap(merged, **MERGE_ALL)
    base = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for model in (merged, plain):
        change(model[5])
    train(merged, optimizer, 1)
    train(plain, base, 1)
    (original,) = (value for name, value in merged[5].named_parameters() if name.endswith(("original", "weight_orig")))
    assert any(torch.equal(original, value) for value in plain[5].parameters())
    assert optimizer.merge_counts()["5"]["drawn"] == 0
    assert optimizer.merge_counts()["3"]["drawn"] == 8
    assert {layer.name: layer.reason for layer in optimizer.layers}["5"] == "parametrized"


def test_a_pickle_is_no_larger_than_the_base_and_needs_no_module():
    model = small_cnn()
    model[0].register_forward_hook(lambda module, args, output: None)  # can't be pickled
    optimizer = wrap(model)
    train(model, optimizer, 1)
    base, wrapper = len(pickle.dumps(optimizer.base_optimizer)), len(pickle.dumps(optimizer))
    assert wrapper < base + 10_000
    assert pickle.loads(pickle.dumps(optimizer)).merge_counts() == optimizer.merge_counts()
