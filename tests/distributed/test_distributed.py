"""Replicas and shards in real processes: the checks_* modules run there, and what each check shows is its name."""

from __future__ import annotations

import re

import pytest
import torch
from launching import checks_of, outcomes, torchrun
from one_process import SETTINGS, make_model, same_bits

from inmerge_optim import InMergeOptimizer, check_replicas

LAUNCHES = [(("checks_ddp", "checks_accelerate"), 2), (("checks_fsdp2",), 2), (("checks_meshes",), 4)]


@pytest.mark.parametrize(
    ("modules", "processes", "check"),
    [
        pytest.param(modules, processes, check, id=f"{module.removeprefix('checks_')}-{check}")
        for modules, processes in LAUNCHES
        for module in modules
        for check in checks_of(module)
    ],
)
def test_in_real_processes(modules, processes, check):
    found = outcomes(modules, processes)
    assert check in found, f"not reached: the launch or an earlier check failed\n{found['']}"
    assert found[check] == "", found[check]


def test_two_nodes_train_as_one_machine_with_two_processes(tmp_path):
    said = torchrun("train_replicas.py", str(tmp_path / "one"), processes=2)
    said += torchrun("train_replicas.py", str(tmp_path / "two"), processes=1, nodes=2)
    files = [tmp_path / f"{nodes}.{rank}" for nodes in ("one", "two") for rank in (0, 1)]
    assert all(file.exists() for file in files), said
    first, *others = (torch.load(file) for file in files)
    assert sum(count["merged"] for count in first["merges"].values()) > 0
    for other in others:
        assert other["merges"] == first["merges"]
        for name, weight in first["weights"].items():
            assert same_bits(weight, other["weights"][name]), name


def test_check_replicas_finds_nothing_to_compare_in_a_single_process():
    model = make_model()
    assert check_replicas(InMergeOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, **SETTINGS)) == []


def test_check_replicas_refuses_other_optimizers():
    with pytest.raises(TypeError, match="optimizer is a SGD, but it must be an InMergeOptimizer"):
        check_replicas(torch.optim.SGD(make_model().parameters(), lr=0.1))


@pytest.mark.parametrize("groups", ["one group", "a group for each parameter"])
def test_flattened_parameters_are_refused_before_the_base_steps(groups, monkeypatch):
    """DeepSpeed's ZeRO 1 and 2 put this rank's part of one flat parameter in the place of a group's parameters."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    model = make_model()
    parameters = list(model.parameters())
    grouped = [parameters] if groups == "one group" else [[parameter] for parameter in parameters]
    base = torch.optim.SGD([{"params": group} for group in grouped], lr=0.1)
    optimizer = InMergeOptimizer(base, model, **SETTINGS)
    for group in optimizer.param_groups:
        flat = torch.cat([parameter.detach().flatten() for parameter in group["params"]])
        group["params"] = [flat[: flat.numel() // 2].clone()]
        group["params"][0].grad = torch.ones(flat.numel() // 2)
    before = [group["params"][0].clone() for group in optimizer.param_groups]
    with pytest.raises(RuntimeError, match=r"flattened or replaced \(DeepSpeed ZeRO, FSDP1\).* use DDP or FSDP2"):
        optimizer.step()
    assert all(torch.equal(group["params"][0], then) for group, then in zip(base.param_groups, before, strict=True))


def test_partitioned_parameters_are_refused_when_wrapped():
    """DeepSpeed's ZeRO 3 leaves parameters without elements under their names."""
    model = make_model()
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    with pytest.raises(ValueError, match=re.escape("shape (0,), but its layer has 10 kernels")):
        InMergeOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, **{**SETTINGS, "names": "^2$"})
