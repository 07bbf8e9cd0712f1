"""The public names, what they take, and the options of the command lines change only on purpose.

interface.txt has them. What changed on purpose is written into it by: python tests/test_interface.py
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import inmerge_optim
from inmerge_optim.cli import _parser

FROZEN = Path(__file__).with_name("interface.txt")
RECIPES = Path(__file__).parents[1] / "recipes"


def test_names_and_options_are_those_of_before():
    pytest.importorskip("tyro", reason="the recipes' libraries are not installed")
    now, before = set(interface()), set(FROZEN.read_text(encoding="utf-8").splitlines())
    gone, new = sorted(before - now), sorted(now - before)
    assert now == before, (
        "\n".join([*(f"- {line}" for line in gone), *(f"+ {line}" for line in new)])
        + "\nIf that is meant: python tests/test_interface.py, and a line in CHANGELOG.md"
    )


def interface() -> list[str]:
    """A line for each name and each option."""
    lines = [f"inmerge_optim.{line}" for name in inmerge_optim.__all__ for line in _name(inmerge_optim, name)]
    lines += [f"inmerge {line}" for line in _console_script(_parser())]
    from finetune.options import Options

    of_trial = list(_options(Options))
    lines += [f"every trial {line}" for line in of_trial]
    for recipe in sorted(RECIPES.glob("[a-z]*.py")):
        kind = _options_class(recipe.stem)
        own = [line for line in _options(kind) if not issubclass(kind, Options) or line not in of_trial]
        own = ["runs a trial", *own] if issubclass(kind, Options) else own
        lines += [f"recipes/{recipe.name} {line}" for line in own]
    return lines


def _name(home: Any, name: str) -> Iterator[str]:
    found = getattr(home, name)
    if not inspect.isclass(found):
        yield f"{name}{inspect.signature(found)}" if callable(found) else name
        return
    yield name if issubclass(found, Exception) else f"{name}{inspect.signature(found)}"
    for member, value in sorted(vars(found).items()):
        if not member.startswith("_") and inspect.isfunction(value):
            yield f"{name}.{member}{inspect.signature(value)}"
        elif isinstance(value, property):
            yield f"{name}.{member}"


def _console_script(parser: argparse.ArgumentParser, command: str = "") -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, under in action.choices.items():
                yield from _console_script(under, f"{name} ")
        elif not isinstance(action, argparse._HelpAction):
            default = "" if action.default in (None, argparse.SUPPRESS) else f" = {action.default}"
            yield f"{command}{' '.join(action.option_strings) or action.metavar}{default}"


def _options_class(recipe: str) -> type:
    """The dataclass that a recipe hands to tyro."""
    import tyro

    class Handed(BaseException):
        pass

    def hand(kind: type, **_: Any) -> None:
        raise Handed(kind)

    module = importlib.import_module(recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tyro, "cli", hand)
        try:
            module.main([])
        except Handed as handed:
            return handed.args[0]
    raise AssertionError(f"recipes/{recipe}.py parses no options by tyro")


def _options(kind: type) -> Iterator[str]:
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        default = "" if field.default is dataclasses.MISSING else f" = {field.default}"
        choices = [value for value in get_args(hints[field.name]) if isinstance(value, str | int)]
        of = f" of {choices}" if choices else ""
        yield f"--{field.name.replace('_', '-')}{of}{default}"


if __name__ == "__main__":
    sys.path.insert(0, str(RECIPES))
    FROZEN.write_text("\n".join(interface()) + "\n", encoding="utf-8")
