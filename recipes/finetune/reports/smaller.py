"""What a trial says of the models that were made smaller: how small, how fast, and whether they are equivalent."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from ..files import read_json
from ..judging.formatting import percent
from ..judging.metrics import title_of
from ..options import BASELINE
from ..runs.finished import FinishedRun
from ..runs.layout import PLOTS, SMALLER, TIMING
from ..runs.sections import Section
from ..training.arms import COMPACT, reduction_of
from ..training.leaving import LATENCY
from .style import GREY, interval_text, line_look, mean_text, new_figure, number_text, write_figure

_PICTURE = f"{PLOTS}/smaller.png"
_NARROWEST = 10.0  # percent of the multiplications
_TEXT = """\
Left are, of the whole model, these shares of the multiplications (MACs), parameters and kernels, means over seeds. \
compact takes out the channels that merging has made equal, after the last epoch of the arm: nothing chose it, and the \
same figures stand under the last epoch. Times are medians on one thread of a CPU, of the whole model and the smaller \
one in turns."""
_OTHERS = """\
The others come to the same multiplications by pruning the backbone's channels (a share of every layer's: those of the \
smallest norms, or random ones), or to the same kernels of each layer by k-means of the backbone's. They are then \
trained for as many epochs as the merging arms."""


@dataclass(frozen=True)
class Size:
    """What is left of a model, as shares of the whole one.

    Attributes:
        milliseconds: by batch size the time of a pass of the whole model and of the smaller one; none where it was not
            measured.
        changed: the largest difference of the outputs that taking channels out made, over the largest output.
    """

    macs: float
    parameters: float
    kernels: float
    milliseconds: Mapping[str, tuple[float, float]]
    changed: float


def smaller_section(run: FinishedRun) -> Section | None:
    """The table and the picture; None where no arm's model was made smaller."""
    arms = {arm: found for arm in run.arms if (found := reduction_of(arm))}
    if not arms:
        return None
    metric = run.summary["rule"]["metric"]
    sizes = {arm: size_of(run, arm) for arm in arms}
    verdicts = {found["arm"]: found for found in run.summary["verdicts"] if found["reference"] == BASELINE}
    rows = [
        [
            arm,
            *(percent(share, 1) for share in (size.macs, size.parameters, size.kernels)),
            mean_text(run.summary["arms"][arm][metric]),
            interval_text(verdicts[arm]["mean"], (verdicts[arm]["low"], verdicts[arm]["high"])),
            verdicts[arm]["outcome"],
            *(_time_text(size.milliseconds.get(batch)) for batch in ("1", "32")),
            number_text(size.changed, "{:.1g}"),
        ]
        for arm, size in sizes.items()
    ]
    header = (
        *("arm", "MACs", "parameters", "kernels", title_of(metric), f"minus {BASELINE}", "verdict"),
        *("ms, batch 1", "ms, batch 32", "outputs changed"),
    )
    merged = [arm for arm, smaller in arms.items() if smaller.way == COMPACT]
    sentences = [f"{verdicts[arm]['sentence']}. It has {_left_text(sizes[arm])}." for arm in merged]
    others = [_OTHERS] if len(merged) < len(arms) else []
    outcomes = {arm: verdict["outcome"] for arm, verdict in verdicts.items()}
    largest = largest_reduction(sizes, outcomes, run.summary["rule"]["margin"])
    text = "\n\n".join([*sentences, largest, _TEXT, *others])
    return Section("Smaller models", text, header, rows, _pictures(run, sizes, verdicts))


def size_of(run: FinishedRun, arm: str) -> Size:
    """The means over the seeds, and folds, that an arm finished."""
    return sizes_of([path.parent for seed in run.finished_seeds(arm) for path in run.weights(seed, arm)])


def sizes_of(folders: Sequence[Path]) -> Size:
    """The means over the folders of stages."""
    found = [read_json(folder / SMALLER) for folder in folders]
    times = [read_json(folder / TIMING).get(LATENCY, {}) for folder in folders]
    kernels = [[sum(layer[key] for layer in of_seed["layers"]) for key in ("before", "after")] for of_seed in found]
    return Size(
        _share([of_seed["macs"] for of_seed in found]),
        _share([of_seed["parameters"] for of_seed in found]),
        _share(kernels),
        {batch: tuple(map(mean, zip(*(of_seed[batch] for of_seed in times), strict=True))) for batch in times[0]},
        max(of_seed["largest_difference"] / (of_seed["largest_output"] or 1.0) for of_seed in found),
    )


def _share(pairs: list[list[int]]) -> float:
    return mean(after / before for before, after in pairs)


def _time_text(milliseconds: tuple[float, float] | None) -> str | None:
    if milliseconds is None:
        return None
    whole, smaller = milliseconds
    return f"{whole:.2f} to {smaller:.2f}, {smaller / whole:.2f} times"


def shares_text(size: Size) -> str:
    """Which shares of a model are left, in words."""
    return f"{percent(size.macs, 1)} of the multiplications and {percent(size.parameters, 1)} of the parameters"


def _left_text(size: Size) -> str:
    words = shares_text(size)
    if "1" in size.milliseconds:
        ratios = [smaller / whole for whole, smaller in (size.milliseconds[batch] for batch in ("1", "32"))]
        words += f", and takes {ratios[0]:.2f} times as long for one image, {ratios[1]:.2f} times for 32"
    return words


def largest_reduction(sizes: Mapping[str, Size], outcomes: Mapping[str, str], margin: float) -> str:
    """Which is the smallest model that is equivalent to the baseline's, in a sentence; one as large is no reduction."""
    smaller = [arm for arm, size in sizes.items() if size.macs < 1]
    equal = [arm for arm in smaller if outcomes[arm] in ("equivalent", "identical")]
    if not smaller:
        return "None of the models became smaller: nothing could be taken out, and the files of the stages say why."
    if not equal:
        return f"None of the smaller models is shown to be equivalent to {BASELINE} within {margin:g}."
    best = min(equal, key=lambda arm: sizes[arm].macs)
    return f"The largest reduction that is equivalent within {margin:g} is {best}, with {_left_text(sizes[best])}."


def _pictures(run: FinishedRun, sizes: Mapping[str, Size], verdicts: Mapping[str, Any]) -> list[tuple[str, str]]:
    metric = run.summary["rule"]["metric"]
    if BASELINE not in run.arms or run.summary["arms"][BASELINE][metric]["mean"] is None:
        return []
    write_figure(run.folder / _PICTURE, _trade_off(run, sizes, verdicts, metric))
    return [(_PICTURE, f"Test {title_of(metric)} over the multiplications that are left")]


def _trade_off(run: FinishedRun, sizes: Mapping[str, Size], verdicts: Mapping[str, Any], metric: str) -> Figure:
    """A line per way over the shares that are left; each point with the interval of its difference to the baseline."""
    figure, axes = new_figure(3.6)
    level, margin = run.summary["arms"][BASELINE][metric]["mean"], run.summary["rule"]["margin"]
    axes.axhspan(level - margin, level + margin, color="#DDE7EE", zorder=0, label=f"baseline ± {margin:g}")
    axes.axhline(level, color=GREY, linewidth=1.2, linestyle="--")
    ways: dict[str, list[str]] = {}
    for arm in sizes:
        ways.setdefault(reduction_of(arm).way, []).append(arm)
    for number, (way, arms) in enumerate(ways.items()):
        look, shift = line_look(number, marker=True), 0.3 * (number - (len(ways) - 1) / 2)
        arms = sorted(arms, key=lambda arm: sizes[arm].macs)
        xs = [100 * sizes[arm].macs + shift for arm in arms]
        axes.plot(xs, [run.summary["arms"][arm][metric]["mean"] for arm in arms], label=way, markersize=5, **look)
        for x, arm in zip(xs, arms, strict=True):
            if verdicts[arm]["low"] is not None:
                ends = level + verdicts[arm]["low"], level + verdicts[arm]["high"]
                axes.plot([x, x], ends, color=look["color"], linewidth=1, alpha=0.8)
    left, right = axes.get_xlim()
    room = max(0.0, (_NARROWEST - (right - left)) / 2)
    axes.set_xlim(left - room, right + room)  # points side by side are not to look as if they lay apart
    axes.set_xlabel("multiplications left, %")
    axes.set_ylabel(f"test {title_of(metric)}")
    axes.grid(alpha=0.3)
    axes.set_title(run.name, fontsize="medium")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    return figure
