"""Bases with habits of their own: closures, nested steps, inner and outer wrappers, modes, groups that come later."""

from __future__ import annotations

import pytest
import torch
from timm.optim import Lookahead, create_optimizer_v2
from toy import MERGED, Moded, closure_of, merge_step, network, same, sgd, train, trained, wrapped


class StepsThroughSuper(torch.optim.SGD):
    """SGD whose step calls that of its parent, as many optimizers outside of torch do."""

    def step(self, closure=None):
        return super().step(closure)


class ZeroesInside(torch.optim.SGD):
    """SGD that drops the gradients at the end of its step."""

    def step(self, closure=None):
        loss = super().step(closure)
        self.zero_grad()
        return loss


class SharpnessAware(torch.optim.SGD):
    """SGD with the gradient of a point uphill (Foret et al., 2021), which leaves grad mode as it finds it."""

    def step(self, closure):
        closure()
        with torch.no_grad():
            climbed = [(p, 0.05 * p.grad.sign()) for group in self.param_groups for p in group["params"]]
            for parameter, climb in climbed:
                parameter += climb
        loss = closure()
        with torch.no_grad():
            for parameter, climb in climbed:
                parameter -= climb
        super().step()
        return loss


class Wrapping(torch.optim.Optimizer):
    """An optimizer around another one that never called torch's __init__, so that it lacks torch's hook dicts."""

    def __init__(self, base):
        self.base = base
        self.param_groups, self.defaults, self.state = base.param_groups, base.defaults, base.state

    def step(self, closure=None):
        return self.base.step(closure)

    def zero_grad(self, set_to_none=True):
        self.base.zero_grad(set_to_none)

    def state_dict(self):
        return self.base.state_dict()

    def load_state_dict(self, state_dict):
        self.base.load_state_dict(state_dict)
        self.param_groups = self.base.param_groups


@pytest.mark.parametrize("kind", [StepsThroughSuper, ZeroesInside])
def test_a_base_that_steps_through_super_or_drops_gradients_is_merged_once_a_step(kind):
    model, optimizer = trained(4, base=lambda model: kind(model.parameters(), lr=0.1, momentum=0.9))
    expected, plain = trained(4)
    assert same(model, expected)
    assert optimizer.merge_counts() == plain.merge_counts()
    assert merge_step(optimizer) == 4


def step_with_closures(model, optimizer, steps):
    """Train with closures; return whether gradients were enabled in them."""
    modes = set()
    for step in range(steps):
        closure = closure_of(model, optimizer, step)
        optimizer.step(lambda closure=closure: (modes.add(torch.is_grad_enabled()), closure())[1])
    return modes


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, SharpnessAware])
def test_closures_keep_grad_and_only_the_merge_is_added(kind):
    bare, unmerged, merged = network(), network(), network()
    step_with_closures(bare, kind(bare.parameters(), lr=0.1), 3)
    optimizer = wrapped(unmerged, kind(unmerged.parameters(), lr=0.1), merge_prob=0.0)
    assert step_with_closures(unmerged, optimizer, 3) == {True}
    assert same(bare, unmerged)

    optimizer = wrapped(merged, kind(merged.parameters(), lr=0.1))
    assert step_with_closures(merged, optimizer, 3) == {True}
    assert merge_step(optimizer) == 3
    assert all(count["merged"] > 0 for count in optimizer.merge_counts().values())


def test_the_loss_of_the_closure_is_returned():
    model = network()
    optimizer = wrapped(model)
    closure = closure_of(model, optimizer, 0)
    assert torch.equal(optimizer.step(closure), closure_of(network(), optimizer, 0)())
    assert optimizer.step() is None


def test_layers_without_gradients_are_left_alone():
    _, optimizer = trained(1)
    before = optimizer.merge_counts()
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.merge_counts() == before


def test_add_param_group_reaches_the_base_and_merges_the_layer_from_then_on():
    model = network()
    kept = [p for name, p in model.named_parameters() if not name.startswith("grouped.")]
    with pytest.warns(UserWarning, match="layers selected for merging are not in the optimizer.*: grouped;"):
        optimizer = wrapped(model, torch.optim.SGD(kept, lr=0.1, momentum=0.9))
    assert [layer.reason for layer in optimizer.layers if layer.name == "grouped"] == ["not in the optimizer"]
    train(model, optimizer, 2)
    optimizer.add_param_group({"params": model.grouped.parameters(), "lr": 0.05})
    assert [group["lr"] for group in optimizer.base_optimizer.param_groups] == [0.1, 0.05]
    assert merge_step(optimizer) == 2
    assert optimizer.merge_counts()["grouped"]["drawn"] == 0
    before = model.grouped.weight.clone()
    train(model, optimizer, range(2, 5))
    assert not torch.equal(before, model.grouped.weight)
    assert optimizer.merge_counts()["grouped"]["merged"] > 0
    assert [layer.name for layer in optimizer.layers if layer.selected] == MERGED


def test_lookahead_of_timm_inside_is_merged_and_resumes(tmp_path):
    def build(seed=0):
        model = network(seed)
        return model, wrapped(model, Lookahead(sgd(model), k=2))

    model, optimizer = build()
    train(model, optimizer, 3)
    assert all(count["merged"] > 0 for count in optimizer.merge_counts().values())
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "checkpoint.pt")
    resumed, other = build(seed=1)
    for part, state in zip((resumed, other), torch.load(tmp_path / "checkpoint.pt"), strict=True):
        part.load_state_dict(state)
    train(model, optimizer, range(3, 7))
    train(resumed, other, range(3, 7))
    assert same(model, resumed)


def test_lookahead_of_timm_around_averages_merged_weights():
    model = network()
    outer = Lookahead(wrapped(model), k=5)
    train(model, outer, 4)  # before its first synchronisation it changes nothing
    merged, _ = trained(4)
    assert same(model, merged)
    outer.sync_lookahead()
    assert same(model, merged)  # its slow weights start as the merged ones
    assert outer.state_dict()["param_groups"][0]["inmerge_step"] == 4
    train(model, outer, range(4, 7))
    assert not same(model, trained(7)[0])


def test_lookahead_by_timms_name_is_wrapped_like_any_other():
    model = network()
    optimizer = wrapped(model, create_optimizer_v2(model, "lookahead_adamw", lr=0.01))
    train(model, optimizer, 7)
    assert merge_step(optimizer) == 7


def test_a_base_without_the_hooks_of_torch_is_merged_and_saved():
    model = network()
    optimizer = wrapped(model, Wrapping(sgd(model)))
    train(model, optimizer, 3)
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, range(3, 5))
    assert same(model, trained(5)[0])


def test_modes_are_those_of_a_base_that_has_them():
    model = network()
    base = Moded(model.parameters(), lr=0.1)
    optimizer = wrapped(model, base)
    optimizer.train()
    assert base.mode == "train"
    optimizer.eval()
    assert base.mode == "eval"
    assert not hasattr(wrapped(network()), "train")  # accelerate and the Hugging Face Trainer ask


def test_state_groups_and_defaults_are_the_bases_when_either_replaces_them():
    model = network()
    base = sgd(model)
    optimizer = wrapped(model, base)
    base.param_groups = [dict(group) for group in base.param_groups]
    assert optimizer.param_groups is base.param_groups
    for name, value in [("param_groups", list(base.param_groups)), ("state", {}), ("defaults", {"lr": 1.0})]:
        setattr(optimizer, name, value)
        assert getattr(base, name) is value
        assert getattr(optimizer, name) is value


class ChoosesItself(torch.optim.SGD):
    """SGD whose zero_grad takes no set_to_none, as in Apex's FusedAdam, and whose step takes more than a closure."""

    seen = None

    def zero_grad(self):
        super().zero_grad(set_to_none=True)

    def step(self, closure=None, grads=None, scale=1.0):
        self.seen = closure, grads, scale
        return super().step(closure)


def test_zero_grad_asks_a_base_only_for_what_it_takes():
    model = network()
    optimizer = wrapped(model, ChoosesItself(model.parameters(), lr=0.1))
    train(model, optimizer, 1)
    optimizer.zero_grad(set_to_none=True)
    assert all(parameter.grad is None for parameter in model.parameters())
    optimizer = wrapped(model)
    train(model, optimizer, 1)
    optimizer.zero_grad(set_to_none=False)
    assert all(parameter.grad.eq(0).all() for parameter in model.parameters())


def test_extra_arguments_of_a_step_reach_the_base():
    model = network()
    base = ChoosesItself(model.parameters(), lr=0.1)
    optimizer = wrapped(model, base)
    train(model, optimizer, 1)
    assert base.seen == (None, None, 1.0)
    optimizer.step(None, "grads", scale=2.0)
    assert base.seen == (None, "grads", 2.0)
    assert merge_step(optimizer) == 2


def test_timms_lookahead_is_synchronised_through_the_wrapper():
    """A training script of timm calls sync_lookahead at the end of an epoch, where the optimizer has it."""
    bare, unmerged = network(), network()
    plain = Lookahead(sgd(bare), k=5)
    optimizer = wrapped(unmerged, Lookahead(sgd(unmerged), k=5), merge_prob=0.0)
    for model, opt in ((bare, plain), (unmerged, optimizer)):
        train(model, opt, 4)
        opt.sync_lookahead()
        train(model, opt, range(4, 8))
        opt.sync_lookahead()
    assert same(bare, unmerged)
    assert not hasattr(wrapped(network()), "sync_lookahead")


class TwoSteps(torch.optim.SGD):
    """SGD with the two halves of a sharpness-aware step, which a loop may call itself (davda54/sam)."""

    def first_step(self, zero_grad=False):
        self.climbed = [0.05 * p.grad.sign() for group in self.param_groups for p in group["params"]]
        with torch.no_grad():
            for parameter, climb in zip(self.param_groups[0]["params"], self.climbed, strict=True):
                parameter += climb
        if zero_grad:
            self.zero_grad()

    def second_step(self, zero_grad=False):
        with torch.no_grad():
            for parameter, climb in zip(self.param_groups[0]["params"], self.climbed, strict=True):
                parameter -= climb
        super().step()
        if zero_grad:
            self.zero_grad()


def two_steps(model, optimizer, steps):
    for step in range(steps):
        closure = closure_of(model, optimizer, step)
        closure()
        optimizer.first_step(zero_grad=True)
        closure()
        optimizer.second_step(zero_grad=True)


def test_the_second_half_of_a_sharpness_aware_step_is_followed_by_the_merge():
    bare, unmerged, merged = network(), network(), network()
    two_steps(bare, TwoSteps(bare.parameters(), lr=0.1), 3)
    two_steps(unmerged, wrapped(unmerged, TwoSteps(unmerged.parameters(), lr=0.1), merge_prob=0.0), 3)
    assert same(bare, unmerged)
    optimizer = wrapped(merged, TwoSteps(merged.parameters(), lr=0.1))
    two_steps(merged, optimizer, 3)
    assert merge_step(optimizer) == 3
    assert all(count["merged"] > 0 for count in optimizer.merge_counts().values())
    assert not hasattr(wrapped(network()), "second_step")


def test_a_wrapped_optimizer_deep_inside_the_base_is_refused():
    model = network()
    with pytest.raises(TypeError, match="is or holds an InMergeOptimizer already: wrap the bare optimizer, once"):
        wrapped(model, Lookahead(wrapped(model)))


def test_capture_in_a_cuda_graph_is_refused_before_the_base_steps(monkeypatch):
    model = network()
    optimizer = wrapped(model)
    closure_of(model, optimizer, 0)()
    before = network()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"captured in a CUDA graph.*step outside the graph"):
        optimizer.step()
    assert same(model, before)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    optimizer.step()
    assert merge_step(optimizer) == 1


@pytest.mark.parametrize("step", [2**31 - 1, 2**31, 2**53])
def test_step_counts_beyond_32_bits_go_on(step):
    model = network()
    optimizer = wrapped(model)
    for group in optimizer.param_groups:
        group["inmerge_step"] = step
    train(model, optimizer, 2)
    assert merge_step(optimizer) == step + 2
    assert all(count["merged"] > 0 for count in optimizer.merge_counts().values())
