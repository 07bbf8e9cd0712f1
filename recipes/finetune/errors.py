"""Errors that a user can mend, told in one sentence."""

import difflib
import os
import sys
from collections.abc import Callable, Iterable


class InputError(Exception):
    """What the user gave can't be used: the message names the thing, what was expected and what to do."""

    def __init__(self, sentence: str) -> None:
        # Of a loader's worker torch raises it anew, with a traceback that ends with the sentence as its message.
        _, _, last = sentence.strip().rpartition("\n")
        super().__init__(last.removeprefix(f"{__name__}.InputError: ") if "Traceback" in sentence else sentence)


class CheckpointWarning(UserWarning):
    """A checkpoint or a result is damaged, and an earlier one is used."""


def near_names(name: str, names: Iterable[str], count: int = 3) -> str:
    """`": did you mean ...?"` with the names closest to `name`, or nothing when none is close."""
    near = difflib.get_close_matches(name.lower(), list(names), n=count, cutoff=0.5)
    return f": did you mean {' or '.join(near)}?" if near else ""


def first_line(error: BaseException) -> str:
    """What an error says, in one line, or what it is, if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_main_process() -> bool:
    """Whether this process speaks for all of its machine; asked of the launcher, as no process group may exist yet.

    One process per machine speaks, so that an error of one machine alone (a missing file, a full disk) is told.
    """
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def exit_on_input_error(run: Callable[[], None]) -> None:
    """Run a recipe; an InputError ends it with one sentence from the main process and exit code 2."""
    try:
        run()
    except InputError as error:
        if is_main_process():
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
