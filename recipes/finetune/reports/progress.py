"""How far the trials of a grid are, while other processes work on them: one table that a terminal shows in place."""

import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import printable
from ..options import Options
from ..runs.layout import BACKBONE, CURVES, stage_folder
from .terminal import aligned


@dataclass
class GridProgress:
    """A row per trial and a column per seed; where the output is no terminal, a line per part that is done.

    Attributes:
        trials: the options of each trial by its name, with its run folder as output.
        done: the stages of each trial and seed that are.
        said: how the trials stand that are at an end.
    """

    trials: Mapping[str, Options]
    done: dict[tuple[str, int], int] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)
    _lines: int = 0

    def count(self, name: str, part: object) -> None:
        """A part of a trial is done."""
        if isinstance(part, tuple):
            seed, _ = part
            self.done[name, seed] = self.done.get((name, seed), 0) + 1
        if not sys.stdout.isatty():
            words = f"seed {part[0]} {part[1]}" if isinstance(part, tuple) else part
            print(f"{printable(name)}: {words} done", flush=True)

    def end(self, name: str, words: str) -> None:
        """A trial is at its end, in these words."""
        self.said[name] = words
        if not sys.stdout.isatty():
            print(f"{printable(name)}: {printable(words)}", flush=True)

    def show(self, running: Sequence[tuple[str, object]]) -> None:
        """Draw the table over the one before; running: the names of trials with the parts that are worked on."""
        if not sys.stdout.isatty():
            return
        seeds = list(dict.fromkeys(seed for options in self.trials.values() for seed in options.seeds))
        rows = [["", *(f"seed {seed}" for seed in seeds), ""]]
        for name, options in self.trials.items():
            parts = [part for other, part in running if other == name]
            cells = [self._cell(name, options, seed, parts) if seed in options.seeds else "" for seed in seeds]
            rows.append([printable(name), *cells, self.said.get(name, "")])
        text = aligned(rows)
        print("\x1b[F" * self._lines + "\x1b[J" + text, flush=True)
        self._lines = text.count("\n") + 1

    def _cell(self, name: str, options: Options, seed: int, parts: Sequence[object]) -> str:
        """Stages done of all, and the epochs of those that are worked on."""
        words = [f"{self.done.get((name, seed), 0)}/{1 + len(options.arms)}"]
        for part in parts:
            if isinstance(part, tuple) and part[0] == seed:
                epochs = options.epochs if part[1] == BACKBONE else options.inmerge_epochs
                words.append(f"{part[1]} {_epochs_done(stage_folder(options.output, *part))}/{epochs}")
        return " ".join(words)


def _epochs_done(stage: Path) -> int:
    try:
        with (stage / CURVES).open(newline="", encoding="utf-8") as file:
            return max(0, sum(1 for _ in csv.reader(file)) - 1)
    except OSError:  # not begun, or just being written
        return 0
