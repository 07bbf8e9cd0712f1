"""The command inmerge: what it prints and writes, and one clear sentence for each bad input."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from inmerge_optim import __version__, cli, kernel_similarity, similarity_profile
from inmerge_optim.plots import plot_profile
from inmerge_optim.similarity import QUANTILES

SMALL = "test_resnet"  # timm's own model for tests


def small():
    """A model for --module."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=2), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8)
    )


def volume():
    """A model in 3-D that takes 1 x 8 x 8 x 8 alone."""
    return nn.Sequential(nn.Conv3d(1, 8, 3), nn.ReLU(), nn.Conv3d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 4**3, 2))


def signal():
    """A model in 1-D that takes 12 x 100 alone."""
    return nn.Sequential(nn.Conv1d(12, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 96, 2))


def vector():
    """A model that takes 16 numbers alone."""
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def steering():
    """A model whose layers' names steer a terminal, and fail as mathematics of matplotlib."""
    model = nn.Sequential()
    model.add_module("a\x1b[31m$\\frac{$", nn.Conv2d(3, 8, 3))
    model.add_module("end", nn.Flatten())
    return model


def warns():
    """A model with a warning of several lines."""
    warnings.warn("first\x1b[31m\nsecond", stacklevel=2)
    return small()


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


def started(*arguments, before="pass", **settings):
    """A process of its own that runs the command line."""
    program = f"import sys\n{before}\nfrom inmerge_optim.cli import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, timeout=120, **settings)


@pytest.mark.parametrize("library", ["torch", "timm"])
def test_a_missing_library_is_one_sentence(library):
    done = started("inspect", SMALL, before=f"sys.modules[{library!r}] = None", stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("inmerge: error: inmerge inspect needs torch, timm and numpy (")
    assert done.stderr.count("\n") == 1


def test_compact_says_once_what_is_to_be_installed(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    code, out, err = run(capsys, "compact", SMALL, "--output", tmp_path / "smaller.safetensors")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("inmerge: error: inmerge compact needs torch, timm, numpy and torch-pruning (")
    assert err.endswith("): pip install 'inmerge_optim[compact]'\n")


def test_the_module_runs_as_the_script_does():
    for arguments, expected in ((["--version"], f"inmerge {__version__}\n"), (["--help"], "usage: inmerge [-h]")):
        done = subprocess.run(
            [sys.executable, "-m", "inmerge_optim", *arguments], capture_output=True, text=True, check=True
        )
        assert done.stdout.startswith(expected)


def test_a_full_disk_behind_the_standard_output_is_one_sentence():
    with open("/dev/full", "w") as full:
        done = started("inspect", SMALL, stdout=full)
    assert done.returncode == 2
    assert done.stderr == "inmerge: error: the standard output can't be written (No space left on device)\n"


def test_a_reader_that_has_seen_enough_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        done = started("inspect", SMALL, stdout=closed)
    assert (done.returncode, done.stderr) == (0, "")


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
    code, out, _ = run(capsys, "inspect", "--module", f"{__name__}:small", "--skip-layers", 1, *settings)
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


@pytest.mark.parametrize(
    ("factory", "size"), [("vector", [16]), ("signal", [12, 100]), ("small", [3, 20, 30]), ("volume", [1, 8, 8, 8])]
)
@pytest.mark.parametrize("joint", [" ", "="])
def test_inputs_of_any_number_of_dimensions(factory, size, joint, capsys, tmp_path):
    first, *others = f"--input-size{joint}{' '.join(map(str, size))}".split()
    settings = ["--module", f"{__name__}:{factory}", "--layer-types", "conv", "linear", "--skip-layers", 1]
    code, _, err = run(capsys, "inspect", first, *others, *settings, "--json", tmp_path / "out.json")
    assert (code, err) == (0, "")  # a warning would say that the model could not be run with it
    assert json.loads((tmp_path / "out.json").read_text())["settings"]["input_size"] == size


@pytest.mark.parametrize(
    "arguments",
    [
        ["--input-size", "3", "32", "32", SMALL],
        [SMALL, "--input-size", "3", "32", "32"],
        ["--layer-types", "conv", "--input-size", "3", "32", "32", SMALL],
        ["--input-size", "3", "32", "32", "--layer-types", "conv", SMALL],
        ["--input-size=3", "32", "32", "--layer-types=conv", SMALL],
    ],
)
def test_the_model_may_stand_anywhere_on_the_line(arguments):
    options = cli._parser().parse_args(cli._join_values(["inspect", *arguments]))
    assert (options.model, options.input_size, options.layer_types) == (SMALL, (3, 32, 32), ["conv"])


def test_names_and_linear_layers_can_be_picked(capsys, tmp_path):
    path = tmp_path / "layers.json"
    assert run(capsys, "inspect", SMALL, "--names", "layer4", "--layer-types", "conv", "linear", "--json", path)[0] == 0
    layers = json.loads(path.read_text())["layers"]
    assert {layer["name"].split(".")[0] for layer in layers if layer["selected"]} == {"layer4"}
    assert {"name": "fc", "reason": "not named"}.items() <= layers[-1].items()


def test_layers_can_be_left_out(capsys, tmp_path):
    path = tmp_path / "layers.json"
    assert run(capsys, "inspect", SMALL, "--exclude", "conv2$", "--json", path)[0] == 0
    content = json.loads(path.read_text())
    assert content["settings"]["exclude"] == "conv2$"
    reasons = {layer["reason"] for layer in content["layers"] if layer["name"].endswith("conv2")}
    assert reasons == {"excluded"}
    assert any(layer["selected"] for layer in content["layers"])


def test_a_model_without_convolutions_is_told_of(capsys, tmp_path):
    code, out, _ = run(
        capsys, "inspect", "--module", "torch.nn:Identity", "--rate", "0.1", "--csv", tmp_path / "none.csv"
    )
    assert code == 0
    assert "0 layers, 0 counted, 0 selected." in out
    assert "no threshold merges anything" in out


@pytest.mark.filterwarnings("default")
def test_warnings_are_one_line_each(capsys):
    code, _, err = run(capsys, "inspect", "test_vit")
    assert code == 0
    assert err.startswith("inmerge: warning: only 0 of the 1 counted layers of VisionTransformer are selected")
    assert err.count("\n") == 1


@pytest.mark.filterwarnings("default")
def test_names_and_warnings_do_not_steer_the_terminal(capsys, tmp_path):
    settings = ["--skip-layers", 0, "--plot", tmp_path / "plot.png"]
    code, out, err = run(capsys, "inspect", "--module", f"{__name__}:steering", *settings)
    assert (code, err) == (0, "")
    assert r"a\x1b[31m$\frac{$" in out
    code, _, err = run(capsys, "inspect", "--module", f"{__name__}:warns", "--skip-layers", 1)
    assert (code, err) == (0, "inmerge: warning: first\\x1b[31m second\n")
    for arguments in (["--red\x1b[31m"], ["\x1b[31m"], [SMALL, "--checkpoint", "\x1b[31m\n"]):
        assert "\\x1b[31m" in refused(capsys, *arguments)


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


@pytest.mark.parametrize(("option", "start"), [("json", b"{"), ("csv", b"name,"), ("plot", b"\x89PNG")])
@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
def test_a_file_on_the_standard_output_takes_the_place_of_the_table(option, start, name, capsysbinary):
    assert cli.main(["inspect", "--module", f"{__name__}:small", "--skip-layers", "1", f"--{option}", name]) == 0
    out = capsysbinary.readouterr().out
    assert out.startswith(start)
    assert b"A step draws" not in out


@pytest.mark.parametrize("option", ["json", "csv", "plot"])
def test_special_files_are_refused_before_anything_is_computed(option, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "_build", None)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "target.png")
    for path in (tmp_path / "pipe.png", tmp_path / "link.png", "/dev/null"):
        assert f"--{option} {path} is a" in refused(capsys, SMALL, f"--{option}", path)


@pytest.mark.parametrize(
    ("one", "other"), [("out.png", "out.png"), ("out.png", "./out.png"), ("-", "-"), ("-", "/dev/stdout")]
)
def test_a_path_given_twice_is_refused(one, other, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused(capsys, SMALL, "--plot", other, "--json", one)
    assert f"--plot {Path(other)} is also that of --json: give each a file of its own" in message
    if one != "-":
        assert "also that of --checkpoint" in refused(capsys, SMALL, "--checkpoint", one, "--json", other)


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


def test_a_checkpoint_that_does_not_fit_is_refused(capsys, tmp_path):
    path = weights_of(tmp_path / "weights.safetensors", lambda weights: weights.pop("conv1.0.weight"))
    message = refused(capsys, SMALL, "--checkpoint", path)
    assert f"--checkpoint {path} does not fit test_resnet: conv1.0.weight is missing in the file" in message


def test_a_pickle_is_refused(capsys, tmp_path):
    path = tmp_path / "model.pth"
    torch.save(small(), path)
    message = refused(capsys, "--module", f"{__name__}:small", "--checkpoint", path)
    assert "weights_only=True refuses" in message
    assert ".safetensors" in message


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
        (["test_resnet", "--layer-types"], "--layer-types: expected one argument"),
        (["--input-size", "test_resnet"], "'test_resnet' is no size: 1 to 4 whole numbers from 1 are needed"),
        (["test_resnet", "--input-size", "3x32x32"], "'3x32x32' is no size"),
        (["test_resnet", "--input-size", "1", "2", "3", "4", "5"], "'1 2 3 4 5' is no size"),
        (["test_resnet", "--input-size", "3", "0", "32"], "'3 0 32' is no size"),
        (["test_resnet", "--input-size", "3", "-32", "32"], "'3 -32 32' is no size"),
        (["test_resnet", "--input-size", "3", "32.5", "32"], "'3 32.5 32' is no size"),
        (
            ["test_resnet", "--similarity-treshold", ".2"],
            "argument --similarity-treshold: did you mean --similarity-th",
        ),
        (["test_resnet", "--skip-layer=3"], "unexpected argument --skip-layer=3: did you mean --skip-layers?"),
        (["test_resnet", "--qqqq"], "unexpected argument --qqqq (see inmerge inspect --help)"),
        (["test_resnet", "resnet18"], "unexpected argument resnet18 (see"),
        (["local-dir:no/such/folder"], "local-dir:no/such/folder can't be built by timm"),
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a command is missing: inspect or compact"),
        (["--versin"], "unexpected argument --versin: did you mean --version?"),
        (["inspct"], "invalid choice: 'inspct' (choose from"),
    ],
)
def test_a_command_that_is_missing_or_mistyped_is_one_sentence(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


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

    monkeypatch.setattr(os, "replace", full)
    code, _, err = run(capsys, "inspect", SMALL, "--json", tmp_path / "out.json")
    assert code == 2
    assert "can't be written (No space left on device)" in err
    assert not list(tmp_path.iterdir())


def test_the_keyboard_stops_it_with_one_sentence(capsys, monkeypatch):
    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_build", stopped)
    code, _, err = run(capsys, "inspect", SMALL)
    assert (code, err.count("\n")) == (130, 1)
