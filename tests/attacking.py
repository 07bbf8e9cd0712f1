"""What tests attack the recipes with: a limit of time, a look at all files around, and what an error must look like."""

from __future__ import annotations

import multiprocessing
import os
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from multiprocessing.context import ForkServerProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path

from small_runs import run_recipe

# A fork of the tests' own process would inherit torch's threads, which live in the parent alone; the server has none.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["small_runs", "medmnist2d", "finetune.trial"])

LIMIT = 60  # seconds; what takes longer, be it on a busy machine, hangs


class Hung(BaseException):
    """No handler of the recipes catches this."""


@contextmanager
def time_limit(seconds: int = LIMIT) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hung(f"still running after {seconds} s")

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


def launch(folder: Path, *arguments: object, begin: Barrier | None = None) -> ForkServerProcess:
    """A launch in a process of its own, which has imported all it needs; it waits for `begin`, where that is given."""
    process = SERVER.Process(target=_run_in, args=(folder, begin, arguments))
    process.start()
    return process


def _run_in(folder: Path, begin: Barrier | None, arguments: tuple[object, ...]) -> None:
    os.chdir(folder)
    with (
        _errors_file(os.getpid()).open("w") as errors,
        Path(os.devnull).open("w") as nothing,
        redirect_stderr(errors),
        redirect_stdout(nothing),
    ):
        if begin:
            begin.wait()
        run_recipe(*arguments)


def _errors_file(pid: int) -> Path:
    return Path(f"errors-{pid}")


def errors_of(folder: Path, process: ForkServerProcess) -> str:
    """What a launch of this folder said on its standard error."""
    return (folder / _errors_file(process.pid)).read_text()


def sentence(errors: str) -> str:
    """The last line, an error in one sentence of printable characters; before it there is no traceback."""
    *before, last = errors.splitlines()
    assert last.startswith("error: "), errors
    assert "Traceback" not in errors
    assert last.isprintable(), repr(last)
    assert not [line for line in before if line.startswith("error: ")]
    return last
