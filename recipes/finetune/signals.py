"""Ctrl-C and SIGTERM, as schedulers send it, end a recipe at once and in order.

The handler raises Stopped where the main thread is, so that locks are let go of and files are left whole. A thread
sees to it that the process ends even where that takes too long: while a process waits for another inside a library,
no Python code of its main thread runs.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

GRACE = 10.0  # seconds from the signal to the end of the process
_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Stopped(BaseException):
    """A signal has ended the recipe; no handler of errors catches this.

    Attributes:
        code: what the process exits with, 128 and the number of the signal.
        kept: what of the work is kept, and how to go on.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.code = 128 + number
        self.kept = "nothing was begun"

    def __str__(self) -> str:
        return f"stopped by {_NAMES[signal.Signals(self.code - 128)]}: {self.kept}"


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise Stopped at the first signal here; a process that is still there after GRACE is ended by force."""
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, _raise_stopped) for number in _NAMES}
    threading.Thread(target=_end_in_time, args=(reader,), daemon=True).start()
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is _raise_stopped:  # no signal has come
            for number, handler in handlers.items():
                signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        writer.close()  # which ends the thread, unless a signal has come


def _raise_stopped(number: int, _: object) -> None:
    for other in _NAMES:
        signal.signal(other, signal.SIG_IGN)  # the first one is being seen to
    raise Stopped(number)


def _end_in_time(reader: socket.socket) -> None:
    """Read the numbers of signals as they come, which needs no main thread."""
    with reader:
        while numbers := reader.recv(64):
            for number in numbers:
                if number in _NAMES:
                    time.sleep(GRACE)
                    os._exit(128 + number)


def _leave_signals_to_parent() -> None:
    """In a forked child, a loader's worker: Ctrl-C reaches it as well, and its parent ends it."""
    if signal.getsignal(signal.SIGTERM) is _raise_stopped and threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_leave_signals_to_parent)
