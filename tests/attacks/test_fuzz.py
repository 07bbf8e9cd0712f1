"""Command lines at random: each ends as it should, or in a sentence, and never in a traceback."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import chestxray
import imagefolder
import medmnist2d
import model_zoo
import pytest
import report
from attacking import time_limit
from small_runs import run_recipe

NUMBERS = ["0", "-1", "1", "3", "0.5", "1e-3", "1e400", "nan", "inf", "-inf", "9" * 5000, "0x10", str(2**64), "", "1_0"]
TEXTS = [
    "",
    " ",
    "x",
    "--",
    "-",
    "a\nb",
    "\x1b[2J",
    "a\0b",
    "é",
    "\udcff",
    "x" * 300,
    "../..",
    "$(id)",
    "{0}",
    "%s",
    "None",
]
PATHS = [
    "absent",
    "/dev/null",
    "/dev/full",
    "/proc/self/mem",
    "fifo",
    "loop",
    "text",
    "folder",
    "~/x",
    "~nobody/x",
    *TEXTS,
]
OPTIONS = {
    **dict.fromkeys(("epochs", "inmerge-epochs", "batch-size", "grad-accum-steps", "image-size", "in-chans"), NUMBERS),
    **dict.fromkeys(("lr", "inmerge-lr", "momentum", "weight-decay", "clip-grad", "hflip", "smoothing"), NUMBERS),
    **dict.fromkeys(("merge-prob", "merge-weight", "skip-layers", "cooldown-epochs", "warmup-epochs"), NUMBERS),
    **dict.fromkeys(("seeds", "split-seed", "limit-train", "workers", "margin", "planned-seeds"), NUMBERS),
    "similarity-threshold": [*NUMBERS, *TEXTS, "4sd", "q0.9", "q2", "sd"],
    **dict.fromkeys(("opt", "tracker", "dataset", "sched", "class-weights", "mixed-precision", "arms", "aug"), TEXTS),
    "model": [*TEXTS, "test_resnet", "test_vit", "resnet18.x", "hf_hub:x/y"],
    **dict.fromkeys(("output", "config", "checkpoint", "data-dir"), PATHS),
    "no-such-option": TEXTS,
}
FLAGS = ["--resume", "--pretrained", "--no-pretrained", "--channels-last", "--recalibrate-bn", "--help", "-h", "--"]
QUICK = ["--model", "test_resnet", "--no-pretrained", "--image-size", "16", "--epochs", "0", "--inmerge-epochs", "0"]
RECIPES: dict[str, tuple[Callable[[list[str]], None], list[str]]] = {
    "medmnist2d": (medmnist2d.main, ["--dataset", "digits", *QUICK]),
    "chestxray": (chestxray.main, ["--data-dir", "folder", *QUICK]),
    "imagefolder": (imagefolder.main, ["--data-dir", "folder", *QUICK]),
    "model_zoo": (model_zoo.main, ["--datasets", "digits", "--models", "test_resnet", *QUICK[2:]]),
    "report": (report.main, []),
}


def command_line(chance: random.Random) -> tuple[str, list[str]]:
    """A recipe, and a command line that is nearly right, but for one to three words or so."""
    name = chance.choice(list(RECIPES))
    words = list(RECIPES[name][1])
    for _ in range(chance.randint(1, 3)):
        if name == "report":
            words += [chance.choice([*PATHS, "--output", *FLAGS])]
        elif chance.random() < 0.2:
            words += [chance.choice(FLAGS)]
        else:
            option = chance.choice(list(OPTIONS))
            words += [f"--{option}", *chance.choices(OPTIONS[option], k=chance.choice([0, 1, 1, 1, 1, 2]))]
    return name, words


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_command_line_ends_in_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HOME", str(tmp_path))
    chance = random.Random(0)
    for number in range(200):
        name, words = command_line(chance)
        folder = tmp_path / str(number)
        (folder / "folder").mkdir(parents=True)
        os.mkfifo(folder / "fifo")
        (folder / "loop").symlink_to("loop")
        (folder / "text").write_text("mine")
        monkeypatch.chdir(folder)
        try:
            with time_limit():
                run_recipe(*words, recipe=RECIPES[name][0])
            code = 0
        except SystemExit as exit_:
            code = exit_.code or 0
        except Exception as error:
            raise AssertionError(f"{name} {words}") from error
        errors = capsys.readouterr().err
        assert code in (0, 1, 2), (name, words, code)
        assert "Traceback" not in errors, (name, words)
        assert (folder / "text").read_text() == "mine", (name, words)
