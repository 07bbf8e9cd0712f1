"""One launch at a time in a run folder.

The lock is a file in the run folder that names its holder. The system locks it (flock), and lets go of it when the
process dies, however it dies. Not every shared file system carries such a lock from one host to another. So the holder
gives a sign of life as well, every BEAT seconds, by the file's time of change, which whoever comes from another host
watches for a while; and whoever finds another's name in the file stops. No clocks are compared.
"""

import errno
import fcntl
import json
import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..errors import InputError
from ..files import storage_errors
from .layout import LOCK

BEAT = 10.0  # seconds between two signs of life
SILENCE = 3 * BEAT  # without one for so long, a holder on another host is dead
_WITHOUT_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # how file systems say that they have none
_held: set[int] = set()


class RunHeld(InputError):
    """Another process works in the run folder."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, and since when by its own clock."""

    host: str
    pid: int
    since: str

    @classmethod
    def this_process(cls) -> "Holder":
        return cls(socket.gethostname(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S"))


@contextmanager
def hold_run(run: Path, accelerator: Accelerator | None = None) -> Iterator[None]:
    """Hold the lock of a run folder, which is made if need be; folders that stay empty are removed again.

    Args:
        accelerator: its main process holds the lock for all; None: this process is alone.

    Raises:
        RunHeld: in all processes, where another launch holds it.
    """
    with ExitStack() as stack:
        refusal = None
        if accelerator is None or accelerator.is_main_process:
            try:
                stack.enter_context(_hold(run))
            except InputError as error:
                refusal = error
        if accelerator is not None:
            (refusal,) = broadcast_object_list([refusal])
        if refusal is not None:
            raise refusal
        yield


@contextmanager
def _hold(run: Path) -> Iterator[None]:
    path = run / LOCK
    made: list[Path] = []
    try:
        with storage_errors(run):
            if run.is_file():
                raise InputError(f"--output {run} is a file: give the path of a folder")
            descriptor = _take_in(run, made)
        _held.add(descriptor)
        try:
            with _signs_of_life(path, _read(descriptor)):
                yield
        finally:
            if _is_same_file(descriptor, path):
                path.unlink()
            _held.discard(descriptor)
            os.close(descriptor)
    finally:
        _remove_empty(made)


def _take_in(run: Path, made: list[Path]) -> int:
    """Take the lock in a folder that is made if need be; folders that were not there go to `made`, the last first."""
    while True:
        made[:0] = [folder for folder in (run, *run.parents) if not folder.exists()]
        run.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # a launch that was refused has just removed the folder
            return _take(run / LOCK)


def _take(path: Path) -> int:
    """The descriptor of the lock, written with this process's name."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            carried = _lock(descriptor, path)
            if not _is_same_file(descriptor, path):  # its holder has just ended, and removed it
                os.close(descriptor)
                continue
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:  # of a stranger's folder
                raise InputError(f"{path} is no file, or another file's hard link: take it away")
            holder = _read(descriptor)
            if holder and not (carried and holder.host == socket.gethostname()):
                _watch(path, holder)
            content = json.dumps(asdict(Holder.this_process())).encode()
            os.pwrite(descriptor, content, 0)
            os.ftruncate(descriptor, len(content))
            os.fsync(descriptor)
            return descriptor
        except BaseException:
            os.close(descriptor)
            raise


def _lock(descriptor: int, path: Path) -> bool:
    """Lock the file, if its file system has locks; whether it has."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _refusal(path, _read_soon(descriptor)) from None
    except OSError as error:
        if error.errno in _WITHOUT_LOCKS:
            return False
        raise
    return True


def _watch(path: Path, holder: Holder) -> None:
    """Return when the holder gave no sign of life for SILENCE."""
    print(f"Waiting {SILENCE:.0f} s for a sign of life of process {holder.pid} on {holder.host}", file=sys.stderr)
    begin, since = _beat(path), time.monotonic()
    while time.monotonic() - since < SILENCE:
        time.sleep(BEAT / 10)
        if _beat(path) != begin:
            raise _refusal(path, holder)


def _beat(path: Path) -> int:
    """The last sign of life; opened anew, which makes a shared file system ask its server."""
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns


def _refusal(path: Path, holder: Holder | None) -> RunHeld:
    who = "another process"
    if holder:
        with suppress(OSError):
            seen = time.strftime("%H:%M:%S", time.localtime(_beat(path) / 1e9))
            who = f"process {holder.pid} on {holder.host} since {holder.since}, last sign of life at {seen}"
    return RunHeld(f"{path.parent} is in use by {who}: wait until it has ended, or choose another --output")


def _read(descriptor: int) -> Holder | None:
    try:
        return Holder(**json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError, RecursionError):  # not written yet, or not by this module
        return None


def _read_soon(descriptor: int) -> Holder | None:
    """The holder, whose name follows the system's lock after a moment."""
    for _ in range(100):
        holder = _read(descriptor)
        if holder:
            return holder
        time.sleep(0.01)
    return None


@contextmanager
def _signs_of_life(path: Path, mine: Holder) -> Iterator[None]:
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT):
            with suppress(OSError):  # a passing failure of a shared file system
                _beat_once(path, mine)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _beat_once(path: Path, mine: Holder) -> None:
    """Give a sign of life, or end this process where the lock names another."""
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        holder = _read(descriptor)
        if holder != mine:
            print(f"error: {_refusal(path, holder)}", file=sys.stderr, flush=True)
            os._exit(2)
        os.utime(descriptor)
    finally:
        os.close(descriptor)


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except OSError:
        return False


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _forget() -> None:
    """Close the locks in a forked child: a worker that outlives its parent for a moment must not keep them."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_forget)
