"""The run folder: who may use it, and under which settings a run may go on."""

import platform
from dataclasses import Field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..data.images import ImageData
from ..errors import InputError
from ..files import PARTIAL, check_links, read_json, sha256_of, write_csv, write_json
from ..options import MARGIN_CHOSEN, Options, as_plain
from .config import read_config, write_config
from .layout import CONFIG, DATA, LOCK, VERSIONS
from .looks import read_looks

_PACKAGES = (
    "inmerge_optim",
    "torch",
    "torchvision",
    "timm",
    "accelerate",
    "numpy",
    "scikit-learn",
    "scipy",
    "statsmodels",
    "medmnist",
    "datasets",
    "pillow",
)
# The data are compared by their checksums, wherever they come from.
_MAY_DIFFER = {"resume", "config", "output", "data_dir", "workers", "tracker"}
_MAY_DIFFER |= {
    "hub_revision",
    "prepared_dir",
    "prepare_workers",
    "allow_missing",
    "csv",
    "split_file",
    "allow_other_versions",
}
_MAY_DIFFER |= {MARGIN_CHOSEN}
_MAY_DIFFER |= {"engine", "ray_address", "cpus_per_task", "gpus_per_task"}  # threads are compared by themselves
_MAY_GROW = ("seeds", "arms")


def check_run_folder(run: Path, options: Options, launch: dict[str, Any]) -> None:
    """Refuse a folder that holds something else, or a run of other settings or that lacks a part."""
    if not (run / CONFIG).exists():
        _check_empty(run)
        return
    if not options.resume:
        raise InputError(f"--output {run} holds a run: pass --resume to go on with it, or choose another folder")
    check_links(run)
    if not (run / VERSIONS).exists() and any(run.glob("seed_*")):
        raise InputError(f"{run} has lost its {VERSIONS}: put it back, or choose another --output")
    begun, now = read_config(run), as_plain(options)
    differing = {key for key in begun.keys() | now.keys() if begun.get(key) != now.get(key)} - _MAY_DIFFER
    differing -= {key for key in _MAY_GROW if set(begun.get(key, [])) <= set(now[key])}
    differing -= {
        option.name for option in fields(options) if option.name not in begun and _is_default(options, option)
    }
    if options.checkpoint and _has_begun_with_checkpoint(run):
        differing.discard("checkpoint")  # wherever it lies now
        _check_same_checkpoint(run, options.checkpoint)
    _check_nothing_left_out(run, now)
    settings = [f"--{key.replace('_', '-')} {begun.get(key)}, not {now.get(key)}" for key in sorted(differing)]
    launched = read_json(run / VERSIONS).get("launch", {}) if (run / VERSIONS).exists() else launch
    settings += [
        f"{key} {launched.get(key)}, not {value}" for key, value in launch.items() if launched.get(key) != value
    ]
    if settings:
        raise InputError(
            f"--resume: the run in {run} was begun with {'; '.join(settings)}: give the same settings, or choose "
            "another --output"
        )


def _is_default(options: Options, option: Field[Any]) -> bool:
    """Whether an option that the run's version didn't have yet is as it was then."""
    return getattr(options, option.name) == option.default


def _check_nothing_left_out(run: Path, now: dict[str, Any]) -> None:
    """Refuse to judge a run anew on a part of what it was judged on."""
    for look in read_looks(run)[-1:]:
        for key in _MAY_GROW:
            missing = [value for value in look[key] if value not in now[key]]
            if missing:
                raise InputError(
                    f"--resume: the run in {run} has {key} {_words(look[key])}, and --{key} {_words(now[key])} leaves "
                    f"out {_words(missing)}: name those that are there, and any further ones"
                )


def _words(values: list[Any]) -> str:
    return " ".join(map(str, values))


def _check_empty(run: Path) -> None:
    ours = {LOCK, CONFIG + PARTIAL}  # of this launch, and of one that was killed before its run began
    if run.is_file():
        raise InputError(f"--output {run} is a file: give the path of a folder")
    if run.exists() and any(entry.name not in ours for entry in run.iterdir()):
        raise InputError(f"--output {run} is not empty, and holds no run, as it has no {CONFIG}: choose another folder")


def check_same_data(run: Path, data: ImageData) -> None:
    """Refuse to go on with a run on other files than it was begun with."""
    path = run / VERSIONS
    begun = read_json(path).get("data", {}) if path.exists() else data.files
    if begun != data.files:
        raise InputError(f"--resume: the run in {run} was begun with the files {begun}, not {data.files} (by checksum)")


def _has_begun_with_checkpoint(run: Path) -> bool:
    """Whether the run knows what was in its --checkpoint."""
    return (run / VERSIONS).exists() and "checkpoint" in read_json(run / VERSIONS)


def _check_same_checkpoint(run: Path, checkpoint: Path) -> None:
    """Refuse to go on with a run from other weights than it was begun with, whatever their file is called."""
    begun, now = read_json(run / VERSIONS)["checkpoint"], sha256_of(checkpoint)
    if begun != now:
        raise InputError(
            f"--resume: the run in {run} was begun with a --checkpoint of sha256 {begun}, and {checkpoint} has "
            f"{now}: give the file that it was begun with, or choose another --output"
        )


def check_same_versions(run: Path, options: Options) -> None:
    """Refuse to go on with a run under other versions of what its numbers depend on, unless that is allowed."""
    path = run / VERSIONS
    if options.allow_other_versions or not path.exists():
        return
    begun, now = read_json(path)["packages"], package_versions()
    other = [f"{name} {begun[name]}, not {now[name]}" for name in begun if name in now and begun[name] != now[name]]
    if other:
        raise InputError(
            f"--resume: the run in {run} was begun with {'; '.join(other)}: install those, choose another --output, or "
            "go on with --allow-other-versions, which records both"
        )


def write_settings(
    run: Path, options: Options, launch: dict[str, Any], data: ImageData, model: dict[str, Any] | None = None
) -> None:
    """config.yaml and versions.json, once, at the start of a run, and data.json with the tables of the data.

    Args:
        model: which weights it is begun with, as far as that is known.
    """
    if not (run / CONFIG).exists():  # the first of all
        write_config(run, options)
    task: dict[str, Any] = {"name": data.name, "task": data.task.kind, "classes": list(data.task.classes)}
    if data.task.kind == "binary":
        task["positive"] = data.task.positive
    kept = {"preprocessing": data.preprocessing, "splits": data.counts}
    write_json(run / DATA, {**task, **data.description, **kept})
    for name, (header, rows) in data.tables.items():
        write_csv(run / name, header, rows)
    if (run / VERSIONS).exists():
        _record_other_versions(run)
        return
    versions: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(),
    }
    if options.checkpoint:
        versions["checkpoint"] = sha256_of(options.checkpoint)
    write_json(run / VERSIONS, {**versions, "model": model or {}, "launch": launch, "data": data.files})


def _record_other_versions(run: Path) -> None:
    """Beside the versions that a run was begun with, each other set of them that it went on with."""
    versions, now = read_json(run / VERSIONS), package_versions()
    known = [versions["packages"], *versions.get("resumed_with", [])]
    if now not in known:
        write_json(run / VERSIONS, {**versions, "resumed_with": [*known[1:], now]})


def package_versions() -> dict[str, str]:
    """Of what the numbers depend on, as far as it is installed."""
    return {name: found for name in _PACKAGES if (found := _version(name))}


def launch_of(accelerator: Accelerator) -> dict[str, Any]:
    """What, beside the options, the numbers depend on to the bit."""
    return {
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "device": accelerator.device.type,
        "precision": accelerator.mixed_precision,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
