"""What a run can fill of the checklists for articles on medical AI; the rest is for whoever writes one."""

from collections.abc import Callable

from ..options import BASELINE
from ..runs.finished import FinishedRun
from ..runs.sections import Section
from .verdicts import origin_text

UNKNOWN = "not known to this run"


def checklist_section(run: FinishedRun) -> Section:
    """A row per item: its numbers in both checklists, and what the run knows of it."""
    rows = [[name, claim, tripod, (found(run) if found else None) or UNKNOWN] for name, claim, tripod, found in _ITEMS]
    text = (
        "Items of CLAIM (2024 update) and of TRIPOD+AI (2024) that a run may answer, in our words, by their numbers "
        "there. The other items are about the article. What a run doesn't know, no default stands for."
    )
    return Section("Checklist", text, ("item", "CLAIM", "TRIPOD+AI", "this run"), rows)


def _preprocessing(run: FinishedRun) -> str | None:
    found = run.description.get("preprocessing")
    if found is None:
        return None
    colours = "grey" if found["grey"] else "in colour"
    middle = f", the middle {found['image_size']} of them seen" if found["side"] > found["image_size"] else ""
    return f"{found['fit']} to {found['side']} x {found['side']} pixels{middle}, {colours}; window: {found['window']}"


def _data(run: FinishedRun) -> str:
    names = ", ".join(run.versions["data"]) or "no file"
    return f"{run.description['name']}; {names}, with checksums under Settings and versions"


def _lacking(run: FinishedRun) -> str | None:
    left_out = run.description.get("left_out")
    return None if left_out is None else f"{len(left_out):,} images that could not be read were left out"


def _partition(run: FinishedRun) -> str:
    seed = f"split seed {run.options['split_seed']}"
    fractions = {name: run.options[name] for name in ("val_fraction", "test_fraction") if name in run.options}
    shares = "".join(f", {name.replace('_', ' ')} {value:g}" for name, value in fractions.items())
    return f"{seed}{shares}; as the source gives it where it does"


def _disjoint(run: FinishedRun) -> str | None:
    patients = run.predictions[BASELINE][0].patients is not None
    return "patients are known; see the trial on what lies in several splits" if patients else None


def _sizes(run: FinishedRun) -> str | None:
    splits = run.description.get("splits", {})
    return ", ".join(f"{part} {counts['images']:,}" for part, counts in splits.items()) or None


def _model(run: FinishedRun) -> str:
    return f"{run.options['model']} of timm, {len(run.task.classes)} outputs, in_chans {run.options['in_chans']}"


def _training(run: FinishedRun) -> str:
    options = run.options
    return (
        f"{options['epochs']} + {options['inmerge_epochs']} epochs, {options['opt']}, batch {options['batch_size']}, "
        f"learning rate {options['lr']:g} ({options['sched']}); all under Settings and versions"
    )


def _software(run: FinishedRun) -> str:
    return ", ".join(f"{name} {found}" for name, found in run.versions["packages"].items())


def _imbalance(run: FinishedRun) -> str:
    return "classes weighed by how rare they are" if run.options.get("class_weights") else "nothing was done about it"


def _subgroups(run: FinishedRun) -> str | None:
    return "see Subgroups" if any(section.title == "Subgroups" for section in run.sections) else None


def _explanation(run: FinishedRun) -> str | None:
    done = any(section.title == "Localisation" and section.rows for section in run.sections)
    return "Grad-CAM, see Localisation" if done else None


_Item = tuple[str, str, str, Callable[[FinishedRun], str | None] | None]
_ITEMS: list[_Item] = [
    ("prospective or retrospective", "5", "5", None),
    ("data sources", "7", "5", _data),
    ("who was included", "8", "6", None),
    ("preprocessing", "9", "7", _preprocessing),
    ("de-identification", "11", "", None),
    ("missing data", "12", "11", _lacking),
    ("acquisition of the images", "13", "9", None),
    ("reference standard and who set it", "14 to 18", "8", None),
    ("how splits were made", "19", "12", _partition),
    ("what the splits don't share", "20", "12", _disjoint),
    ("sample size and why", "21", "10", _sizes),
    ("model", "22", "22", _model),
    ("software", "23", "18", _software),
    ("initialisation", "24", "12", lambda run: origin_text(run)),
    ("training", "25", "12", _training),
    ("selection of the final model", "26", "12", lambda run: "the epoch that is best on validation, per seed and arm"),
    ("ensembling", "27", "12", lambda run: "none"),
    ("class imbalance", "", "13", _imbalance),
    ("metrics", "28", "12", lambda run: f"see The arms; primary: {run.rule.metric}, fixed before the run"),
    (
        "uncertainty",
        "29, 37",
        "23",
        lambda run: "intervals over seeds and test cases, see Verdict",
    ),
    ("robustness", "30", "12", None),
    ("explanations", "31", "", _explanation),
    ("fairness", "36", "14", _subgroups),
    ("external test", "33", "12", None),
    ("registration and protocol", "34, 42", "18", None),
    ("ethics", "", "17", None),
    ("patients per split", "35", "20", lambda run: "see The trial"),
    ("demographics per split", "36", "20", None),
    ("diagnostic performance", "38", "23", lambda run: "see Sensitivity and specificity"),
    ("calibration", "37", "23", lambda run: "see Calibration"),
    ("failures", "39", "", None),
    ("code", "43", "18", lambda run: f"inmerge_optim {run.versions['packages'].get('inmerge_optim', '')}".strip()),
    ("funding", "44", "18", None),
]
