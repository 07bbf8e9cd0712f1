"""Building models and reading their weights: what fits is loaded, no file runs code, and the rest is one sentence."""

from __future__ import annotations

import json
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
from malicious_files import FORMATS, WritesAFile, raw_pickle, zip_of_torch
from safetensors.torch import save_file
from torch import nn

from inmerge_optim.models import (
    CheckpointError,
    ModelError,
    call_factory,
    check_name,
    create_timm_model,
    read_checkpoint,
)

SMALL = "test_resnet"  # timm's own model for tests


def model(seed=0, **settings):
    torch.manual_seed(seed)
    return timm.create_model(SMALL, **settings)


def saved(path, change=lambda weights: None):
    """A file of the model's weights after a change."""
    weights = model(seed=5).state_dict()
    change(weights)
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path)
    return path


def refused(path, **settings):
    """The sentence that a file is refused with."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path, model(), **settings)
    message = str(caught.value)
    assert message.startswith(f"{path} ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("environment", [{}, {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}])
@pytest.mark.parametrize("ending", [".pth", ".bin", ".zip", ".safetensors"])
@pytest.mark.parametrize("write", FORMATS)
def test_no_file_runs_code(write, ending, environment, tmp_path, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    canary, file = tmp_path / "canary", tmp_path / f"weights{ending}"
    for content in (WritesAFile(canary), {**model().state_dict(), "extra": WritesAFile(canary)}):
        file.write_bytes(write(content))
        refused(file)
        assert not canary.exists()
    assert os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD") == environment.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_the_canary_sings_where_code_is_run(tmp_path):
    for write in FORMATS[:3]:
        canary, file = tmp_path / write.__name__, tmp_path / "weights.pth"
        file.write_bytes(write(WritesAFile(canary)))
        if write is raw_pickle:
            pickle.loads(file.read_bytes())
        else:
            torch.load(file, weights_only=False)
        assert canary.exists()


@pytest.mark.parametrize("write", [raw_pickle, zip_of_torch])
@pytest.mark.parametrize("source", ["file", "folder"])
def test_pretrained_weights_run_no_code(source, write, tmp_path, monkeypatch):
    """Whatever timm's version: those before 1.0.26 ask torch for weights_only=False here."""
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: load(*args, **{**kwargs, "weights_only": False}))
    canary, folder = tmp_path / "canary", tmp_path / "folder"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(write(WritesAFile(canary)))
    (folder / "config.json").write_text(json.dumps({"architecture": SMALL, "num_classes": 2}))
    name, settings = f"local-dir:{folder}", {}
    if source == "file":
        name, settings = SMALL, {"pretrained_cfg_overlay": {"file": str(folder / "pytorch_model.bin")}}
    with pytest.raises(CheckpointError, match=r"the pretrained weights of .* can't be had"):
        create_timm_model(name, pretrained=True, **settings)
    assert not canary.exists()


@pytest.mark.parametrize("wrap", [lambda weights: weights, lambda weights: {"state_dict": weights, "epoch": 3}])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_weights_are_read_as_timm_reads_them(wrap, prefix, tmp_path):
    expected = model(seed=5).state_dict()
    torch.save(wrap({f"{prefix}{key}": value for key, value in expected.items()}), tmp_path / "weights.pth")
    found = read_checkpoint(tmp_path / "weights.pth", model())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_the_averaged_weights_of_a_training_checkpoint_are_taken(tmp_path):
    last, average = model(seed=1).state_dict(), model(seed=2).state_dict()
    torch.save({"state_dict": last, "state_dict_ema": average}, tmp_path / "weights.pth.tar")
    found = read_checkpoint(tmp_path / "weights.pth.tar", model())
    assert torch.equal(found["fc.weight"], average["fc.weight"])


def test_old_files_without_the_counters_of_batch_norm_fit(tmp_path):
    def drop(weights):
        for key in [key for key in weights if key.endswith("num_batches_tracked")]:
            del weights[key]

    assert "bn1.weight" in read_checkpoint(saved(tmp_path / "weights.safetensors", drop), model())


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda weights: weights.pop("conv1.0.weight"), "test_resnet: conv1.0.weight is missing in the file"),
        (lambda weights: weights.update(extra=torch.ones(1)), "test_resnet: extra of the file is not in the model"),
        (
            lambda weights: weights.update({"conv1.0.weight": torch.ones(7, 3)}),
            "conv1.0.weight is (7, 3) in the file and (16, 3, 3, 3) in the model",
        ),
        (
            lambda weights: weights.update({"conv1.0.weight": weights["conv1.0.weight"].to(torch.int8)}),
            "conv1.0.weight is of torch.int8 in the file and of torch.float32 in the model",
        ),
        (
            lambda weights: weights.update({"conv1.0.weight": weights["conv1.0.weight"].to(torch.complex64)}),
            "conv1.0.weight is of torch.complex64 in the file and of torch.float32 in the model",
        ),
    ],
)
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_what_does_not_fit_is_named(change, difference, ending, tmp_path):
    message = refused(saved(tmp_path / f"weights{ending}", change))
    assert difference in message
    assert "does not fit test_resnet" in message


def test_three_differences_are_named_and_all_are_counted(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"other": torch.ones(1)}, path)
    needed = [key for key in model().state_dict() if not key.endswith("num_batches_tracked")]
    message = refused(path)
    assert f" and {len(needed) + 1 - 3} more; " in message
    assert message.count("is missing") == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value, tmp_path):
    def spoil(weights):
        weights["conv1.0.weight"][0, 0, 0, 0] = value

    assert "not finite, conv1.0.weight first" in refused(saved(tmp_path / "weights.safetensors", spoil))


def test_weights_beyond_the_range_of_the_model_are_refused(tmp_path):
    def enlarge(weights):
        weights["conv1.0.weight"] = weights["conv1.0.weight"].double() * 1e300

    assert "not finite, conv1.0.weight first" in refused(saved(tmp_path / "weights.safetensors", enlarge))


@pytest.mark.parametrize("change", [lambda head: head.resize_(7, 3), lambda head: head.fill_(float("nan"))])
def test_the_classifier_may_be_left_out_of_the_comparison(change, tmp_path):
    path = saved(tmp_path / "weights.safetensors", lambda weights: change(weights["fc.weight"]))
    refused(path)
    assert "fc.weight" in read_checkpoint(path, model(), classifier=False)
    other = saved(tmp_path / "other.safetensors", lambda weights: weights.pop("conv1.0.weight"))
    refused(other, classifier=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no weights", "holds no weights, or more than weights"),
        (b"", "can't be read as weights"),
        (zip_of_torch({"epoch": 3}), "holds no state_dict"),
        (zip_of_torch([torch.ones(1)]), "can't be read as weights"),
        (zip_of_torch({"weight": torch.ones(2, 2).to_sparse()}), "holds no state_dict of plain tensors"),
        (zip_of_torch({"weight": torch.ones(2, device="meta")}), "holds no state_dict of plain tensors"),
        (zip_of_torch({1: torch.ones(2)}), "can't be read as weights"),
        (zip_of_torch(OrderedDict(model().state_dict()))[:-1000], "can't be read as weights"),
        (zip_of_torch(nn.Sequential(nn.Conv2d(1, 1, 1))), "holds no weights, or more than weights"),
    ],
    ids=["text", "empty", "number", "list", "sparse", "meta", "whole keys", "cut short", "module"],
)
def test_files_that_hold_no_weights_are_refused(content, message, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    assert message in refused(path)


def test_a_scripted_model_is_refused_without_a_warning(tmp_path, recwarn):
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights/constants.pkl", pickle.dumps(()))
        archive.writestr("weights/data.pkl", pickle.dumps({}))
        archive.writestr("weights/version", "3")
    assert "weights_only=True refuses" in refused(path)
    assert not recwarn.list


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere"), lambda path: None])
def test_what_is_no_file_is_refused_at_once(make, tmp_path):
    make(tmp_path / "weights.pth")
    assert "is no file" in refused(tmp_path / "weights.pth")


def test_a_name_beyond_what_the_disk_allows_is_refused(tmp_path):
    assert "can't be read" in refused(tmp_path / f"{'n' * 300}.pth")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet34x", "resnet34x is unknown to timm: did you mean resnet34 or"),
        ("qqqqqq", "qqqqqq is unknown to timm"),
        ("", " is unknown to timm"),
        ("resnet34.nonsense", "resnet34.nonsense: timm's resnet34 has no weights 'nonsense', but a1_in1k"),
    ],
)
def test_a_name_that_timm_does_not_know_is_refused(name, message):
    with pytest.raises(ModelError, match=r"unknown to timm|no weights") as caught:
        check_name(name)
    assert message in str(caught.value)
    check_name("resnet34.a1_in1k")


@pytest.mark.parametrize("name", ["nowhere:resnet18", "timm/resnet18", "local-dir:no/such/folder"])
def test_a_source_that_is_none_is_refused(name):
    with pytest.raises(ModelError, match=name):
        create_timm_model(name)


def test_a_model_is_built_from_a_folder_of_timm(tmp_path):
    original = model(seed=5, num_classes=3)
    save_file(original.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": SMALL, "num_classes": 3}))
    found = create_timm_model(f"local-dir:{tmp_path}", pretrained=True)
    assert all(torch.equal(found.state_dict()[key], value) for key, value in original.state_dict().items())
    assert create_timm_model(f"local-dir:{tmp_path}").num_classes == 3


def test_what_does_not_fit_in_the_weights_of_a_folder_is_named(tmp_path):
    save_file(model(num_classes=3).state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": SMALL, "num_classes": 4}))
    with pytest.raises(CheckpointError, match=r"can't be had \(.*: size mismatch for fc.weight"):
        create_timm_model(f"local-dir:{tmp_path}", pretrained=True)


def test_settings_that_timm_does_not_take_are_named():
    with pytest.raises(ModelError, match=r"test_resnet can't be built by timm with {'no_such': 1}"):
        create_timm_model(SMALL, no_such=1)


def test_weights_that_cannot_be_fetched_are_told_of(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("[Errno -2] Name or service not known\nand more")

    monkeypatch.setattr(timm.models._builder, "load_pretrained", offline)
    with pytest.raises(CheckpointError, match=r"weights of resnet18 can't be had \(\[Errno -2\] Name or .* known\)$"):
        create_timm_model("resnet18", pretrained=True)


def test_a_model_without_pretrained_weights_is_told_of():
    with pytest.raises(CheckpointError, match="the pretrained weights of resnet32ts can't be had"):
        create_timm_model("resnet32ts", pretrained=True, pretrained_cfg_overlay={"url": "", "hf_hub_id": ""})


def not_a_model():
    return {"weight": 1}


def fails():
    raise RuntimeError("no such file\nand more")


def leaves():
    raise SystemExit(3)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("torch.nn", "torch.nn must look like package.module:factory"),
        (":f", "must look like package.module:factory"),
        ("no.such.module:f", "no.such.module can't be imported (No module named 'no')"),
        ("torch.nn:Identty", "torch.nn has no function Identty: did you mean Identity"),
        (f"{__name__}:not_a_model", "not_a_model() returned a dict, but a torch.nn.Module is needed"),
        (f"{__name__}:fails", "fails() failed (no such file)"),
        (f"{__name__}:leaves", "leaves() failed (3)"),
    ],
)
def test_a_factory_that_gives_no_model_is_refused(place, message):
    with pytest.raises(ModelError) as caught:
        call_factory(place)
    assert message in str(caught.value)


def test_a_factory_in_the_current_folder_is_found_and_may_import_its_neighbours(tmp_path, monkeypatch):
    (tmp_path / "neighbour_of_mine.py").write_text("from torch.nn import Identity")
    (tmp_path / "factory_of_mine.py").write_text(
        "def build():\n    import neighbour_of_mine as n\n    return n.Identity()"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert isinstance(call_factory("factory_of_mine:build"), nn.Identity)
    assert sys.path == before
