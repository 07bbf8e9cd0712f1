"""What a run can fill of the checklists for articles on medical AI; the rest is for whoever writes one."""

from collections.abc import Callable

from ..runs.finished import FinishedRun
from ..runs.sections import Section
from .verdicts import origin_text

UNKNOWN = "not known to this run"


def checklist_section(run: FinishedRun) -> Section:
    """A row per item: which checklist asks for it, and what the run knows of it."""
    rows = [[name, asked, (found(run) if found else None) or UNKNOWN] for name, asked, found in _ITEMS]
    text = (
        "Items of the checklists CLAIM (2024 update) and TRIPOD+AI (2024) that are about data, models and figures, in "
        "our words. The others are about the article. What is not known to this run is for whoever writes it."
    )
    return Section("Checklist", text, ("item", "asked for by", "this run"), rows)


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
    return "see Images in several splits" if "near_twins" in run.description else None


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


_BOTH = "CLAIM, TRIPOD+AI"
_Item = tuple[str, str, Callable[[FinishedRun], str | None] | None]
_ITEMS: list[_Item] = [
    ("prospective or retrospective", _BOTH, None),
    ("data sources", _BOTH, _data),
    ("who was included", _BOTH, None),
    ("preprocessing", _BOTH, _preprocessing),
    ("de-identification", "CLAIM", None),
    ("missing data", _BOTH, _lacking),
    ("acquisition of the images", _BOTH, None),
    ("reference standard and who set it", _BOTH, None),
    ("how splits were made", _BOTH, _partition),
    ("what the splits don't share", _BOTH, _disjoint),
    ("sample size", _BOTH, _sizes),
    ("model", _BOTH, _model),
    ("software", _BOTH, _software),
    ("initialisation", _BOTH, lambda run: origin_text(run)),
    ("training", _BOTH, _training),
    ("selection of the final model", _BOTH, lambda run: "the epoch that is best on validation, per seed and arm"),
    ("ensembling", _BOTH, lambda run: "none"),
    ("class imbalance", "TRIPOD+AI", _imbalance),
    ("metrics", _BOTH, lambda run: f"see The arms; primary: {run.rule.metric}, fixed before the run"),
    ("uncertainty", _BOTH, lambda run: "intervals over seeds and test cases, see Verdict"),
    ("robustness", _BOTH, None),
    ("explanations", "CLAIM", _explanation),
    ("fairness", _BOTH, _subgroups),
    ("external test", _BOTH, None),
    ("registration and protocol", _BOTH, None),
    ("ethics", "TRIPOD+AI", None),
    ("patients per split", _BOTH, lambda run: "see The trial"),
    ("demographics per split", _BOTH, None),
    ("diagnostic performance", _BOTH, lambda run: "see Sensitivity and specificity"),
    ("calibration", _BOTH, lambda run: "see Calibration"),
    ("failures", "CLAIM", None),
    ("code", _BOTH, lambda run: f"inmerge_optim {run.versions['packages'].get('inmerge_optim', '')}".strip()),
    ("funding", _BOTH, None),
]
