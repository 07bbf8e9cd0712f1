"""Two launches never work in one run folder, and no dead process keeps others out of it."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from attacking import SERVER, errors_of, launch, sentence
from finetune.errors import InputError
from finetune.runs import lock
from finetune.runs.layout import LOCK
from finetune.runs.lock import RunHeld, hold_run
from small_runs import QUICK

FORK = multiprocessing.get_context("fork")


def hold(run: Path, forks: bool = False) -> None:
    """Hold the lock until this process is killed; `forks`: beside a child that outlives it."""
    with hold_run(run):
        if forks and os.fork() == 0:
            time.sleep(30)
            os._exit(0)
        (run / "begun").touch()
        time.sleep(60)


@contextmanager
def holder_of(run: Path, **options: bool) -> Iterator[int]:
    """Another process that holds the lock; its number."""
    process = FORK.Process(target=hold, args=(run,), kwargs=options)
    process.start()
    while not (run / "begun").exists():
        time.sleep(0.005)
    try:
        yield process.pid
    finally:
        process.kill()
        process.join()


@pytest.fixture
def quick_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "SILENCE", 0.3)


def record(run: Path, host: str, pid: int = 4242) -> Path:
    """What a holder has left, or holds."""
    run.mkdir(exist_ok=True)
    (run / LOCK).write_text(json.dumps({"host": host, "pid": pid, "since": "2026-01-01 00:00:00"}))
    return run / LOCK


def test_a_second_launch_says_who_holds_the_folder(attack: Callable[..., str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with holder_of(run) as pid:
        for resume in ([], ["--resume"]):
            message = attack("--dataset", "digits", *QUICK, "--output", "run", *resume)
            assert f"run is in use by process {pid} on {socket.gethostname()} since 20" in message
            assert "last sign of life at" in message


@pytest.mark.parametrize("forks", [False, True])
def test_a_dead_process_holds_nothing(tmp_path: Path, forks: bool) -> None:
    """Nor do the loader workers that outlive it for a moment."""
    run = tmp_path / "run"
    with holder_of(run, forks=forks):
        pass
    assert (run / LOCK).exists()
    with hold_run(run):
        assert json.loads((run / LOCK).read_text())["pid"] == os.getpid()
    assert not (run / LOCK).exists()


def test_a_stopped_process_still_holds_the_folder(tmp_path: Path) -> None:
    with holder_of(tmp_path / "run") as pid:
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(RunHeld), hold_run(tmp_path / "run"):
            pass


@pytest.mark.usefixtures("quick_beats")
def test_a_holder_on_another_host_is_known_by_its_signs_of_life(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = record(tmp_path / "run", "elsewhere")

    def live() -> None:
        while True:
            os.utime(path)
            time.sleep(0.02)

    process = FORK.Process(target=live)
    process.start()
    try:
        with pytest.raises(RunHeld, match="in use by process 4242 on elsewhere"), hold_run(tmp_path / "run"):
            pass
    finally:
        process.kill()
        process.join()
    assert "sign of life of process 4242 on elsewhere" in capsys.readouterr().err
    with hold_run(tmp_path / "run"):
        assert json.loads(path.read_text())["host"] == socket.gethostname()


@pytest.mark.usefixtures("quick_beats")
def test_without_the_systems_locks_signs_of_life_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without_locks)
    with hold_run(tmp_path / "run"), pytest.raises(RunHeld), hold_run(tmp_path / "run"):
        pass
    record(tmp_path / "run", socket.gethostname())
    with hold_run(tmp_path / "run"):
        pass


def test_who_finds_another_name_in_the_lock_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a stop so long that others took it for dead."""
    monkeypatch.setattr(lock, "BEAT", 0.05)
    run = tmp_path / "run"
    process = FORK.Process(target=hold, args=(run,))
    process.start()
    while not (run / "begun").exists():
        time.sleep(0.005)
    record(run, "elsewhere")
    process.join(timeout=10)
    assert process.exitcode == 2
    assert json.loads((run / LOCK).read_text())["host"] == "elsewhere"


def test_folders_that_stay_empty_are_removed(tmp_path: Path) -> None:
    with hold_run(tmp_path / "a" / "b" / "run"):
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    with hold_run(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "result").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b", "result"]


def test_a_lock_is_no_way_to_other_files(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "other").write_text("mine")
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "other")
    with pytest.raises(InputError, match="run can't be written"), hold_run(tmp_path / "run"):
        pass
    assert (tmp_path / "other").read_text() == "mine"


def test_launches_at_the_same_moment_enter_one_after_another(tmp_path: Path) -> None:
    """Six processes that each come back until they were in: never two at once."""

    def enter(run: Path) -> None:
        while True:
            try:
                with hold_run(run):
                    descriptor = os.open(run / "inside", os.O_CREAT | os.O_EXCL)
                    time.sleep(0.001)
                    os.close(descriptor)
                    (run / "inside").unlink()
                    return
            except RunHeld:
                time.sleep(0.0005)

    processes = [FORK.Process(target=enter, args=(tmp_path / "run",)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=30)
    assert [process.exitcode for process in processes] == [0] * 6
    # The folder may stay: whoever made it can't remove it while the next one is coming in.
    assert [path.name for path in tmp_path.rglob("*")] in ([], ["run"])


@pytest.mark.slow
def test_pairs_of_launches_at_the_same_moment(tmp_path: Path) -> None:
    """Twenty pairs that differ in their rate: one of each pair makes the run, and the other says who does."""
    said = []
    for pair in range(20):
        folder = tmp_path / str(pair)
        folder.mkdir()
        short = ["--dataset", "digits", *QUICK, "--epochs", "1", "--inmerge-epochs", "1", "--limit-train", "400"]
        short += ["--output", "run", *(["--resume"] if pair % 4 == 0 else [])]
        begin = SERVER.Barrier(2)
        processes = {
            rate: launch(folder, *short, "--lr", rate, *(["--resume"] if resumes else []), begin=begin)
            for rate, resumes in (("0.01", False), ("0.3", pair % 2))
        }
        for process in processes.values():
            process.join(timeout=120)
        errors = {rate: errors_of(folder, process) for rate, process in processes.items()}
        assert sorted(process.exitcode for process in processes.values()) == [0, 2], errors
        (winner,) = (rate for rate, process in processes.items() if process.exitcode == 0)
        (loser,) = processes.keys() - {winner}
        said.append(sentence(errors[loser]))
        assert f"run is in use by process {processes[winner].pid} on" in said[-1] or "holds a run" in said[-1]
        assert f"\nlr: {winner}\n" in (folder / "run/config.yaml").read_text()
        for curves in (folder / "run").glob("seed_0/*/metrics.csv"):
            assert {row.split(",")[1] for row in curves.read_text().splitlines()[1:]} == {winner}
        assert (folder / "run/summary.json").exists()
        assert not (folder / "run" / LOCK).exists()
    print("\n".join(said))


# What a stranger may have left in place of a lock.


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[" * 5000,
        b"\xff\xfe\x00",
        b"{}",
        b"null",
        b'{"host": [], "pid": {}, "since": 3, "more": 1}',
        json.dumps({"host": socket.gethostname(), "pid": 1, "since": "2020"}).encode(),  # alive, and another one now
        b"x" * 1_000_000,
    ],
    ids=lambda content: ascii(content)[2:20],
)
def test_whatever_is_in_a_lock_that_nobody_holds(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).write_bytes(content)
    with hold_run(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("put", [os.mkfifo, Path.mkdir, lambda path: path.hardlink_to(path.parent.parent / "other")])
def test_a_lock_that_is_no_file_of_its_own(tmp_path: Path, put: Callable[[Path], None]) -> None:
    """Through a hard link the holder's name would be written over another file."""
    (tmp_path / "run").mkdir()
    (tmp_path / "other").write_text("mine")
    put(tmp_path / "run" / LOCK)
    expected = r"can't be written|is no file, or another file's hard link"
    with pytest.raises(InputError, match=expected), hold_run(tmp_path / "run"):
        pass
    assert (tmp_path / "other").read_text() == "mine"


def test_another_name_of_the_folder_is_the_same_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("run")
    (tmp_path / "nowhere").symlink_to("gone")
    with hold_run(tmp_path / "run"), pytest.raises(RunHeld), hold_run(tmp_path / "link"):
        pass
    with pytest.raises(InputError, match="nowhere can't be written"), hold_run(tmp_path / "nowhere"):
        pass
