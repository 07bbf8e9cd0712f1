"""What the recipe for ChestX-ray14 reports beyond the trial's own figures."""

from collections.abc import Sequence
from typing import Any

from ..data.images import BoxedFinding, ImageData
from ..judging.formatting import percent
from ..judging.intervals import LEVEL
from ..options import BASELINE, Options
from ..runs.finished import FinishedRun
from ..runs.sections import Section
from ..sources.nih_tree import BOX_FILE
from .localisation import localisation_section
from .style import number_text
from .subgroups import subgroup_section

# The paper's Table 1 as it is printed: InMerge with VGG19, and the means of the peers that stand there.
_PAPER = {
    "Atelectasis": ".805",
    "Cardiomegaly": ".895",
    "Effusion": ".881",
    "Infiltration": ".710",
    "Mass": ".842",
    "Nodule": ".750",
    "Pneumonia": ".770",
    "Pneumothorax": ".878",
    "Consolidation": ".801",
    "Edema": ".888",
    "Emphysema": ".915",
    "Fibrosis": ".818",
    "Pleural_Thickening": ".773",
    "Hernia": ".903",
}
_PAPER_MEAN = ".830"
_PEERS = {
    "U-DCNN": ".745",
    "LSTM": ".761",
    "AGCL": ".803",
    "CheXNet": ".807",
    "DNet": ".807",
    "CRAL": ".816",
    "CAN": ".817",
    "DualCheXNet": ".823",
    "LLAGnet": ".824",
}


def chestxray_sections(
    run: FinishedRun, options: Options, data: ImageData, findings: Sequence[BoxedFinding] | None
) -> list[Section]:
    """The table beside the paper's, the subgroups where they are known, and localisation.

    Args:
        findings: from NIH's list of boxes; None: there is none.
    """
    sections = [paper_section(run, data)]
    if data.test.subgroups:
        sections.append(subgroup_section(run, data))
    if findings is None:
        text = (
            f"Not done: there is no {BOX_FILE} in --data-dir. NIH distributes it beside the images; put it beside the "
            "label file. Data sets from --hub come without boxes."
        )
        sections.append(Section("Localisation", text))
    else:
        sections.append(localisation_section(run, options, data, findings))
    return sections


def paper_section(run: FinishedRun, data: ImageData) -> Section:
    """A row per disease and for the mean, each arm's AUROC with its interval and its AUPRC, beside the paper's row."""
    arms = sorted(run.arms, key=lambda arm: arm != BASELINE)
    summary = run.summary

    def figures(of_arm: dict[str, dict[str, Any]]) -> list[str | None]:
        aurocs = [_auroc_text(of_arm[arm]["auroc"]) for arm in arms]
        return [*aurocs, *(number_text(of_arm[arm]["auprc"]["mean"], "{:.3f}") for arm in arms)]

    rows = [
        [name.replace("_", " "), *figures({arm: summary["per_class"][arm][name] for arm in arms}), printed]
        for name, printed in _PAPER.items()
    ]
    rows.append(["Mean", *figures(summary["arms"]), _PAPER_MEAN])
    rows += [[f"Mean, {peer}", *[None] * (2 * len(arms)), printed] for peer, printed in _PEERS.items()]
    return Section(
        title="Beside the paper",
        text=_text(run, data),
        header=["", *(f"AUROC, {arm}" for arm in arms), *(f"AUPRC, {arm}" for arm in arms), "AUROC, paper's Table 1"],
        rows=rows,
    )


def _auroc_text(auroc: dict[str, Any]) -> str | None:
    mean, low, high = (number_text(auroc[key], "{:.3f}") for key in ("mean", "bootstrap_low", "bootstrap_high"))
    return mean if low is None else f"{mean} [{low}, {high}]"


def _text(run: FinishedRun, data: ImageData) -> str:
    images, patients = len(data.test), len(set(data.test.patients))
    seeds = len(run.seeds)
    return (
        f"This run: {run.options['model']} at {data.size} x {data.size} pixels on {images:,} test images of "
        f"{patients:,} patients (the official test list has 25,596 of 2,797), "
        + ("one seed" if seeds == 1 else f"means over {seeds} seeds")
        + f", at the epoch that is best on validation. In brackets: {percent(LEVEL)} bootstrap intervals over "
        "patients, which is test-set noise, given these models. A mean leaves out diseases that are not scored.\n\n"
        "The last column is copied from the paper: the diseases and the mean are InMerge with VGG19, and below stand "
        "the means of the peers that its table names, none of them run here. It is for orientation and no mark to "
        "pass. The paper reports the official split, yet which diseases come out well in its row fits models trained "
        "and tested on random splits better, where the test set is easier: strong plain CNNs reach .80 to .825 on the "
        "official test list. What this run can tell is the difference between its own arms, on the same images."
    )
