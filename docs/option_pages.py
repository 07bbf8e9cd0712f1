"""The page of all options of all recipes, from the dataclasses that the command lines are made of."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

_ON_FINISHED_RUNS = ("report", "predict", "robustness")


def write_option_pages(path: Path) -> None:
    """Write a Markdown page with a table of the options that all trials share, and one for each recipe's own."""
    from finetune.options import Options

    lines = [
        "# Options of the recipes",
        "",
        "Made from the recipes' own dataclasses. A YAML file given by `--config` sets defaults under the same names,",
        "with underscores. Switches have a `--no-` form. This page is that of the commit it was built from.",
        "",
        "## Every trial",
        "",
        "The recipes that train have these, but for those that one sets itself; the last three read finished runs.",
        "",
        *_table(Options, set()),
    ]
    shared = {field.name for field in dataclasses.fields(Options)}
    for recipe, options in option_classes().items():
        of_trial = shared if recipe not in _ON_FINISHED_RUNS else set()
        own = dataclasses.fields(options)
        left_out = {field.name for field in own if field.name in of_trial and not _differs(field, Options)}
        hints = get_type_hints(options, include_extras=True)
        left_out |= {name for name, hint in hints.items() if _is_marked(hint, "Suppress")}
        lines += ["", f"## recipes/{recipe}.py", "", inspect.cleandoc(options.__doc__ or ""), ""]
        if of_trial and not issubclass(options, Options):
            lines += ["It has the options of the recipe that reads its `--dataset`, and", ""]
        lines += _table(options, left_out)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def option_classes() -> dict[str, type]:
    """The dataclass of each recipe's options, those that run trials first."""
    from compaction import CompactionOptions
    from finetune.sources.options import ChestXrayOptions, DatasetOptions, OwnImagesOptions
    from model_zoo import ZooOptions
    from predict import PredictOptions
    from report import ReportOptions
    from robustness import RobustnessOptions
    from sensitivity import SweepOptions

    return {
        "medmnist2d": DatasetOptions,
        "chestxray": ChestXrayOptions,
        "imagefolder": OwnImagesOptions,
        "model_zoo": ZooOptions,
        "sensitivity": SweepOptions,
        "compaction": CompactionOptions,
        "report": ReportOptions,
        "predict": PredictOptions,
        "robustness": RobustnessOptions,
    }


def _is_marked(hint: Any, marker: str) -> bool:
    """Say whether an option has this marker of tyro's."""
    return any(repr(given) == marker for given in getattr(hint, "__metadata__", ()))


def _differs(field: dataclasses.Field[Any], options: type) -> bool:
    other = {known.name: known for known in dataclasses.fields(options)}[field.name]
    return bool(field.default != other.default)


def _table(options: type, left_out: set[str]) -> list[str]:
    hints, texts = get_type_hints(options, include_extras=True), _texts(options)
    rows = ["| option | takes | default | |", "|---|---|---|---|"]
    for field in dataclasses.fields(options):
        if field.name not in left_out:
            hint = hints[field.name]
            flag = f"--{field.name.replace('_', '-')}"
            name = field.name.upper() if _is_marked(hint, "Positional") else flag
            rows.append(f"| `{name}` | {_takes(hint)} | {_default(field)} | {_cell(texts.get(field.name, ''))} |")
    return rows


def _takes(hint: Any) -> str:
    """What may follow an option, as its type says."""
    given = get_args(hint)
    if get_origin(hint) is Annotated:
        return _takes(given[0])
    if get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in given)
    if get_origin(hint) is tuple:
        return f"{_takes(given[0])} ..."
    if given:
        return " or ".join(_takes(kind) for kind in given if kind is not NoneType)
    return {int: "a whole number", float: "a number", str: "text", Path: "a path", bool: "a switch"}[hint]


def _default(field: dataclasses.Field[Any]) -> str:
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
