"""Equal channels taken out: the outputs stay, the shapes shrink where they can, and a reason says where they can't."""

from __future__ import annotations

import copy
import json

import pytest
import timm
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from inmerge_optim import CheckpointError, cli, compact, load_compacted, remove_channels, save_compacted
from inmerge_optim.compacted_files import is_compacted
from inmerge_optim.compaction import compact_clusters

pytest.importorskip("torch_pruning", reason="torch-pruning is not installed (extra compact)")

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def copy_channel(module, source, target):
    """Give a channel what another one has, in all that a layer or a norm holds per channel."""
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            values = getattr(module, name, None)
            if values is not None:
                values[target] = values[source]


def planted(model):
    """Make the second quarter of each layer's channels equal to the first; norms differ from channel to channel."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, NORMS):
            for values in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(values, 0.5, 1.5)
    for module in model.modules():
        plain = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups == 1
        if plain or isinstance(module, NORMS):
            quarter = len(module.weight) // 4
            copy_channel(module, slice(0, quarter), slice(quarter, 2 * quarter))
    return model.eval()


def assert_same_outputs(model, smaller, inputs):
    with torch.no_grad():
        expected, found = (copy.deepcopy(net).double()(inputs.double()) for net in (model, smaller))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def left_of(report):
    return {layer.name: (layer.before, layer.after) for layer in report.layers}


def reasons_of(report):
    return {layer.name: layer.reason for layer in report.layers}


SMALL = {
    "resnet": lambda: timm.create_model("test_resnet", num_classes=3),
    "densenet": lambda: timm.models.densenet.DenseNet(growth_rate=8, block_config=(2, 2), num_classes=3),
    "squeezenet": lambda: torchvision.models.squeezenet1_1(num_classes=3),
    "mobilenet": lambda: timm.create_model("mobilenetv2_035", num_classes=3),
    "efficientnet": lambda: timm.create_model("test_efficientnet", num_classes=3),
    "convnext": lambda: timm.create_model("test_convnext", num_classes=3),
    "resnext": lambda: timm.create_model("test_byobnet", num_classes=3),
}


@pytest.mark.parametrize("family", SMALL)
def test_outputs_stay_and_kernels_go_in_each_family(family):
    model, inputs = planted(SMALL[family]()), torch.randn(2, 3, 32, 32)
    before = copy.deepcopy(model.state_dict())
    smaller, report = compact(model, inputs)
    assert_same_outputs(model, smaller, inputs)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    shrunk = family != "convnext"  # whose layer norms mix all channels
    assert (report.parameters[1] < report.parameters[0]) == shrunk
    assert (report.macs[1] < report.macs[0]) == shrunk
    assert report.parameters[1] == sum(parameter.numel() for parameter in smaller.parameters())
    for layer in report.layers:
        assert layer.after < layer.before or layer.reason, layer
        module = smaller.get_submodule(layer.name)
        assert len(module.weight) == layer.after


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["vgg11_bn", "resnet18", "densenet121", "mobilenetv2_050", "efficientnet_lite0", "convnext_atto"]
)
def test_outputs_stay_in_the_smallest_of_timm(name):
    model, inputs = planted(timm.create_model(name, num_classes=3)), torch.randn(1, 3, 64, 64)
    smaller, report = compact(model, inputs)
    assert_same_outputs(model, smaller, inputs)
    assert report.parameters[1] < report.parameters[0]


def test_all_that_is_equal_goes_where_nothing_forbids_it():
    model = planted(torchvision.models.squeezenet1_1(num_classes=3))
    _, report = compact(model, torch.randn(1, 3, 64, 64))
    left = left_of(report)
    assert left.pop("classifier.1") == (3, 3)
    assert all(after == before - before // 4 for before, after in left.values())


def test_what_reads_a_channel_adds_up_its_weights():
    """By hand: of two equal channels the second goes, and what reads it after concatenation and flattening adds up."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.norm = nn.BatchNorm2d(8)
            self.head = nn.Linear(8 * 4, 2)

        def forward(self, x):
            return self.head(self.norm(torch.cat([self.left(x), self.right(x)], 1)).relu().flatten(1))

    torch.manual_seed(0)
    model, inputs = Branches().eval(), torch.randn(2, 3, 2, 2)
    copy_channel(model.right, 1, 3)
    smaller, report = compact(model, inputs)
    assert report.removed == [("right", (3,))]
    weight = model.head.weight.reshape(2, 8, 4)
    expected = torch.cat([weight[:, :5], weight[:, 5:6] + weight[:, 7:8], weight[:, 6:7]], 1).reshape(2, 28)
    torch.testing.assert_close(smaller.head.weight, expected)
    assert_same_outputs(model, smaller, inputs)

    with torch.no_grad():
        model.norm.bias[7] += 0.1
    _, report = compact(model, inputs)
    assert report.removed == []
    assert reasons_of(report)["right"].startswith("equal kernels, but not in all that makes the channels")


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        return self.head((self.left(x) + self.right(x)).relu())


def test_channels_that_are_added_must_be_equal_in_both_branches():
    torch.manual_seed(0)
    model, inputs = Sum().eval(), torch.randn(1, 3, 4, 4)
    copy_channel(model.left, 0, 1)
    copy_channel(model.right, 2, 3)
    _, report = compact(model, inputs)
    assert left_of(report)["left"] == left_of(report)["right"] == (6, 6)
    assert "not in all that makes the channels: left, right" in reasons_of(report)["left"]
    copy_channel(model.right, 0, 1)
    smaller, report = compact(model, inputs)
    assert left_of(report)["left"] == left_of(report)["right"] == (6, 5)
    assert_same_outputs(model, smaller, inputs)


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (nn.GroupNorm(2, 8), "mixed by 1 (GroupNorm)"),
        (nn.Conv2d(8, 8, 3, padding=1, groups=2), "in the grouped convolution 1"),
        (nn.Softmax(1), "mixed by an operation between them and their readers"),
        (nn.ChannelShuffle(2), "mixed by an operation between them and their readers"),
        (nn.PixelShuffle(2), "needed in this number"),
    ],
)
def test_a_reason_is_given_where_channels_depend_on_each_other(between, reason):
    torch.manual_seed(0)
    read = 2 if isinstance(between, nn.PixelShuffle) else 8
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), between, nn.Conv2d(read, 2, 1)).eval()
    copy_channel(model[0], [0, 1], [5, 6])
    smaller, report = compact(model, torch.randn(1, 3, 8, 8))
    assert reasons_of(report)["0"].startswith(reason)
    assert report.removed == []
    assert smaller[0].out_channels == 8
    torch.testing.assert_close(smaller[0].weight, model[0].weight, rtol=0, atol=0)


def test_the_models_outputs_stay():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)).eval()
    copy_channel(model[2], 0, 1)
    _, report = compact(model, torch.randn(1, 3, 4, 4))
    assert reasons_of(report)["2"] == "the model's outputs"


def test_the_tolerance_is_relative_and_groups_get_their_mean():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    with torch.no_grad():
        model[0].weight *= 1e-4
        model[0].weight[6] = model[0].weight[1] * 1.01
    inputs = torch.randn(1, 3, 8, 8)
    assert compact(model, inputs, tolerance=0.009)[1].removed == []
    smaller, report = compact(model, inputs, tolerance=0.011)
    assert report.removed == [("0", (6,))]
    torch.testing.assert_close(smaller[0].weight[1], model[0].weight[[1, 6]].mean(0))
    assert 0 < report.largest_difference < 0.01 * report.largest_output
    copy_channel(model[0], 2, 3)
    assert compact(model, inputs, tolerance=0)[1].removed == [("0", (3,))]


def test_signals_and_volumes_and_what_is_transposed():
    torch.manual_seed(0)
    for plain, transposed, norm, size in (
        (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, (16,)),
        (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d, (6, 6, 6)),
    ):
        model = nn.Sequential(plain(2, 8, 3), norm(8), nn.PReLU(8), transposed(8, 6, 3), nn.ReLU(), plain(6, 2, 1))
        model = planted(model)
        inputs = torch.randn(2, 2, *size)
        smaller, report = compact(model, inputs)
        assert left_of(report)["0"] == (8, 6)
        assert_same_outputs(model, smaller, inputs)


def test_a_rebuilt_model_takes_the_weights():
    model, inputs = planted(SMALL["resnet"]()), torch.randn(1, 3, 32, 32)
    smaller, report = compact(model, inputs)
    rebuilt = remove_channels(SMALL["resnet"](), inputs, report.removed)
    rebuilt.load_state_dict(smaller.state_dict())
    torch.testing.assert_close(rebuilt.eval()(inputs), smaller(inputs), rtol=0, atol=0)
    with pytest.raises(ValueError, match="removed is of another model"):
        remove_channels(SMALL["resnet"](), inputs, [("conv1", (10_000,))])


def test_the_command_writes_a_smaller_model_that_is_built_again_from_its_file(tmp_path, capsys):
    model = planted(timm.create_model("test_resnet", num_classes=2, in_chans=1))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    options = ["--checkpoint", str(tmp_path / "model.safetensors"), "--num-classes", "2", "--in-chans", "1"]
    small = tmp_path / "small.safetensors"
    assert cli.main(["compact", "test_resnet", *options, "--input-size", "1", "32", "32", "--output", str(small)]) == 0
    assert "parameters: " in capsys.readouterr().out
    assert small.stat().st_size < 0.8 * (tmp_path / "model.safetensors").stat().st_size
    inputs = torch.randn(2, 1, 32, 32)
    assert_same_outputs(model, load_compacted(small), inputs)
    assert_same_outputs(
        model, load_compacted(small, timm.create_model("test_resnet", num_classes=2, in_chans=1)), inputs
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--output", "small.pt"], "--output small.pt must end in .safetensors"),
        (["--output", "no/folder.safetensors"], "--output no/folder.safetensors"),
        (["--output", "small.safetensors", "--tolerance", "-1"], "tolerance is -1.0, but it must be a number from 0"),
        (["--output", "small.safetensors", "--input-size", "7", "32", "32"], "can't be run on the example_inputs"),
    ],
)
def test_the_command_refuses_what_it_cannot_use_in_one_line(options, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compact", "test_resnet", *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        {"model": "hf_hub:someone/something"},
        {"model": "no_such_model"},
        {"settings": {"checkpoint_path": "evil.pth"}},
        {"settings": {"pretrained": True}},
        {"input_size": [1, 3, 2**40, 32]},
        {"input_size": "all"},
        {"removed": [["conv1.0", [99]]]},
        {"removed": [["nothing", [0]]]},
        {"removed": 3},
        {"removed": []},
    ],
    ids=str,
)
def test_a_file_that_says_something_else_is_refused_in_a_sentence(change, tmp_path):
    model, inputs = planted(SMALL["resnet"]()), torch.randn(1, 3, 32, 32)
    smaller, report = compact(model, inputs)
    description = {"model": "test_resnet", "settings": {"num_classes": 3}, "input_size": [1, 3, 32, 32]}
    path = tmp_path / "small.safetensors"
    save_compacted(path, smaller, report, description)
    assert_same_outputs(model, load_compacted(path), inputs)
    with safe_open(path, "pt") as file:
        found = json.loads(file.metadata()["inmerge_compacted"])
    save_file(smaller.state_dict(), path, metadata={"inmerge_compacted": json.dumps(found | change)})
    with pytest.raises(CheckpointError, match=r"small\.safetensors"):
        load_compacted(path)


def test_files_of_others_are_refused_in_a_sentence(tmp_path):
    path = tmp_path / "other.safetensors"
    for write in (
        lambda: path.write_bytes(b"no such thing"),
        lambda: save_file({"weight": torch.ones(1)}, path),
        lambda: save_file({"weight": torch.ones(1)}, path, metadata={"inmerge_compacted": "{"}),
        lambda: save_file({"weight": torch.ones(1)}, path, metadata={"inmerge_compacted": "[1]"}),
        path.unlink,
    ):
        write()
        with pytest.raises(CheckpointError, match=r"other\.safetensors"):
            load_compacted(path)


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_types_of_numbers_devices_and_frozen_weights_are_kept(device):
    model = planted(SMALL["resnet"]()).to(device, torch.bfloat16)
    model.conv1.requires_grad_(False)
    smaller, _ = compact(model, torch.randn(1, 3, 32, 32, device=device))
    assert {(held.dtype, held.device.type) for held in smaller.parameters()} == {(torch.bfloat16, device)}
    assert {held.device.type for held in smaller.buffers()} == {device}
    assert [name for name, parameter in smaller.named_parameters() if not parameter.requires_grad] == [
        name for name, parameter in model.named_parameters() if not parameter.requires_grad
    ]
    assert not smaller.training


def test_the_default_device_does_not_matter():
    model = planted(SMALL["resnet"]())
    _, expected = compact(model, torch.zeros(1, 3, 32, 32))
    inputs = torch.zeros(1, 3, 32, 32)
    with torch.device("meta"):
        smaller, report = compact(model, inputs)
        again = remove_channels(model, inputs, report.removed)
    assert report.removed == expected.removed
    assert {held.device.type for made in (smaller, again) for held in made.state_dict().values()} == {"cpu"}


def test_the_report_is_a_table():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    copy_channel(model[0], 0, 1)
    text = str(compact(model, torch.randn(1, 3, 4, 4))[1])
    assert "0            4     3" in text
    assert "parameters: 26 -> 20 (76.9 % left)" in text


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((nn.Linear(2, 2), torch.ones(1, 2), -1), ValueError, "tolerance is -1"),
        ((nn.Linear(2, 2), torch.ones(1, 2), True), ValueError, "tolerance is True"),
        ((nn.Linear(2, 2), 3), TypeError, "example_inputs is 3"),
        ((nn.Linear(2, 2), torch.ones(1, 5)), ValueError, "Linear can't be run on the example_inputs"),
        (("resnet18", torch.ones(1, 5)), TypeError, "model is a str"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(arguments, error, match):
    with pytest.raises(error, match=match):
        compact(*arguments)


def test_channels_that_are_said_to_be_alike_become_their_mean():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    seen = {}

    def choose(name, kernels):
        seen[name] = kernels.shape
        return [[0, 2, 3]] if name == "0" else []

    smaller, report = compact_clusters(model, torch.randn(2, 3, 8, 8), choose)
    assert seen == {"0": (4, 27), "3": (2, 18)}  # the second reads two channels by then
    assert report.removed == [("0", (2, 3))]
    torch.testing.assert_close(smaller[0].weight[0], model[0].weight[[0, 2, 3]].mean(0))
    torch.testing.assert_close(smaller[3].weight[:, 0], model[3].weight[:, [0, 2, 3]].sum(1))
    assert report.largest_difference > 0


def test_a_compacted_file_is_known_by_its_header(tmp_path):
    model, inputs = planted(SMALL["squeezenet"]()), torch.randn(2, 3, 32, 32)
    smaller, report = compact(model, inputs)
    description = {"model": None, "settings": {"num_classes": 3}, "input_size": [2, 3, 32, 32]}
    save_compacted(tmp_path / "small.safetensors", smaller, report, description)
    save_file(model.state_dict(), tmp_path / "whole.safetensors")
    assert is_compacted(tmp_path / "small.safetensors")
    assert not is_compacted(tmp_path / "whole.safetensors")
