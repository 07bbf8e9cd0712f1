"""The run folder: who may use it, and under which settings a run may go on."""

import platform
from dataclasses import Field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator

from ..data.images import ImageData
from ..errors import InputError
from ..files import write_json, write_text
from ..options import MARGIN_CHOSEN, Options, as_plain
from .layout import CONFIG, DATA, VERSIONS
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
_MAY_DIFFER |= {"hub_revision", "prepared_dir", "prepare_workers", "allow_missing", MARGIN_CHOSEN}
_MAY_GROW = ("seeds", "arms")


def check_run_folder(run: Path, options: Options, launch: dict[str, Any]) -> None:
    """Refuse a folder that holds something else, or a run of other settings."""
    if run.exists() and not run.is_dir():
        raise InputError(f"--output {run} is a file: give the path of a folder")
    if not options.resume:
        if run.exists() and any(run.iterdir()):
            raise InputError(
                f"--output {run} is not empty: pass --resume to go on with that run, or choose another folder"
            )
        return
    if not (run / CONFIG).exists():
        return
    begun, now = _read_yaml(run / CONFIG), as_plain(options)
    differing = {key for key in begun.keys() | now.keys() if begun.get(key) != now.get(key)} - _MAY_DIFFER
    differing -= {key for key in _MAY_GROW if set(begun.get(key, [])) <= set(now[key])}
    differing -= {
        option.name for option in fields(options) if option.name not in begun and _is_default(options, option)
    }
    _check_nothing_left_out(run, now)
    settings = [f"--{key.replace('_', '-')} {begun.get(key)}, not {now.get(key)}" for key in sorted(differing)]
    launched = _read_yaml(run / VERSIONS).get("launch", {}) if (run / VERSIONS).exists() else launch
    settings += [
        f"{key} {launched.get(key)}, not {value}" for key, value in launch.items() if launched.get(key) != value
    ]
    if settings:
        raise InputError(
            f"--resume: the run in {run} was begun with {'; '.join(settings)}: give the same settings, or choose "
            "another --output"
        )


def _is_default(options: Options, option: Field) -> bool:
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


def check_same_data(run: Path, data: ImageData) -> None:
    """Refuse to go on with a run on other files than it was begun with."""
    path = run / VERSIONS
    begun = _read_yaml(path).get("data", {}) if path.exists() else data.files
    if begun != data.files:
        raise InputError(f"--resume: the run in {run} was begun with the files {begun}, not {data.files} (by checksum)")


def write_settings(run: Path, options: Options, launch: dict[str, Any], data: ImageData) -> None:
    """data.json, and once, at the start of a run, versions.json and config.yaml."""
    run.mkdir(parents=True, exist_ok=True)
    task = {"name": data.name, "task": data.task.kind, "classes": list(data.task.classes)}
    write_json(run / DATA, {**task, **data.description})
    if (run / CONFIG).exists():
        return
    versions = {"python": platform.python_version(), "platform": platform.platform(), "packages": package_versions()}
    write_json(run / VERSIONS, {**versions, "launch": launch, "data": data.files})
    write_text(run / CONFIG, yaml.safe_dump(as_plain(options), sort_keys=False))


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


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(
            f"{path} can't be read ({error}): the run can't be resumed, choose another --output"
        ) from error
    return content or {}
