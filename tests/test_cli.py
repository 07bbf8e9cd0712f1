"""The command inmerge: what it prints and writes, and one clear sentence for each bad input."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from inmerge_optim import cli, kernel_similarity, similarity_profile
from inmerge_optim.plots import plot_profile
from inmerge_optim.similarity import QUANTILES

SMALL = "test_resnet"  # timm's own model for tests


def small():
    """A model for --module."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=2), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8)
    )


def no_module():
    return {"weight": 1}


def fails():
    raise RuntimeError("no such file\nand more")


def run(capsys, *arguments):
    """Exit code, standard output and standard error."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as exit_:
        code = exit_.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys, *arguments):
    """The one sentence on standard error of a run that ends with exit code 2."""
    code, out, err = run(capsys, "inspect", *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("inmerge")
    return err


@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "--help"]])
def test_help_is_given_without_torch(arguments):
    program = (
        "import sys\n"
        "from inmerge_optim.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "finally:\n"
        "    print(sorted({'torch', 'timm', 'numpy', 'matplotlib'} & sys.modules.keys()), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "inspect" in done.stdout
    assert done.stderr.strip() == "[]"


def test_real_weights_are_profiled_as_numpy_profiles_them(capsys, tmp_path, shared_file):
    checkpoint = shared_file("weights/squeezenet1_1.safetensors")
    paths = {option: tmp_path / f"profile.{option}" for option in ("json", "csv")}
    code, out, err = run(
        capsys, "inspect", "--module", "torchvision.models:squeezenet1_1", "--checkpoint", checkpoint,
        "--rate", "0.05", "--json", paths["json"], "--csv", paths["csv"],
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "26 layers, 25 counted, 10 selected." in out
    assert "A step draws 532.8 kernels and merges 8.93 of them on average (1.68 %)." in out
    content = json.loads(paths["json"].read_text())
    assert f"A similarity threshold of {content['threshold_for_rate']:.4f} would merge 5.0% of the draws." in out
    weights = load_file(checkpoint)
    above, draws = 0.0, 0.0
    for layer in content["layers"]:
        rows = weights[f"{layer['name']}.weight"].flatten(1).double().numpy()
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        cosines = (unit @ unit.T)[np.triu_indices(len(unit), 1)]
        assert (layer["kernels"], layer["row_length"], layer["groups"]) == (*rows.shape, 1)
        assert layer["mean"] == pytest.approx(cosines.mean(), abs=1e-6)
        assert layer["share_above_threshold"] == pytest.approx((cosines > 0.3).mean(), abs=1e-9)
        assert layer["most_similar"][0]["cosine"] == pytest.approx(cosines.max(), abs=1e-6)
        if layer["selected"]:
            draws += 0.3 * len(rows)
            above += 0.3 * len(rows) * (cosines > content["threshold_for_rate"]).mean()
    assert above / draws == pytest.approx(0.05, abs=5e-4)
    with paths["csv"].open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [layer["name"] for layer in content["layers"]]
    assert [float(row["mean"]) for row in rows] == [layer["mean"] for layer in content["layers"]]
    assert {f"quantile_{share:g}" for share in QUANTILES} < rows[0].keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["profile.csv", "profile.json"]


def test_each_layer_has_its_row_and_its_reason(capsys):
    code, out, err = run(
        capsys, "inspect", "--module", f"{__name__}:small", "--skip-layers", 1, "--input-size", 3, 32, 32
    )
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines() if line.strip()[:1].isdigit()][:3]
    assert [row[:2] for row in rows] == [["0", "0"], ["1", "2"], ["2", "4"]]
    assert rows[0][-1] == "shallow"
    assert "weights as the factory made them" in out
    assert "random weights" not in out
    assert "3 layers, 3 counted, 2 selected." in out


@pytest.mark.parametrize("threshold", ["2sd", "q0.9"])
def test_thresholds_that_fit_each_layer_are_told_of(threshold, capsys, tmp_path):
    paths = {kind: tmp_path / f"profile.{kind}" for kind in ("json", "png")}
    settings = ["--similarity-threshold", threshold, "--json", paths["json"], "--plot", paths["png"]]
    code, out, _ = run(capsys, "inspect", SMALL, *settings)
    assert code == 0
    assert f"share of pairs above {threshold};" in out
    content = json.loads(paths["json"].read_text())
    assert content["settings"]["similarity_threshold"] == threshold
    for layer in content["layers"]:
        if threshold == "2sd":
            assert layer["threshold"] == 2 / math.sqrt(layer["row_length"])
        else:
            assert layer["share_above_threshold"] == pytest.approx(0.1)
    assert paths["png"].read_bytes().startswith(b"\x89PNG")


def test_names_and_linear_layers_can_be_picked(capsys, tmp_path):
    path = tmp_path / "layers.json"
    assert run(capsys, "inspect", SMALL, "--names", "layer4", "--layer-types", "conv", "linear", "--json", path)[0] == 0
    layers = json.loads(path.read_text())["layers"]
    assert {layer["name"].split(".")[0] for layer in layers if layer["selected"]} == {"layer4"}
    assert {"name": "fc", "reason": "not named"}.items() <= layers[-1].items()


def test_a_model_without_convolutions_is_told_of(capsys, tmp_path):
    code, out, _ = run(
        capsys, "inspect", "--module", "torch.nn:Identity", "--rate", "0.1", "--csv", tmp_path / "none.csv"
    )
    assert code == 0
    assert "0 layers, 0 counted, 0 selected." in out
    assert "no threshold merges anything" in out


def test_warnings_are_one_line_each(capsys):
    code, _, err = run(capsys, "inspect", "test_vit")
    assert code == 0
    assert err.startswith("inmerge: warning: only 0 of the 1 counted layers of VisionTransformer are selected")
    assert err.count("\n") == 1


@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_plots_are_written_in_the_formats_of_matplotlib(capsys, tmp_path, ending, start):
    path = tmp_path / f"plot.{ending}"
    assert run(capsys, "inspect", "--module", f"{__name__}:small", "--skip-layers", 1, "--plot", path)[0] == 0
    assert path.read_bytes().startswith(start)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("factory", ["Conv1d(2, 4, 3)", "Conv3d(1, 4, 3)", "Conv2d(4, 4, 1, groups=4)"])
def test_plots_of_other_convolutions(factory, tmp_path):
    model = nn.Sequential(eval(f"nn.{factory}"))
    profiles = similarity_profile(model, names=["0"])
    assert plot_profile(profiles, model, "title", threshold=0.3, file_format="png").startswith(b"\x89PNG")


def test_a_missing_matplotlib_is_one_sentence(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = refused(capsys, SMALL, "--plot", tmp_path / "plot.png")
    assert "pip install 'inmerge_optim[plot]'" in message


def weights_of(path, change=lambda weights: None):
    weights = timm.create_model(SMALL).state_dict()
    change(weights)
    save_file(weights, path)
    return path


def test_a_checkpoint_that_fits_is_used(capsys, tmp_path):
    path = tmp_path / "weights.safetensors"
    torch.manual_seed(5)
    weights = timm.create_model(SMALL, num_classes=3).state_dict()
    save_file(weights, path)
    torch.save({"state_dict": {f"module.{key}": value for key, value in weights.items()}}, tmp_path / "weights.pth")
    means = []
    for file in (path, tmp_path / "weights.pth"):
        out = tmp_path / "out.json"
        assert run(capsys, "inspect", SMALL, "--checkpoint", file, "--num-classes", 3, "--json", out)[0] == 0
        means.append([layer["mean"] for layer in json.loads(out.read_text())["layers"]])
    stem = kernel_similarity(weights["conv1.0.weight"])
    assert means[0] == means[1]
    assert means[0][0] == pytest.approx(stem[tuple(torch.triu_indices(*stem.shape, 1))].mean().item(), abs=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("conv1.0.weight"), "1 keys differ, first conv1.0.weight is missing in the file"),
        (lambda weights: weights.update(extra=torch.ones(1)), "first extra of the file is not in the model"),
        (
            lambda weights: weights.update({"fc.weight": torch.ones(7, 3), "fc.bias": torch.ones(7)}),
            "2 keys differ, first fc.weight is (7, 3) in the file and (1000, 96) in the model",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_names_the_first_keys(capsys, tmp_path, change, message):
    found = refused(capsys, SMALL, "--checkpoint", weights_of(tmp_path / "weights.safetensors", change))
    assert message in found


def test_a_pickle_is_refused(capsys, tmp_path):
    path = tmp_path / "model.pth"
    torch.save(small(), path)
    message = refused(capsys, "--module", f"{__name__}:small", "--checkpoint", path)
    assert "weights_only=True refuses" in message
    assert ".safetensors" in message


def test_files_that_hold_no_weights_are_refused(capsys, tmp_path):
    (tmp_path / "text.safetensors").write_text("no weights")
    assert "can't be read as weights" in refused(capsys, SMALL, "--checkpoint", tmp_path / "text.safetensors")
    torch.save({"epoch": 3}, tmp_path / "epoch.pth")
    assert "holds no state_dict" in refused(capsys, SMALL, "--checkpoint", tmp_path / "epoch.pth")
    assert "is no file" in refused(capsys, SMALL, "--checkpoint", tmp_path / "absent.pth")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet34x"], "resnet34x is unknown to timm: did you mean resnet34"),
        (["qqqqqq"], "qqqqqq is unknown to timm"),
        (["resnet34.nonsense"], "timm's resnet34 has no weights 'nonsense', but"),
        ([], "either a timm MODEL or --module"),
        (["resnet34", "--module", "a:b"], "either a timm MODEL or --module"),
        (["--module", "no.such.module:f"], "no.such.module can't be imported (No module named 'no')"),
        (["--module", "torch.nn"], "must look like package.module:factory"),
        (["--module", "torch.nn:Identty"], "has no function Identty: did you mean Identity"),
        (["--module", f"{__name__}:no_module"], "no_module() returned a dict, but a torch.nn.Module is needed"),
        (["--module", f"{__name__}:fails"], "fails() failed (no such file)"),
        (["--module", "torch.nn:Identity", "--num-classes", "3"], "--num-classes is for a timm MODEL"),
        (["--module", "torch.nn:Identity", "--pretrained"], "--pretrained fetches the weights of a timm MODEL"),
        (["test_resnet", "--merge-prob", "1.5"], "merge_prob is 1.5"),
        (["test_resnet", "--similarity-threshold", "nan"], "similarity_threshold is nan"),
        (["test_resnet", "--similarity-threshold", "4dd"], "similarity_threshold is '4dd', but it must be a number"),
        (["test_resnet", "--skip-layers", "99"], "skip_layers is 99, but ResNet has 15 counted layers"),
        (["test_resnet", "--skip-layers", "many"], "'many' is no number"),
        (["test_resnet", "--names", "("], "names is '('"),
        (["test_resnet", "--names", "layer9"], "no layer matches it"),
        (["test_resnet", "--rate", "5"], "rate is 5.0"),
        (["test_resnet", "--layer-types", "pool"], "'pool' is not among conv, linear"),
        (
            ["test_resnet", "--json", "no/such/folder/out.json"],
            "--json no/such/folder/out.json lies in no folder that exists",
        ),
        (["test_resnet", "--plot", "plot.xyz"], "must end in one of"),
        (["test_resnet", "--pretrained", "--checkpoint", "x.pth"], "goes with neither --module nor --checkpoint"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(capsys, arguments, message):
    assert message in refused(capsys, *arguments)


def test_weights_that_cannot_be_fetched_point_to_checkpoint(capsys, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("[Errno -2] Name or service not known")

    monkeypatch.setattr(timm.models._builder, "load_pretrained", offline)
    message = refused(capsys, "resnet18", "--pretrained")
    assert "can't be had ([Errno -2] Name or service not known)" in message
    assert "--checkpoint" in message


def test_a_full_disk_leaves_nothing_half_written(capsys, monkeypatch, tmp_path):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli.os, "replace", full)
    code, _, err = run(capsys, "inspect", SMALL, "--json", tmp_path / "out.json")
    assert code == 2
    assert "can't be written (No space left on device)" in err
    assert not list(tmp_path.iterdir())
