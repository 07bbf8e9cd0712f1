"""Errors that a user can mend, told in one sentence."""

import difflib
import io
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from .signals import Stopped, stoppable

_LONGEST = 2000  # characters of a sentence


class InputError(Exception):
    """What the user gave can't be used: the message names the thing, what was expected and what to do."""

    def __init__(self, sentence: str) -> None:
        # Of a loader's worker torch raises it anew, with a traceback that ends with the sentence as its message.
        _, _, last = sentence.strip().rpartition("\n")
        super().__init__(last.removeprefix(f"{__name__}.InputError: ") if "Traceback" in sentence else sentence)


class Diverged(Exception):
    """Training broke down: a loss or a prediction is not finite, on all processes alike."""


class CheckpointWarning(UserWarning):
    """A checkpoint or a result is damaged, and an earlier one is used."""


def near_names(name: str, names: Iterable[str], count: int = 3) -> str:
    """`": did you mean ...?"` with the names closest to `name`, or nothing when none is close."""
    near = difflib.get_close_matches(name.lower(), list(names), n=count, cutoff=0.5)
    return f": did you mean {' or '.join(near)}?" if near else ""


def check_names(option: str, what: str, names: Sequence[str], known: Collection[str]) -> None:
    """Refuse unknown and repeated names; `what` is what they name, and takes the article "an"."""
    for name in names:
        if name not in known:
            hint = near_names(name, known) or f": choose from {', '.join(known)}"
            raise InputError(f"{option} names the unknown {what} {name!r}{hint}")
    if len(set(names)) < len(names):
        raise InputError(f"{option} {' '.join(names)} names an {what} twice")


def first_line(error: BaseException) -> str:
    """What an error says, in one line, or what it is, if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def damage_told(folder: Path) -> Iterator[None]:
    """Turn whatever a damaged or a stranger's file makes its readers raise into one sentence."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(
            f"{folder} can't be read as a run ({reason}): a file in it is damaged, or was written by another version"
        ) from error


def is_main_process() -> bool:
    """Whether this process speaks for all of its machine; asked of the launcher, as no process group may exist yet.

    One process per machine speaks, so that an error of one machine alone (a missing file, a full disk) is told.
    """
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def exit_on_input_error(run: Callable[[], None]) -> None:
    """Run a recipe; what ends it early is told in one sentence, by the main process.

    The exit code is 2 for an InputError, 130 after Ctrl-C and 143 after SIGTERM.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a table ends no run because a terminal lacks a sign
    try:
        with stoppable():
            run()
            sys.stdout.flush()
            _leave_launch()
    except InputError as error:
        _end(error, 2)
    except OSError as error:  # of a file that nobody sees to, such as standard output on a full disk
        _end(InputError(f"{first_line(error)}: mend that, and give the same command again"), 2)
    except Stopped as stop:
        _end(stop, stop.code)


def _leave_launch() -> None:
    """End the process group of a launch, where there is one, as torch asks of every process that ends well."""
    distributed = sys.modules.get("torch.distributed")  # not imported: --help is answered without torch
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _end(reason: BaseException, code: int) -> NoReturn:
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries again, and says so
    if is_main_process():
        with suppress(OSError):
            print(f"error: {_shortened(printable(str(reason)))}", file=sys.stderr, flush=True)
    raise SystemExit(code) from None


def _shortened(sentence: str) -> str:
    """Names from files, such as those of a million columns, don't flood the screen."""
    return sentence if len(sentence) <= _LONGEST else f"{sentence[:_LONGEST]} [...]"


def printable(text: str) -> str:
    """The text with escapes for what would move a terminal's cursor, colour it or end the line."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)
