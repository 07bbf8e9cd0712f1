"""What attacks share: a recipe is run in this process on what it can't use, and must say so in one sentence."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import medmnist2d
import pytest
from recipe_fixtures import digits_run, made_medmnist  # noqa: F401
from small_runs import run_recipe

LIMIT = 10  # seconds; what takes longer hangs


@contextmanager
def time_limit(seconds: int = LIMIT) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def snapshot(folder: Path) -> dict[str, object]:
    """Every file, folder, link and special file, with its content where it has one."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        mode = os.lstat(path).st_mode
        if stat.S_ISLNK(mode):
            content: object = os.readlink(path)
        elif stat.S_ISREG(mode):
            content = path.read_bytes()
        else:
            content = stat.S_IFMT(mode)
        found[str(path.relative_to(folder))] = content
    return found


@pytest.fixture
def attack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a recipe in tmp_path; it must refuse in one sentence with exit code 2, and change nothing. The sentence."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(*arguments: object, recipe: Callable[[list[str]], None] = medmnist2d.main) -> str:
        before = snapshot(tmp_path)
        capsys.readouterr()
        with time_limit(), pytest.raises(SystemExit) as exit_:
            run_recipe(*arguments, recipe=recipe)
        assert exit_.value.code == 2
        message = sentence(capsys.readouterr().err)
        assert snapshot(tmp_path) == before
        return message

    return run


def sentence(errors: str) -> str:
    """The last line, an error in one sentence of printable characters; before it there is no traceback."""
    *before, last = errors.splitlines()
    assert last.startswith("error: "), errors
    assert "Traceback" not in errors
    assert last.isprintable(), repr(last)
    assert not [line for line in before if line.startswith("error: ")]
    return last
