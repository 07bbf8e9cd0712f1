"""Arms can be told apart, however many there are."""

from __future__ import annotations

from types import SimpleNamespace

from finetune.reports.style import looks


def test_thirty_arms_look_different() -> None:
    run = SimpleNamespace(arms=[str(k) for k in range(30)])
    found = [(look["color"], look["linestyle"], look["marker"]) for _, look in looks(run, marker=True)]
    assert len(set(found)) == 30
