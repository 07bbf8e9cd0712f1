"""How far the first merge of an epoch moves the kernels, against weights that are copied by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from finetune.training.merge_tally import MergeTally, looks_at_ranks
from timm.optim import Lookahead
from torch import nn
from torch.optim import SGD

from inmerge_optim import InMergeOptimizer, kernel_layers


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.Flatten())


def backward(model: nn.Module) -> None:
    model.zero_grad()
    model(torch.ones(1, 2, 6, 6)).square().sum().backward()


def wrapped(base: torch.optim.Optimizer, model: nn.Module, merge_prob: float = 0.6) -> InMergeOptimizer:
    return InMergeOptimizer(base, model, names=["2"], merge_prob=merge_prob, similarity_threshold=-1.0)


def test_displacement_is_what_the_merge_of_the_first_step_changed_over_the_norm() -> None:
    """Not what the base's update did, and not what later steps merged; every epoch anew."""
    model, layers = net(), [layer for layer in kernel_layers(net(), names=["2"]) if layer.selected]
    optimizer = wrapped(SGD(model.parameters(), lr=0.1), model)
    tally = MergeTally(model, optimizer, layers)
    for epoch in (1, 2):
        for step in range(2):
            backward(model)
            plain = copy.deepcopy(model)
            for parameter, with_grad in zip(plain.parameters(), model.parameters(), strict=True):
                parameter.grad = with_grad.grad.clone()
            SGD(plain.parameters(), lr=0.1).step()
            optimizer.step()
            if step == 0:
                before, after = plain[2].weight.detach(), model[2].weight.detach()
                expected = (after - before).norm() / before.norm()
        ((*_, displacement),) = tally.rows(epoch)
        assert displacement == pytest.approx(float(expected), rel=1e-5)
        assert displacement > 0.01
    ((*_, without_a_step),) = tally.rows(3)
    assert without_a_step is None


def test_displacement_is_0_where_nothing_is_merged_and_unknown_where_it_can_not_be_measured() -> None:
    model, layers = net(), [layer for layer in kernel_layers(net(), names=["2"]) if layer.selected]
    backward(model)
    optimizers = {
        0.0: wrapped(SGD(model.parameters(), lr=0.1), model, merge_prob=0),
        None: wrapped(Lookahead(SGD(model.parameters(), lr=0.1)), model),
    }
    for expected, optimizer in optimizers.items():
        tally = MergeTally(model, optimizer, layers)
        optimizer.step()
        assert tally.rows(1)[0][-1] == expected
    plain = SGD(model.parameters(), lr=0.1)
    tally = MergeTally(model, plain, layers)
    plain.step()
    assert tally.rows(1)[0][-1] is None


def test_ranks_are_told_where_they_are_asked_for() -> None:
    model, layers = net(), [layer for layer in kernel_layers(net(), names=["2"]) if layer.selected]
    tally = MergeTally(model, SGD(model.parameters(), lr=0.1), layers)
    (with_ranks,), (without,) = tally.rows(1), tally.rows(1, with_ranks=False)
    assert 1 < with_ranks.pop(5) <= 8
    assert without.pop(5) is None
    assert with_ranks == without


@pytest.mark.parametrize(("epochs", "looks"), [(1, 1), (5, 5), (19, 19), (25, 13), (100, 10)])
def test_a_long_stage_looks_at_ranks_now_and_then_and_at_its_end(epochs: int, looks: int) -> None:
    found = [epoch for epoch in range(1, epochs + 1) if looks_at_ranks(epoch, epochs)]
    assert len(found) == looks
    assert found[-1] == epochs
