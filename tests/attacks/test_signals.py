"""Ctrl-C, SIGTERM, dead loader workers and stopped processes: one sentence, what is kept, and an end within seconds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkProcess
from pathlib import Path

import psutil
import pytest
from attacking import errors_of, launch, sentence
from small_runs import QUICK

REPOSITORY = Path(__file__).parents[2]
RECIPES = REPOSITORY / "recipes"
SETTINGS = ["--dataset", "digits", *QUICK, "--batch-size", "200", "--output", "run"]
LONG = [*SETTINGS, "--epochs", "500", "--limit-train", "400"]


def environment() -> dict[str, str]:
    folders = os.pathsep.join(map(str, (REPOSITORY, RECIPES)))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": folders, "PYTHONUNBUFFERED": "1"}


@contextmanager
def launched(folder: Path, *arguments: object, processes: int) -> Iterator[subprocess.Popen]:
    """A recipe at work below a launcher that writes what each process says of errors to a file."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    launcher += ["--redirects", "2", "--log-dir", str(folder / "logs")]
    command = [sys.executable, *launcher, str(RECIPES / "medmnist2d.py")]
    process = subprocess.Popen(
        [*command, *map(str, arguments)],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for child in psutil.Process(process.pid).children(recursive=True) if psutil.pid_exists(process.pid) else []:
            child.kill()
        process.kill()
        process.wait()


def wait_for(condition: Callable[[], object], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never began"
        time.sleep(0.02)


def begun(folder: Path) -> Callable[[], bool]:
    return lambda: (folder / "run/seed_0/backbone/metrics.csv").exists()


def workers_of(process: subprocess.Popen | ForkProcess) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


@pytest.mark.parametrize(("number", "code", "name"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")])
def test_a_signal_ends_a_run_in_one_sentence(tmp_path: Path, number: int, code: int, name: str) -> None:
    """With its loader workers, and with a lock that is let go of."""
    process = launch(tmp_path, *LONG, "--workers", "1")
    try:
        wait_for(begun(tmp_path))
        wait_for(lambda: workers_of(process))
        workers = workers_of(process)
        os.kill(process.pid, number)
        process.join(timeout=60)
        assert process.exitcode == code
        assert not psutil.wait_procs(workers, timeout=30)[1]
    finally:
        process.kill()
    assert sentence(errors_of(tmp_path, process)) == (
        f"error: stopped by {name}: run keeps all up to the last whole epoch: give the same command again with --resume"
    )
    assert not (tmp_path / "run/inmerge.lock").exists()


def test_a_killed_loader_worker_ends_the_run_in_one_sentence(attack: Callable[..., str], tmp_path: Path) -> None:
    """As the system kills one when memory runs out."""

    def kill_workers() -> None:
        wait_for(begun(tmp_path))
        while not ended.wait(0.05):  # they come and go with each pass over the data
            for worker in psutil.Process().children():
                worker.kill()

    ended = threading.Event()
    thread = threading.Thread(target=kill_workers)
    thread.start()
    try:
        message = attack(*LONG, "--workers", "1", may_change="run")
    finally:
        ended.set()
        thread.join()
    assert message.startswith("error: DataLoader worker (pid")
    assert message.endswith(
        "as when memory runs out; choose fewer --workers; run keeps all up to the last whole epoch: give the same "
        "command again with --resume"
    )


def test_standard_output_on_a_full_disk(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from finetune.errors import exit_on_input_error as run; run(lambda: print(1))"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 2
    assert sentence(done.stderr) == (
        "error: [Errno 28] No space left on device: mend that, and give the same command again"
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_end_when_one_does(tmp_path: Path, number: int, rank: int) -> None:
    """Within a minute, be it that one is killed, or stopped so that the other waits for it; without a traceback."""
    with launched(tmp_path, *LONG, processes=2) as launcher:
        wait_for(begun(tmp_path))
        ranks = [process for process in workers_of(launcher) if "medmnist2d.py" in " ".join(process.cmdline())]
        ranks.sort(key=lambda process: process.environ()["RANK"])
        assert len(ranks) == 2
        ranks[rank].send_signal(number)
        begin = time.monotonic()
        launcher.communicate(timeout=60)  # the launcher has tracebacks of its own
        print(f"{signal.Signals(number).name} of process {rank}: ended after {time.monotonic() - begin:.1f} s")
    errors = [next((tmp_path / "logs").glob(f"*/attempt_0/{rank}/stderr.log")).read_text() for rank in range(2)]
    print(errors)
    assert "Traceback" not in "".join(errors)
    assert not psutil.wait_procs(ranks, timeout=1)[1]
    told = [line for text in errors for line in text.splitlines() if line.startswith("error: ")]
    if number == signal.SIGSTOP:
        assert f"error: process {rank} of 2 gave no sign of life for 20 s" in told[0]
    assert len(told) <= 1, told
    assert not (tmp_path / "run/summary.json").exists()
