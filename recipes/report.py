"""Make the summary and the report of finished runs anew from their folders, and set several runs side by side.

A metric, a rule or a section that is newer than a run reaches it so: nothing is trained again.

python recipes/report.py runs/pneumoniamnist-resnet18
python recipes/report.py runs/a runs/b runs/c --output runs/side_by_side.html
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from finetune.errors import InputError, exit_on_input_error
from finetune.reports.pages import write_report, write_side_by_side
from finetune.runs.finished import FinishedRun
from finetune.runs.summaries import write_summary


@dataclass(kw_only=True)
class ReportOptions:
    """Make the summary and the report of finished runs anew from their folders, and set several runs side by side."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders of the recipes."""
    output: Path = Path("runs/side_by_side.html")
    """Where several runs are set side by side; the same as Markdown is written beside it."""


def main(argv: list[str] | None = None) -> None:
    """Make the reports that these arguments ask for, by default those of the command line."""
    exit_on_input_error(lambda: _run(tyro.cli(ReportOptions, args=argv)))


def _run(options: ReportOptions) -> None:
    if not options.runs:
        raise InputError("no run folder is given: name one or more, as python recipes/report.py runs/NAME")
    if options.output.suffix != ".html":
        raise InputError(f"--output {options.output} must end in .html")
    runs = [FinishedRun(folder) for folder in options.runs]
    for run in runs:
        write_summary(run.folder, run.summary)
        print(write_report(run))
    if len(runs) > 1:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_side_by_side(runs, options.output)
        print(options.output)


if __name__ == "__main__":
    main()
