"""Make summary and report of finished runs anew from their folders, set several side by side, plan further ones.

A metric, a rule or a section that is newer than a run reaches it so: nothing is trained again.

python recipes/report.py runs/pneumoniamnist-resnet18
python recipes/report.py runs/a runs/b runs/c --output runs/side_by_side.html
python recipes/report.py --plan runs/pneumoniamnist-resnet18 --margin 0.005
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from finetune.errors import InputError, damage_told, exit_on_input_error
from finetune.options import whole

if TYPE_CHECKING:
    from finetune.runs.finished import FinishedRun


@dataclass(kw_only=True)
class ReportOptions:
    """Make the report of finished runs anew from their folders, set several side by side, and plan further ones."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Run folders of the recipes."""
    plan: Path | None = None
    """A finished run of two seeds or more: print how many seeds another one needs, and make no report."""
    margin: float | None = None
    """The smallest difference that the planned run is to see. None: the finished run's own margin."""
    output: Path = Path("runs/side_by_side.html")
    """Where several runs are set side by side; the same as Markdown is written beside it."""


def main(argv: list[str] | None = None) -> None:
    """Make the reports that these arguments ask for, by default those of the command line."""
    exit_on_input_error(lambda: _run(tyro.cli(ReportOptions, args=argv)))


def _run(options: ReportOptions) -> None:
    if options.plan is not None:
        print(_plan(options.plan, options))
        return
    if options.margin is not None:
        raise InputError("--margin has no effect without --plan, the run to plan from")
    if not options.runs:
        raise InputError("no run folder is given: name one or more, as python recipes/report.py runs/NAME")
    if options.output.suffix != ".html":
        raise InputError(f"--output {options.output} must end in .html")
    # Not before the options are read: --help and mistakes in them are answered at once.
    from finetune.reports.pages import check_side_by_side, write_side_by_side

    output = whole("--output", options.output)
    if len(options.runs) > 1:
        check_side_by_side(output)
    runs = [_write(whole("a run folder", folder)) for folder in options.runs]
    if len(runs) > 1:
        write_side_by_side(runs, output)
        print(output)


def _write(folder: Path) -> "FinishedRun":
    from finetune.reports.pages import write_report
    from finetune.runs.finished import FinishedRun
    from finetune.runs.lock import hold_run
    from finetune.runs.summaries import write_summary

    with hold_run(folder), damage_told(folder):
        run = FinishedRun(folder)
        write_summary(run.folder, run.summary)
        print(write_report(run))
    return run


def _plan(pilot: Path, options: ReportOptions) -> str:
    if options.runs:
        raise InputError("--plan makes no report: leave out the other run folders")
    if options.margin is not None and not options.margin > 0:
        raise InputError(f"--margin must be above 0, not {options.margin:g}")
    from finetune.reports.plan import plan_text
    from finetune.runs.finished import FinishedRun

    return plan_text(FinishedRun(pilot), options.margin)


if __name__ == "__main__":
    main()
