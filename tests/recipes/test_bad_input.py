"""What can't be used is told in one sentence with exit code 2, and nothing is written."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import medmnist
import numpy as np
import pytest
import torch
from accelerate import Accelerator, DistributedType
from safetensors.torch import save_file
from small_runs import run_recipe

DIGITS = ["--dataset", "digits", "--model", "test_resnet", "--no-pretrained", "--image-size", "16"]


@pytest.fixture
def refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the recipe, check that it refuses as it should, and return its sentence."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(*arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as exit_:
            run_recipe(*arguments)
        assert exit_.value.code == 2
        assert sorted(tmp_path.rglob("*")) == before
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert message.count("\n") == 1
        return message

    return run


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--dataset", "pneumonia"], "--dataset pneumonia is no 2D set of MedMNIST: did you mean pneumoniamnist"),
        (["--dataset", "organmnist3d"], "did you mean organ"),
        (["--model", "resnet81"], "--model resnet81 is unknown to timm: did you mean resnet"),
        (["--model", "resnet18.foo"], "has no weights 'foo', but"),
        (["--model", "test_vit", "--image-size", "160"], "test_vit can't be merged with these options"),
        (["--skip-layers", "99"], "test_resnet can't be merged with these options"),
        (["--merge-prob", "1.2"], "merge_prob"),
        (["--merge-weight", "-0.1"], "merge_weight"),
        (["--similarity-threshold", "2"], "similarity_threshold"),
        (["--similarity-threshold", "4dd"], "similarity_threshold is '4dd', but it must be a number from -1 to 1"),
        (["--model", "test_convnext", "--image-size", "8"], "--image-size 8 does not fit test_convnext"),
        (["--model", "resnet18", "--batch-size", "1"], "batch norm can't train"),
        (["--pretrained"], "pass --no-pretrained, or a local file with --checkpoint FILE"),
        (["--pretrained", "--checkpoint", "absent.safetensors"], "--checkpoint absent.safetensors is no file"),
        (["--checkpoint", "absent.safetensors"], "leave out one of both"),
        (["--arms", "baseline", "inmerg"], "unknown arm 'inmerg': did you mean inmerge?"),
        (["--arms", "inmerge"], "--arms must hold baseline"),
        (["--tracker", "tensorbord"], "--tracker tensorbord is unknown: did you mean tensorboard?"),
        (["--tracker", "mlflow"], "--tracker mlflow is unknown: choose from tensorboard, wandb, trackio, none"),
        (["--smoothing", "1"], "--smoothing must be at least 0 and below 1"),
        (["--limit-train", "2000"], "--limit-train 2000 has no effect on the"),
        (["--model", "dla46_c", "--image-size", "32", "--grad-checkpointing"], "timm's dla46_c can't do it"),
        (["--arms", "baseline", "baseline"], "names an arm twice"),
        (["--seeds", "1", "1"], "names a seed twice"),
        (["--seeds"], "at least one seed"),
        (["--opt", "sdg"], "--opt sdg is unknown to timm: did you mean"),
        (["--batch-size", "5000"], "more than the 1257 training images of digits"),
        (["--grad-accum-steps", "3"], "choose a multiple of 3"),
        (["--mixed-precision", "fp16"], "--mixed-precision fp16 is not possible on the CPU"),
        (["--hflip", "2"], "--hflip must be a probability"),
        (["--epochs", "-1"], "--epochs must be at least 0"),
        (["--lr", "nan"], "--lr must be at least 0"),
        (["--clip-grad", "0"], "--clip-grad must be above 0"),
        (["--decay-milestones", "3"], "has no effect with --sched constant"),
        (["--sched", "multistep"], "needs --decay-milestones"),
        (["--warmup-epochs", "11"], "longer than --epochs 10"),
        (["--cooldown-epochs", "5"], "--cooldown-epochs 5 leaves no epoch that merges"),
        (["--cooldown-epochs", "1", "--arms", "baseline"], "--cooldown-epochs has no effect on --arms baseline"),
        (
            ["--recalibrate-bn", "--model", "test_vit", "--arms", "baseline"],
            "--recalibrate-bn has no effect on test_vit",
        ),
        (["--source-size", "64"], "no effect on digits"),
        (["--config", "absent.yaml"], "--config absent.yaml can't be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.filterwarnings("ignore:only . of the .* counted layers:UserWarning")
def test_bad_options(refusal: Callable[..., str], arguments: list[str], expected: str) -> None:
    if arguments == ["--mixed-precision", "fp16"] and torch.cuda.is_available():
        pytest.skip("fp16 is possible on a GPU")
    assert expected in refusal(*DIGITS, *arguments)


def test_a_launch_that_shards_the_model(refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU accelerate never shards, whatever its configuration says; so it is told here that it did."""
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    assert "the launcher asks for FSDP" in refusal(*DIGITS)


def test_a_launch_of_more_processes_than_gpus(refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert "started 4 processes on this machine, which shows 2 GPU(s)" in refusal(*DIGITS)


def test_output_folder_in_use(refusal: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    for resume in ([], ["--resume"]):
        assert "used is not empty, and holds no run" in refusal(*DIGITS, "--output", "used", *resume)
    assert "is a file" in refusal(*DIGITS, "--output", "used/notes.txt")


def test_config_with_an_unknown_key(refusal: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("learning_rate: 1\n")
    assert "unknown option 'learning_rate'" in refusal(*DIGITS, "--config", "c.yaml")
    (tmp_path / "c.yaml").write_text("epoch: 1\n")
    assert "unknown option 'epoch': did you mean epochs" in refusal(*DIGITS, "--config", "c.yaml")
    (tmp_path / "c.yaml").write_text("- 1\n")
    assert "must hold `option: value` lines" in refusal(*DIGITS, "--config=c.yaml")


def test_checkpoint_of_another_architecture(refusal: Callable[..., str], tmp_path: Path) -> None:
    """Without this check timm would load nothing of it and train from scratch, saying nothing."""
    save_file({"features.0.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "other.safetensors")
    arguments = [word for word in DIGITS if word != "--no-pretrained"]
    message = refusal(*arguments, "--checkpoint", "other.safetensors")
    assert "other.safetensors does not fit test_resnet: conv1.0.weight is missing in the file" in message
    (tmp_path / "text.pth").write_text("no weights")
    assert "text.pth holds no weights" in refusal(*arguments, "--checkpoint", "text.pth")


def test_checkpoint_of_a_real_other_architecture(refusal: Callable[..., str], shared_file) -> None:
    path = shared_file("weights/squeezenet1_1.safetensors")
    message = refusal("--dataset", "digits", "--model", "efficientnet_lite0", "--checkpoint", path)
    assert f"{path} does not fit efficientnet_lite0" in message


def test_unusable_medmnist_files(refusal: Callable[..., str], made_medmnist, tmp_path: Path) -> None:
    """Not medmnist's file, cut short, no .npz at all, or with other contents than such a file has."""
    folder = made_medmnist("breastmnist", colour=False, classes=2)
    arguments = [*DIGITS[2:], "--dataset", "breastmnist", "--data-dir", folder]
    message = refusal(*arguments)
    assert medmnist.INFO["breastmnist"]["MD5"] in message
    assert "--allow-modified" in message
    path = folder / "breastmnist.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "no readable .npz file" in refusal(*arguments, "--allow-modified")
    path.write_text("<html>404</html>")
    assert "no readable .npz file" in refusal(*arguments)
    np.savez(path, train_images=np.zeros((4, 28, 28), np.uint8))
    assert "no readable train split" in refusal(*arguments, "--allow-modified")
    made_medmnist("breastmnist", colour=False, classes=3)
    assert "train_labels between 0 and 2: expected values from 0 to 1" in refusal(*arguments, "--allow-modified")
    made_medmnist("breastmnist", colour=True, classes=2)
    assert "expected square uint8 images without a channel axis" in refusal(*arguments, "--allow-modified")


def test_failed_download_says_what_to_fetch(
    refusal: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The URL, the md5 and --data-dir; and no half a file is left behind."""

    def broken(url: str, root: str, filename: str, md5: str) -> None:
        (Path(root) / filename).write_bytes(b"half a fi")
        raise OSError("connection reset")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", broken)
    (tmp_path / "data").mkdir()
    message = refusal(*DIGITS[2:], "--dataset", "bloodmnist", "--source-size", "64", "--data-dir", "data")
    info = medmnist.INFO["bloodmnist"]
    for part in (info["url_64"], info["MD5_64"], "--data-dir"):
        assert part in message
    assert "is no folder" in refusal(*DIGITS[2:], "--dataset", "bloodmnist", "--data-dir", "elsewhere")


def test_colour_images_are_not_made_grey(refusal: Callable[..., str], made_medmnist) -> None:
    folder = made_medmnist("dermamnist", colour=True, classes=7)
    arguments = ["--dataset", "dermamnist", "--data-dir", folder, "--allow-modified", "--batch-size", "32"]
    assert "--in-chans 1 needs grey images" in refusal(*DIGITS[2:], *arguments, "--in-chans", "1")
    assert "--split-seed has no effect" in refusal(*DIGITS[2:], *arguments, "--split-seed", "1")


def test_smoothing_of_labels_is_refused(refusal: Callable[..., str], made_medmnist) -> None:
    folder = made_medmnist("chestmnist", colour=False, classes=2, labels=14)
    arguments = ["--dataset", "chestmnist", "--data-dir", folder, "--allow-modified", "--batch-size", "32"]
    assert "--smoothing has no effect on the labels of chestmnist" in refusal(
        *DIGITS[2:], *arguments, "--smoothing", 0.1
    )


def test_tracker_that_is_not_installed(refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refusal(*DIGITS, "--tracker", "wandb")
    assert "--tracker wandb needs the package wandb: install it with pip install 'inmerge_optim[trackers]'" in message


def test_python_exits_with_2(tmp_path: Path) -> None:
    """The same from a real command line."""
    recipe = Path(__file__).parents[2] / "recipes" / "medmnist2d.py"
    command = [sys.executable, str(recipe), *DIGITS, "--merge-prob", "1.2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
