"""looks.json: what a run was judged on each time that it was, as seeds and arms were added to it."""

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..files import read_json, write_json
from .layout import LOOKS


def read_looks(run: Path) -> list[dict[str, Any]]:
    """The looks so far, the first one first: {"seeds", "arms", "versions", "date"} of each."""
    path = run / LOOKS
    return read_json(path, list) if path.exists() else []


def record_look(run: Path, seeds: Sequence[int], arms: Sequence[str], versions: dict[str, str]) -> None:
    """Add a look, unless the last one was at the same seeds and arms: a run that was killed right after it."""
    looks = read_looks(run)
    look = {"seeds": list(seeds), "arms": list(arms)}
    if looks and look.items() <= looks[-1].items():
        return
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    write_json(run / LOOKS, [*looks, {**look, "versions": versions, "date": date}])
