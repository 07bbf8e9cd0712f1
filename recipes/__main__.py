"""The recipes of an installed package: python -m inmerge_recipes NAME and the options of recipes/NAME.py.

accelerate launch -m inmerge_recipes chestxray --data-dir DIR
"""

import runpy
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    """Run the recipe that the command line names as if its file had been called."""
    names = sorted(path.stem for path in HERE.glob("[a-z]*.py"))
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        configs = ", ".join(sorted(path.name for path in (HERE / "configs").glob("*.yaml")))
        print(f"usage: inmerge-recipes {{{','.join(names)}}} ...\n--config takes these, or a file of yours: {configs}")
        sys.exit(0 if sys.argv[1:2] in (["-h"], ["--help"]) else 2)
    recipe = HERE / f"{sys.argv.pop(1)}.py"
    sys.argv[0] = str(recipe)
    sys.path.insert(0, str(HERE))  # as Python does for a script
    try:
        runpy.run_path(str(recipe), run_name="__main__")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("finetune", "inmerge_optim"):
            raise
        print(f"inmerge-recipes lacks a library ({error}): pip install 'inmerge_optim[recipes]'", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
