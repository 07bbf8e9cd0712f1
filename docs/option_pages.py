"""The page of all options of all recipes, from the dataclasses that the command lines are made of."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, get_origin, get_type_hints


def write_option_pages(path: Path) -> None:
    """Write a Markdown page with a table of the options that all share, and one for each recipe's own."""
    from finetune.options import Options

    lines = [
        "# Options of the recipes",
        "",
        "Made from the recipes' own dataclasses. A YAML file given by `--config` sets defaults under the same names,",
        "with underscores. Switches have a `--no-` form. This page is that of the commit it was built from.",
        "",
        "## Every trial",
        "",
        *_table(Options, set()),
    ]
    shared = {field.name for field in dataclasses.fields(Options)}
    for recipe, options in _recipes().items():
        own = dataclasses.fields(options)
        kept = {field.name for field in own if field.name in shared and not _differs(field, Options)}
        hints = get_type_hints(options, include_extras=True)
        kept |= {name for name, hint in hints.items() if get_origin(hint) is Annotated}  # suppressed
        lines += ["", f"## {recipe}", "", inspect.cleandoc(options.__doc__ or ""), "", *_table(options, kept)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _recipes() -> dict[str, type]:
    from compaction import CompactionOptions
    from finetune.sources.options import ChestXrayOptions, DatasetOptions, OwnImagesOptions
    from sensitivity import SweepOptions

    return {
        "recipes/medmnist2d.py": DatasetOptions,
        "recipes/chestxray.py": ChestXrayOptions,
        "recipes/imagefolder.py": OwnImagesOptions,
        "recipes/sensitivity.py": SweepOptions,
        "recipes/compaction.py": CompactionOptions,
    }


def _differs(field: dataclasses.Field[Any], options: type) -> bool:
    other = {known.name: known for known in dataclasses.fields(options)}[field.name]
    return bool(field.default != other.default)


def _table(options: type, left_out: set[str]) -> list[str]:
    hints, texts = get_type_hints(options), _texts(options)
    rows = ["| option | default | |", "|---|---|---|"]
    for field in dataclasses.fields(options):
        if field.name not in left_out:
            name = f"--{field.name.replace('_', '-')}"
            rows.append(f"| `{name}` | {_default(field, hints[field.name])} | {_cell(texts.get(field.name, ''))} |")
    return rows


def _default(field: dataclasses.Field[Any], hint: Any) -> str:
    value = field.default
    if value is dataclasses.MISSING:
        return "required"
    if isinstance(value, tuple):
        return f"`{' '.join(map(str, value))}`" if value else "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else f"`{value}`"


def _texts(options: type) -> dict[str, str]:
    """The docstrings below the fields, of the class and of those that it extends."""
    found: dict[str, str] = {}
    for owner in reversed(options.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body  # type: ignore[attr-defined]
        for statement, after in pairwise(body):
            if isinstance(statement, ast.AnnAssign) and isinstance(after, ast.Expr):
                found[statement.target.id] = inspect.cleandoc(after.value.value)  # type: ignore[attr-defined, union-attr]
    return found


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
