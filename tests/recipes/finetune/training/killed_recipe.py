"""Run a recipe, and end this process by SIGKILL a while after a function of it was called so many times.

killed_recipe.py RECIPE MODULE FUNCTION CALL SECONDS [the recipe's arguments]
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading


def kill_after(module: str, function: str, call: int, seconds: float) -> None:
    """Let the recipe's function run on, and this process die `seconds` after its `call`-th call began."""
    target = importlib.import_module(f"finetune.{module}")
    real, calls = getattr(target, function), []

    def counted(*args: object, **kwargs: object) -> object:
        calls.append(None)
        if len(calls) == call:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return real(*args, **kwargs)

    setattr(target, function, counted)


if __name__ == "__main__":
    recipe, module, function, call, seconds, *arguments = sys.argv[1:]
    kill_after(module, function, int(call), float(seconds))
    importlib.import_module(recipe).main(arguments)
