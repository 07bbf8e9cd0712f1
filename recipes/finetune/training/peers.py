"""The other processes of a launch: when one is stopped or out of reach, all end soon, and don't wait for hours.

Launchers see when a process dies. One that is stopped, or whose machine can't be reached, is waited for by the others
in the next exchange of gradients. So each process counts up a number of its own in the launch's store, and looks
whether those of the others grow.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ..errors import InputError

BEAT = 2.0  # seconds between two looks
SILENCE = 20.0  # a process whose number has not grown for so long is taken for stopped


@contextmanager
def watched_peers() -> Iterator[None]:
    """Watch the other processes, where there are any; end this one, with a sentence, when one of them is stopped."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1 or "MASTER_ADDR" not in os.environ:
        yield
        return
    seen = [time.monotonic()] * processes
    rank = int(os.environ["RANK"])
    # Two threads, as the store may be that of a process that is stopped, and then doesn't answer.
    with _meanwhile(_exchange, _store(), rank, seen), _meanwhile(_watch, rank, seen):
        yield


@contextmanager
def _meanwhile(work: Callable[..., None], *arguments: object) -> Iterator[None]:
    """Work in a thread, until the event that is its last argument is set."""
    ended = threading.Event()
    threading.Thread(target=work, args=(*arguments, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _store() -> TCPStore:
    """The launch's, by a connection of its own: the process group's waits for the others with its lock held."""
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=SILENCE),
    )


def failed_alike(what: str, sentence: str) -> bool:
    """Whether the other processes of the launch tell of the same failure, within SILENCE; True where there are none.

    Then all of them can go on. Else the others wait for this one in an exchange, which can't be interrupted.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1 or "MASTER_ADDR" not in os.environ:
        return True
    key = f"inmerge_optim/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{what}"
    try:
        store = _store()
        rank = int(os.environ["RANK"])
        store.set(f"{key}/{rank}", sentence)
        keys = [f"{key}/{other}" for other in range(processes)]
        # With signs of life, or the others take this process for stopped as it waits.
        with _meanwhile(_exchange, _store(), rank, [time.monotonic()] * processes):
            store.wait(keys, timedelta(seconds=SILENCE))
        return {store.get(name).decode() for name in keys} == {sentence}
    except RuntimeError:  # some have told of nothing in time
        return False


def _exchange(store: TCPStore, rank: int, seen: list[float], ended: threading.Event) -> None:
    """Count up this process's number, and note when each process's number was last seen to have grown."""
    counts = [0] * len(seen)
    while not ended.wait(BEAT):
        with suppress(RuntimeError):  # the store ends with the process that holds it
            for other in range(len(seen)):
                count = store.add(f"inmerge_optim/alive/{other}", int(other == rank))
                if count != counts[other]:
                    counts[other], seen[other] = count, time.monotonic()


def _watch(rank: int, seen: list[float], ended: threading.Event) -> None:
    """End this process when one was not seen for SILENCE; the first of those that are left says so."""
    processes = len(seen)
    now = time.monotonic()
    while not ended.wait(BEAT):
        before, now = now, time.monotonic()
        if now - before > SILENCE / 2:  # it was this process that was stopped, or its machine asleep
            seen[:] = [now] * processes
        silent = [other for other in range(processes) if now - seen[other] > SILENCE]
        if not silent or ended.is_set():
            continue
        names = f"process {' and '.join(map(str, silent))} of {processes}"
        if rank in silent:  # its own number doesn't grow either
            names = "the launcher, or whichever process holds the launch's store,"
        if rank in silent or rank == min(set(range(processes)) - set(silent)):
            print(
                f"error: {names} gave no sign of life for {SILENCE:.0f} s, as one that is stopped or out of reach; all "
                "processes end, and the run folder keeps all up to the last whole epoch: give the same command again "
                "with --resume",
                file=sys.stderr,
                flush=True,
            )
        os._exit(2)


class LostPeer(InputError):
    """Another process of the launch has ended, and can tell better why."""


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether this is what the process group raises when another process has ended."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection closed by peer" in str(error)
