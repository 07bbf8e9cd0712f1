"""What merging did to the weights of each layer."""

from typing import Any

from ..judging.formatting import percent
from ..judging.metrics import mean_of_known
from ..judging.summary import total_merges
from ..options import BASELINE
from ..runs.finished import FinishedRun
from ..runs.kernels import FIGURES
from ..runs.sections import Section
from ..training.arms import arm_of
from .figures import pictures
from .style import number_text, share_text

_SHORTER, _AS_VARIED = 0.02, 0.01
_FORMS = {"displacement": "{:.2g}", "norm": "{:.3f}", "effective_rank": "{:.3f}"}
_TEXT = f"""\
Pairs of kernels drawn and merged in the arms' epochs, over all seeds, and the mean cosine of those merged. \
Displacement: how far the merges of one step moved a layer's weights, over their norm (0.01: by a hundredth); measured \
in the first step of each epoch, the mean over epochs and seeds. Norm: the mean norm of a layer's kernels in the kept \
model over that in the {BASELINE}'s. Effective rank, likewise: over how many dimensions they spread, whatever their \
common scale. Merging that draws kernels together lowers both. All: the mean over layers."""


def merges_section(run: FinishedRun) -> Section:
    """A row per merging arm and layer, and a sentence on each arm that did little but shorten its kernels."""
    if not run.merging_arms:
        return Section("What merging did to the weights", "No arm merges.")
    rows, totals, sentences = [], [], []
    for arm in run.merging_arms:
        layers, kernels, table = run.summary["merges"][arm], run.summary["kernels"][arm], run.merges(arm)
        total, overall = total_merges(layers), _over_layers(kernels)
        for layer, count in [*layers.items(), ("all", total)]:
            merged = table if layer == "all" else table[table["layer"] == layer]
            cosine = (merged["mean_cosine"] * merged["merged"]).sum() / count["merged"] if count["merged"] else None
            found = overall if layer == "all" else _means(kernels.get(layer, {}))
            counts = [f"{count['drawn']:,}", f"{count['merged']:,}", share_text(count)]
            figures = [number_text(found.get(figure), _FORMS[figure]) for figure in FIGURES]
            rows.append([arm, layer, *counts, number_text(cosine, "{:.3f}"), *figures])
        totals.append(total)
        sentences.append(norm_sentence(arm, overall))
    text = _TEXT
    if controls := [arm for arm in run.merging_arms if arm_of(arm).control]:
        text += f" Of {', '.join(controls)} these would have merged: a change of their size took the place of each."
    if all(1000 * count["merged"] < count["drawn"] for count in totals):
        text += " Fewer than one in a thousand merged: these runs are nearly plain baselines."
    text = "\n\n".join([text, *(sentence for sentence in sentences if sentence)])
    counted = ("arm", "layer", "drawn", "merged", "share", "mean cosine", "displacement")
    header = (*counted, f"norm over {BASELINE}'s", f"rank over {BASELINE}'s")
    return Section("What merging did to the weights", text, header, rows, pictures(run, "merge_rates"))


def norm_sentence(arm: str, figures: dict[str, float | None]) -> str | None:
    """What there is to say where kernels became shorter by _SHORTER or more, and stayed as varied by _AS_VARIED."""
    norm, rank = figures["norm"], figures["effective_rank"]
    if norm is None or rank is None or norm > 1 - _SHORTER or abs(rank - 1) > _AS_VARIED:
        return None
    return (
        f"Of {arm} the norm explains it: its kernels are {percent(1 - norm, 1)} shorter than the {BASELINE}'s and as "
        f"varied (effective rank {number_text(100 * (rank - 1), '{:+.1f}')} %), as weight decay would make them."
    )


def _over_layers(kernels: dict[str, Any]) -> dict[str, float | None]:
    of_layers = [_means(layer) for layer in kernels.values()]
    return {figure: mean_of_known([found[figure] for found in of_layers]) for figure in FIGURES}


def _means(layer: dict[str, Any]) -> dict[str, float | None]:
    return {figure: found["mean"] for figure, found in layer.items()}
