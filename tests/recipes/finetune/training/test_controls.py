"""Controls of merging, which change as much, to rounding; and arms with a weight decay or smoothing of their own."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import finetune.training.stage
import pytest
import torch
from finetune.errors import InputError
from finetune.options import Options
from finetune.training.arms import Arm, arm_of, check_arms, own_options
from finetune.training.controls import ControlOptimizer
from small_runs import assert_same, run_digits, run_digits_until
from torch.nn import functional as F
from toy import MERGED, MERGING, batch, network, sgd

from inmerge_optim import InMergeOptimizer

QUICK = ["--epochs", "1", "--limit-train", "200", "--batch-size", "100", "--similarity-threshold", "-0.5"]
CONTROLS = ["norm-matched", "noise-matched", "norm-matched-rounds", "noise-matched-rounds"]
ARMS = [*QUICK, "--merge-rounds", "2", "--arms", "baseline", "inmerge", "validation-rounds"]
ARMS += [*CONTROLS, "weight-decay", "label-smoothing"]


def change(optimizer, model, number, how):
    """Make a step on the batch of that number, or merge without one."""
    if how == "round":
        optimizer.merge()
        return
    images, labels = batch(number)
    optimizer.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()


def after(wrap, number, how):
    """The weights that an optimizer leaves behind in a new network, kernels as rows."""
    model = network()
    optimizer = wrap(model)
    change(optimizer, model, number, how)
    return {
        name: weight.detach().flatten(1) if weight.dim() > 1 else weight for name, weight in model.named_parameters()
    }


def merging(model):
    return InMergeOptimizer(sgd(model), model, **MERGING)


def control(kind):
    return lambda model: ControlOptimizer(sgd(model), model, kind, **MERGING)


@pytest.fixture(params=["step", "round"])
def how(request):
    return request.param


@pytest.fixture
def before(how):
    """The weights that are merged: after the step, or as they are."""
    if how == "round":
        return after(lambda model: InMergeOptimizer(sgd(model), model, **MERGING | {"merge_prob": 0}), 1, how)
    return after(sgd, 1, how)


@pytest.mark.parametrize("kind", ["norm", "noise"])
def test_kernels_that_merge_are_those_that_change_and_nothing_else_does(how, before, kind) -> None:
    merged, controlled = after(merging, 1, how), after(control(kind), 1, how)
    for name, old in before.items():
        if name in [f"{layer}.weight" for layer in MERGED]:
            changed = (merged[name] != old).any(1)
            assert 0 < changed.sum() < len(changed)
            assert torch.equal((controlled[name] != old).any(1), changed)
            assert not torch.equal(controlled[name], merged[name])
        else:
            assert torch.equal(controlled[name], old)


def test_norms_are_those_of_the_merge_and_directions_stay(how, before) -> None:
    merged, controlled = after(merging, 1, how), after(control("norm"), 1, how)
    for name in (f"{layer}.weight" for layer in MERGED):
        torch.testing.assert_close(controlled[name].norm(dim=1), merged[name].norm(dim=1))
        torch.testing.assert_close(F.cosine_similarity(controlled[name], before[name]), torch.ones(8))


def test_displacements_are_those_of_the_merge_in_other_directions(how, before) -> None:
    merged, controlled = after(merging, 1, how), after(control("noise"), 1, how)
    for name in (f"{layer}.weight" for layer in MERGED):
        mine, theirs = controlled[name] - before[name], merged[name] - before[name]
        torch.testing.assert_close(mine.norm(dim=1), theirs.norm(dim=1))
        assert F.cosine_similarity(mine, theirs).abs().max() < 0.9


def test_noise_is_keyed_by_the_step_and_leaves_the_global_generator() -> None:
    model = network()
    optimizer, start = control("noise")(model), network().state_dict()
    state, moved = torch.get_rng_state(), []
    for _ in range(2):
        model.load_state_dict(start)
        optimizer.merge()
        moved.append(model.deep.weight.detach() - start["deep.weight"])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(*moved)
    assert torch.equal(after(control("noise"), 1, "round")["deep.weight"], (start["deep.weight"] + moved[0]).flatten(1))


def test_a_kernel_of_zeros_stays_one() -> None:
    model = network()
    model.deep.weight.data[0] = 0
    control("norm")(model).merge(20)
    assert not model.deep.weight[0].any()
    assert model.deep.weight.isfinite().all()


@pytest.mark.parametrize("kind", ["norm", "noise"])
def test_biases_that_merging_would_blend_along_stay(kind) -> None:
    model = network()
    optimizer = ControlOptimizer(sgd(model), model, kind, **MERGING, merge_channels=True)
    optimizer.merge()
    assert torch.equal(model.deep.bias, network().deep.bias)
    assert not torch.equal(model.deep.weight, network().deep.weight)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda found: pickle.loads(pickle.dumps(found))])
def test_copies_are_controls_of_the_same_kind(again) -> None:
    assert again(control("noise")(network())).control == "noise"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return run_digits(tmp_path_factory.mktemp("controls") / "run", *ARMS)


def test_controls_are_judged_beside_the_arms_that_they_are_controls_of(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert list(summary["contrasts"]) == [
        "inmerge - norm-matched",
        "inmerge - noise-matched",
        "validation-rounds - norm-matched-rounds",
        "validation-rounds - noise-matched-rounds",
    ]
    assert set(summary["merges"]) == {"inmerge", "validation-rounds", *CONTROLS}
    weights = {(finished / f"seed_0/{arm}/model.safetensors").read_bytes() for arm in summary["arms"]}
    assert len(weights) == len(summary["arms"]) == 9


@pytest.mark.slow
def test_stopped_controls_go_on_to_the_same_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, finished: Path
) -> None:
    """Stopped between the two epochs of noise-matched-rounds, whose noise is keyed by the count of rounds."""
    run_digits_until(monkeypatch, tmp_path / "run", finetune.training.stage, "train_epoch", 15, *ARMS)
    run_digits(tmp_path / "run", *ARMS, "--resume")
    assert_same(tmp_path / "run", finished)


def test_arms_differ_in_what_they_are_named_for_alone(tmp_path: Path) -> None:
    """Controls that nothing merges for, the trial's own weight decay, and no smoothing, are the baseline to the bit."""
    arms = ["baseline", *CONTROLS, "weight-decay@weight_decay=0.0001", "label-smoothing@smoothing=0.0"]
    words = [*QUICK, "--inmerge-epochs", "1", "--merge-rounds", "2", "--merge-prob", "0"]
    run = run_digits(tmp_path / "run", *words, "--arms", *arms)
    assert len({(run / f"seed_0/{arm}/model.safetensors").read_bytes() for arm in arms}) == 1


def test_any_arm_may_have_a_weight_decay_and_smoothing_of_its_own() -> None:
    arm, options = arm_of("inmerge@merge_prob=0.1,weight_decay=0.02"), Options(smoothing=0.2)
    assert arm == Arm(criterion="similar", settings={"merge_prob": 0.1, "weight_decay": 0.02})
    own = own_options(arm, options)
    assert (own.weight_decay, own.smoothing, own.merge_prob) == (0.02, 0.2, 0.3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("weight-decay@weight_decay=-1.0", r"weight_decay=-1.0 can't be used \(--weight-decay must be at least 0"),
        ("label-smoothing@smoothing=1.0", r"can't be used \(--smoothing must be at least 0 and below 1, not 1.0"),
        ("label-smoothing@smoothing=nan", r"can't be used \(--smoothing must be a finite number"),
    ],
)
def test_settings_out_of_range_are_told_by_the_arm(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_arms(Options(arms=("baseline", name)))


def test_a_control_needs_merges_to_stand_in_for() -> None:
    with pytest.raises(ValueError, match="merges nothing has no use for control"):
        Arm(control="norm")
