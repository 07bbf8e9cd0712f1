"""The commands that the pages tell: each is parsed as it would be, and those that need no network, data or GPU are run.

make docs-check
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
STARTS = ("python ", "accelerate launch ", "torchrun ", "inmerge-recipes ", "make ", "pip install ")
STARTS += ("inmerge inspect", "inmerge compact", "inmerge --")  # a line of a table may begin with the arm's name

# What is run with the names below standing for a finished demo, and for a folder of images.
RUN = re.compile(
    r"python recipes/(report|predict|robustness)\.py|python examples/|inmerge-recipes .*demo\.yaml"
    r"|inmerge (--|\w+ --help|inspect \w+$)"
)
RUNS = re.compile(r"runs/(?!side)[\w-]+")
IMAGES = re.compile(r"\b(scan\.png|scan\.dcm|new_images|more_images/|images/)")
NEEDS = {
    "a network": r"--pretrained|--hub|pip install|--models|medmnist2d|sensitivity",
    "several processes or GPUs": r"torchrun|accelerate launch|--engine ray",
    "data of one's own": r"--data-dir|--csv|--checkpoint|--module",
    "minutes or hours": r"make |benchmarks/|pytest|-m build",
}


def commands() -> list[tuple[str, str]]:
    """Every command in a block of code, or in a line of text, with the page that tells it."""
    found: dict[str, str] = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for language, block in re.findall(r"^```(.*?)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            if language not in ("", "bash", "sh"):
                continue
            for name, value in re.findall(r'^(\w+)="(.*)"$', block, re.MULTILINE):
                block = block.replace(f"${name}", value)
            for line in map(str.strip, block.splitlines()):
                if line.startswith(STARTS):
                    found.setdefault(" ".join(line.split()), page.name)
        for span in re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)):
            command = " ".join(span.split())
            if command.startswith(STARTS) and "..." not in command:
                found.setdefault(command, page.name)
    return [(page, command) for command, page in found.items()]


def parse(command: str) -> None:
    """Raise what the command's parser raises, a SystemExit mostly, or a ValueError where it names what isn't there."""
    program, *words = shlex.split(command, comments=True)
    if program == "make":
        given = dict(word.split("=", 1) for word in words if "=" in word)
        targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        if not {word for word in words if "=" not in word} <= set(targets):
            raise ValueError(f"the Makefile has no {words}")
        if "study" in words:
            config = ROOT / "studies" / given["NAME"] / "config.yaml"
            parse_recipe("medmnist2d", ["--config", str(config), *shlex.split(given.get("ARGS", ""))])
    elif program == "pip":
        extras = {name for word in words for part in re.findall(r"\[(.*)\]", word) for name in part.split(",")}
        known = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        if not extras <= set(known):
            raise ValueError(f"pyproject.toml lacks one of the extras {extras}")
    elif program == "inmerge":
        from inmerge_optim.cli import _join_values, _parser

        if len(words) > 1 and "--help" not in words:  # one word is a mention of the command
            _parser().parse_args(_join_values(words))
    elif program == "inmerge-recipes":
        _parse_script(f"recipes/{words[0]}.py", words[1:])
    else:
        _parse_script(*_launched(program, words))


def _launched(program: str, words: list[str]) -> tuple[str, list[str]]:
    """The script that Python or a launcher starts, and the words that are for it."""
    if program == "python":
        return words[0], words[1:]
    if program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        found: argparse.Namespace = launch_command_parser().parse_args(words[1:])
        if found.module:
            return f"recipes/{found.training_script_args[0]}.py", found.training_script_args[1:]
    else:
        from torch.distributed.run import get_args_parser

        found = get_args_parser().parse_args(words)
    return found.training_script, found.training_script_args


def _parse_script(script: str, words: list[str]) -> None:
    if script in ("-m", "train.py"):  # a module of another project, a script of the reader's
        return
    if not (ROOT / script).is_file():
        raise ValueError(f"there is no {script}")
    if script.startswith("recipes/"):
        parse_recipe(Path(script).stem, words)


def parse_recipe(recipe: str, words: list[str]) -> Any:
    """The options that a recipe's parser makes of these words, checked where they are those of a trial."""
    import tyro
    from finetune.options import Options, check_options

    class Parsed(BaseException):
        pass

    def stop(kind: type, **given: Any) -> None:
        raise Parsed(real(kind, **given))

    real, main = tyro.cli, importlib.import_module(recipe).main
    try:
        with mock.patch.object(tyro, "cli", stop):
            main(words)
    except Parsed as parsed:
        (options,) = parsed.args
        if isinstance(options, Options):
            check_options(options)
        return options
    raise ValueError(f"recipes/{recipe}.py parses no options by tyro")


def _run(command: str, folder: Path) -> int:
    """Run a command in a folder with the project's scripts, where its runs and images stand for those of the demo."""
    several = len(set(RUNS.findall(command))) > 1
    command = IMAGES.sub("image.png", RUNS.sub("runs/demo", command))
    if "--output runs/demo" in command:  # it is trained anew: no run is written over
        shutil.rmtree(folder / "runs/demo", ignore_errors=True)
    if several:
        shutil.copytree(folder / "runs/demo", folder / "runs/other", dirs_exist_ok=True)
        command = command.replace("runs/demo runs/demo", "runs/demo runs/other", 1)
    if command.startswith("inmerge-recipes"):
        command = command.replace("inmerge-recipes ", "python recipes/__main__.py ")
    if command.startswith("inmerge "):
        command = command.replace("inmerge ", "python -m inmerge_optim ", 1)
    python = f"{shlex.quote(sys.executable)} "
    done = subprocess.run(
        command.replace("python ", python, 1),
        shell=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
    return done.returncode


def _demo(folder: Path) -> Iterator[str]:
    """The commands that make what the others work on."""
    from PIL import Image

    for name in ("recipes", "examples"):
        (folder / name).symlink_to(ROOT / name)
    Image.new("L", (32, 32), 90).save(folder / "image.png")
    yield "python recipes/medmnist2d.py --config recipes/configs/demo.yaml --output runs/demo"


def main() -> int:
    """Parse and run them, a line for each; 1 if one fails."""
    sys.path.insert(0, str(ROOT / "recipes"))
    os.chdir(ROOT)
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        told = [("demo", command) for command in _demo(folder)] + commands()
        for page, command in told:
            try:
                parse(command)
                code, how = 0, "parsed"
            except (Exception, SystemExit) as error:
                code, how = 1, f"is wrong ({error})"
            needs = [need for need, pattern in NEEDS.items() if re.search(pattern, command)]
            if not code and (page == "demo" or RUN.match(command)):
                code, how = _run(command, folder), "ran"
            elif needs:
                how += f", needs {' and '.join(needs)}"
            failed += code != 0
            print(f"{'FAILED' if code else 'ok'}  {page}: {command}  [{how}]", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
