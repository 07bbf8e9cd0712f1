"""Repeat a study from its config, and compare it with what was recorded of it.

python studies/run.py text_against_code --data-dir DIR --checkpoint squeezenet1_1.safetensors
python studies/run.py --record text_against_code runs/text_against_code
python studies/run.py --compare text_against_code runs/text_against_code
python studies/run.py --table text_against_code

The first runs the recipe with studies/NAME/config.yaml and any further options, or goes on where it was stopped, scores
the kept models on corrupted images, and compares. Exit code 1: a figure lies outside of its expected range.
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STUDIES = Path(__file__).parent
sys.path.insert(0, str(STUDIES.parent / "recipes"))

import medmnist2d  # noqa: E402
import robustness  # noqa: E402
from finetune.errors import InputError, check_names, exit_on_input_error  # noqa: E402
from finetune.files import read_json, write_json  # noqa: E402
from finetune.options import BASELINE  # noqa: E402
from finetune.runs.finished import FinishedRun  # noqa: E402
from finetune.runs.layout import ROBUSTNESS, SUMMARY  # noqa: E402
from scipy import special  # noqa: E402

CONFIG, RECORDED = "config.yaml", "recorded.json"
METRICS = ("auroc", "balanced_accuracy", "log_loss", "log_loss_scaled", "brier", "ece", "ece_scaled")
COMPARED = ("auroc", "log_loss")
GENTLE = "merge_prob=0.05,merge_weight=0.95,similarity_threshold=q0.5"  # the pilot's settings, by their name there
LEVEL = 0.99  # of the range that the mean over other seeds lies in: tens of figures are compared
_SPREAD = ("mean", "low", "high", "p", "t_low", "t_high", "bootstrap_low", "bootstrap_high", "values")


def main(argv: list[str]) -> None:
    """Run, record or compare a study."""
    exit_on_input_error(lambda: _main(argv))


def _main(argv: list[str]) -> None:
    how = argv[0] if argv and argv[0] in ("--record", "--compare", "--table") else None
    name, *rest = (argv[1:] or [""]) if how else argv or [""]
    check_names("NAME", "study", [name], sorted(path.parent.name for path in STUDIES.glob(f"*/{CONFIG}")))
    recorded = STUDIES / name / RECORDED
    if how == "--table":
        if rest or not recorded.exists():
            raise InputError(f"--table {name} needs what is recorded of the study, and nothing else: --record it first")
        print(table(read_json(recorded)))
        return
    if how and len(rest) != 1:
        raise InputError(f"{how} {name} needs the run folder, and nothing else: such as {how} {name} runs/{name}")
    run = Path(rest[0]) if how else _run(name, rest)
    found = summary_of(FinishedRun(run))
    if how == "--record":
        write_json(recorded, found)
        print(f"{recorded} is what {run} found")
    elif not recorded.exists():
        print(f"\n{name} is planned, and nothing is recorded of it yet: --record {name} {run}")
    elif not compare(read_json(recorded), found):
        raise SystemExit(1)


def _run(name: str, options: list[str]) -> Path:
    """Run the study, or what is left of it; its run folder."""
    config, places = STUDIES / name / CONFIG, [word.partition("=")[0] for word in options]
    output = ["--output", f"runs/{name}"] if "--output" not in places else []
    words = ["--config", str(config), "--resume", *output, *options]
    medmnist2d.main(words)
    given = " ".join(words).replace("--output=", "--output ").split()
    run = Path(given[given.index("--output") + 1])
    robustness.main([str(run)])
    return run


def summary_of(run: FinishedRun) -> dict[str, Any]:
    """What is kept of a finished run: figures of its arms, clean and corrupted, differences, verdicts, and ranges."""
    summary = run.summary
    corrupted = read_json(run.folder / ROBUSTNESS / SUMMARY) if (run.folder / ROBUSTNESS / SUMMARY).exists() else {}
    return {
        "seeds": summary["seeds"],
        "rule": summary["rule"],
        "diverged": summary["diverged"],
        "versions": run.versions["packages"],
        "launch": run.versions["launch"],
        "minutes": round(_minutes(run), 1),
        "arms": {arm: {name: figures[name] for name in METRICS} for arm, figures in summary["arms"].items()},
        "differences": _differences(summary["differences"]),
        "contrasts": _differences(summary["contrasts"]),
        "verdicts": [_verdict(found) for found in summary["verdicts"]],
        "merged": {arm: _merged(layers) for arm, layers in summary["merges"].items()},
        "kernels": {arm: _kernels(layers) for arm, layers in summary["kernels"].items()},
        "tuning": [section.text for section in run.sections if section.title == "Tuning"],
        "corrupted": corrupted.get("corrupted", {}),
        "corrupted_verdicts": [
            _verdict(found) for found in corrupted.get("verdicts", []) if not found["endpoint"].startswith("clean")
        ],
        "expected": {name: expected_range(values) for name, values in _compared(summary)},
    }


def _verdict(found: dict[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in ("arm", "reference", "outcome", "mean", "low", "high", "sentence")}


def _differences(found: dict[str, Any]) -> dict[str, Any]:
    return {
        arm: {name: {key: figures[name][key] for key in _SPREAD} for name in METRICS} for arm, figures in found.items()
    }


def _merged(layers: dict[str, dict[str, int]]) -> dict[str, int]:
    return {key: sum(count[key] for count in layers.values()) for key in ("drawn", "merged")}


def _kernels(layers: dict[str, Any]) -> dict[str, float]:
    """Norm and effective rank of the merged layers' kernels over the baseline's, mean over layers and seeds."""
    return {
        key: sum(found[key]["mean"] for found in layers.values()) / len(layers) for key in ("norm", "effective_rank")
    }


def _minutes(run: FinishedRun) -> float:
    """Of training, without evaluation, on a machine that may have had other work."""
    files = run.folder.glob("seed_*/*/timing.json")
    return sum(sum(read_json(file)["training_seconds"]) for file in files) / 60


def _compared(summary: dict[str, Any]) -> Iterator[tuple[str, list[float]]]:
    """The figures of a repeated run that are compared, each with its values over seeds."""
    for kind in ("arms", "differences"):
        for arm, figures in summary[kind].items():
            for metric in COMPARED:
                minus = " - baseline" if kind == "differences" else ""
                yield f"{metric} {arm}{minus}", [value for value in figures[metric]["values"] if value is not None]


def expected_range(values: list[float]) -> dict[str, float]:
    """The mean over seeds, and where that of as many other seeds lies with a probability of LEVEL (Student's t)."""
    count = len(values)
    mean = sum(values) / count
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    reach = float(special.stdtrit(count - 1, (1 + LEVEL) / 2)) * deviation * math.sqrt(2 / count)
    return {"mean": mean, "low": mean - reach, "high": mean + reach}


def compare(recorded: dict[str, Any], found: dict[str, Any]) -> bool:
    """Print each figure beside the recorded one and its range; whether all lie inside."""
    width = max(map(len, recorded["expected"]))
    outside = 0
    print(f"\n{'':{width}}     found  recorded  expected range")
    for name, expected in recorded["expected"].items():
        mean = found["expected"].get(name, {}).get("mean", math.nan)
        inside = expected["low"] <= mean <= expected["high"]
        outside += not inside
        line = f"{name:{width}}  {mean:8.4f}  {expected['mean']:8.4f}  [{expected['low']:.4f}, {expected['high']:.4f}]"
        print(line if inside else f"{line}  OUTSIDE")
    print(f"{outside} of {len(recorded['expected'])} figures lie outside of their range")
    return not outside


def table(recorded: dict[str, Any]) -> str:
    """What is recorded, as the tables of docs/results.md: what is judged, and how sure the arms are of themselves."""
    judged, sure = [], []
    corrupted = {_key(found): found for found in recorded["corrupted_verdicts"]}
    clean = {_key(found): found for found in recorded["verdicts"]}
    for arm, figures in recorded["arms"].items():
        bad, pair = recorded["corrupted"].get(arm, {}).get("auroc"), (arm, BASELINE)
        after = [_mean(bad) if bad else "", *_outcome(corrupted.get(pair))]
        judged.append([_name(arm), _mean(figures["auroc"]), *_outcome(clean.get(pair)), *after])
        sure.append([_name(arm), *_confidence(figures, recorded["differences"].get(arm))])
        sure[-1].append(f"{recorded['kernels'][arm]['norm']:.3f}" if arm in recorded["kernels"] else "")
    for arm, control in (pair for pair in clean if pair[1] != BASELINE):
        name = f"{_name(arm)} less {_name(control)}"
        judged.append([name, "", *_outcome(clean[arm, control]), "", "", ""])
        sure.append([name, *_confidence(None, recorded["contrasts"][f"{arm} - {control}"]), ""])
    minus, scaled = f"minus {BASELINE}", "scaled, minus"
    header = ["arm", "AUROC", minus, "verdict", "AUROC, corrupted", minus, "verdict"]
    columns = len(header) if corrupted else 4
    first = _markdown(header[:columns], [cells[:columns] for cells in judged])
    second = _markdown(["arm", "log loss", minus, scaled, "ECE", minus, scaled, "norm"], sure)
    return f"{first}\n\n{second}"


def _confidence(figures: dict[str, Any] | None, differences: dict[str, Any] | None) -> list[str]:
    """Log loss and ECE, each with its difference, and that after temperature scaling."""
    cells = []
    for metric in ("log_loss", "ece"):
        cells.append(_mean(figures[metric]) if figures else "")
        cells += [_interval(differences[name]) if differences else "" for name in (metric, f"{metric}_scaled")]
    return cells


def _key(verdict: dict[str, Any]) -> tuple[str, str]:
    return verdict["arm"], verdict["reference"]


def _name(arm: str) -> str:
    base, _, settings = arm.partition("@")
    return f"{base}, gentle" if settings == GENTLE else arm


def _mean(figures: dict[str, Any]) -> str:
    return f"{figures['mean']:.3f} ± {figures['std']:.3f}"


def _interval(found: dict[str, Any]) -> str:
    return f"{found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"


def _outcome(verdict: dict[str, Any] | None) -> list[str]:
    return [_interval(verdict), verdict["outcome"]] if verdict else ["", ""]


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


if __name__ == "__main__":
    main(sys.argv[1:])
