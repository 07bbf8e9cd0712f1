"""The notebook runs from top to bottom: it wraps, trains, looks at the kernels and reads a trial."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch.utils.data import TensorDataset

from inmerge_optim import plots

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_notebook_runs_from_top_to_bottom(digits_run, tmp_path, monkeypatch, capsys):
    shown = []
    notebook = SimpleNamespace(Image=lambda data, width: shown.append(data))
    monkeypatch.setitem(sys.modules, "IPython.display", notebook)
    draw = plots.plot_profile
    monkeypatch.setattr(plots, "plot_profile", lambda profiles, *rest: draw(profiles[:2], *rest))  # seconds less
    monkeypatch.syspath_prepend(EXAMPLES)
    data = importlib.import_module("digits")
    monkeypatch.setitem(sys.modules, "digits", data)  # forgotten afterwards
    few = [TensorDataset(*part[:300]) for part in data.digits()]
    monkeypatch.setattr(data, "digits", lambda: few)
    (tmp_path / "examples").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/demo").symlink_to(digits_run)
    monkeypatch.chdir(tmp_path / "examples")

    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)

    told = capsys.readouterr().out
    assert sum(count["merged"] for count in names["optimizer"].merge_counts().values()) > 0
    assert "drawn pairs, mean cosine" in told
    assert shown[0].startswith(b"\x89PNG")
    assert "inmerge is not judged against baseline" in told  # one seed
