"""Triton's kernels: what they compute, on a GPU or interpreted, that they build for GPUs, and when they are chosen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from inmerge_optim import kernels
from inmerge_optim.drawing import Pairs
from inmerge_optim.merging import DrawnLayer
from inmerge_optim.settings import Rule, parse_threshold

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from inmerge_optim import triton_kernels

CHECKS = Path(__file__).with_name("interpreted_triton.py")


@pytest.mark.parametrize(
    "interpreted",
    ["1", pytest.param("0", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_they_merge_what_the_reference_merges(interpreted):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CHECKS)]
    done = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": interpreted},
        cwd=CHECKS.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize("element", ["fp32", "bf16", "fp16", "fp64"])
@pytest.mark.parametrize("capability", [75, 90])
def test_they_build_for_gpus_and_fuse_nothing_in_the_blend(capability, element):
    """Compiled for a GPU, without one; a fused operation would round once where the reference rounds twice."""
    pointers = {"table": "*i64", "buffer": f"*{element}", "accepted": "*i8"}
    wide, switch = {"WIDE": element == "fp64"}, {"WIDE": "constexpr"}
    target = GPUTarget("cuda", capability, 32)
    judge = ASTSource(triton_kernels._judge, {**pointers, "tallies": "*i64", **switch}, constexprs=wide)
    blend = ASTSource(triton_kernels._blend, {**pointers, **switch}, constexprs=wide)
    write_back = ASTSource(triton_kernels._write_back, pointers)
    assert compile(judge, target).asm["cubin"]
    assert compile(write_back, target).asm["cubin"]
    assert "fma" not in compile(blend, target, {"enable_fp_fusion": False}).asm["ptx"]


def rows(device, dtype=torch.float32, threshold=0.3, criterion="similar"):
    """Return a layer on a device, whose values nobody reads."""
    order = torch.zeros(1, dtype=torch.int64).numpy()
    pairs = Pairs(order, order + 1, 0.0, order)
    return DrawnLayer(
        torch.ones(2, 9, device=device, dtype=dtype), pairs, Rule(0.8, parse_threshold(threshold), criterion)
    )


def test_layers_go_to_triton_together_by_their_dtype():
    layers = {
        0: rows("meta"),
        3: rows("cpu"),
        4: rows("meta", torch.bfloat16),
        5: rows("meta", threshold="4sd", criterion="dissimilar"),
        6: rows("meta", threshold="q0.9"),
        7: rows("meta", criterion="random_pairs"),
    }
    together = mock.Mock()
    with (
        mock.patch.object(kernels, "_triton_merge", return_value=together),
        mock.patch.object(kernels, "merge_layer_", return_value=0) as alone,
    ):
        kernels.merge_layers_(layers, kernels.Tallies(8))
    assert [[*call.args[0]] for call in together.call_args_list] == [[0, 5], [4]]
    assert [call.args[0] for call in alone.call_args_list] == [layers[6], layers[7]]


def test_where_triton_cannot_run_the_reference_merges_after_one_warning():
    choose = kernels._triton_merge.__wrapped__
    with (
        mock.patch.object(triton_kernels, "merge_on_gpu_", side_effect=RuntimeError("no C compiler")),
        mock.patch.object(torch, "ones", return_value=torch.ones(2, 1)),
        mock.patch.object(torch, "zeros", return_value=torch.zeros(1, 2)),
        pytest.warns(
            UserWarning, match=r"Triton can't run on cuda \(RuntimeError: no C compiler\), so kernels are merged"
        ),
    ):
        assert choose(torch.device("cuda")) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INMERGE_TRITON", "0")
        assert choose(torch.device("cuda")) is None
    assert choose(torch.device("cpu")) is None
