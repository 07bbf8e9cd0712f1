"""``python -m inmerge_optim`` is the console script ``inmerge``."""

from inmerge_optim.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
