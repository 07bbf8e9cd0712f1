"""Checkpoints of a stage, one per epoch, from which a killed run goes on to the same numbers.

A checkpoint is a folder `state/epoch_<n>`: accelerate's own state, the progress so far, and a manifest with the
checksum of each file. The best epoch's weights lie beside the checkpoints, once, as `state/best_<n>.safetensors`; the
manifests vouch for them too. A checkpoint is written under another name and renamed when it is whole, and the last two
are kept, so that a newest one that the disk spoiled can be told and passed over. The older one makes room before the
next is written.
"""

import os
import shutil
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import save_file

from ..errors import CheckpointWarning, InputError, first_line
from ..files import PARTIAL, flush, read_json, sha256_of, storage_errors, write_json
from ..runs.results import Progress

KEPT = 2
_MANIFEST = "manifest.json"
_PROGRESS = "progress.json"
_BESIDE = "../"


def checkpoint_folder(state: Path, epochs: int) -> Path:
    return state / f"epoch_{epochs:04d}"


def best_weights(state: Path, epoch: int) -> Path:
    """Where the weights of an epoch lie while it is the best."""
    return state / f"best_{epoch:04d}.safetensors"


def save_checkpoint(
    accelerator: Accelerator, state: Path, progress: Progress, new_best: dict[str, torch.Tensor] | None
) -> None:
    """Save everything that the next epoch depends on.

    Args:
        new_best: the weights of this epoch if it is the best so far; None: those that lie there are kept.
    """
    folder = checkpoint_folder(state, progress.epochs)
    partial = folder.with_name(folder.name + PARTIAL)
    main = accelerator.is_main_process
    # The waiting stays outside: what it raises when another process has ended is no error of the disk.
    if main:
        with storage_errors(folder):
            for path in (partial, folder):  # one that was passed over
                shutil.rmtree(path, ignore_errors=True)
            for old in _newest_first(state)[KEPT - 1 :]:
                shutil.rmtree(old)
            _remove_unused_weights(state)
            partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    with storage_errors(folder):
        accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if main:
        with storage_errors(folder):
            write_json(partial / _PROGRESS, asdict(progress))
            files = sorted(path for path in partial.iterdir() if path.is_file())
            for path in files:
                flush(path)
            checksums = {path.name: sha256_of(path) for path in files}
            write_json(partial / _MANIFEST, checksums | _save_best(state, partial, progress, new_best))
            os.replace(partial, folder)
            flush(state)
            _remove_unused_weights(state)
    accelerator.wait_for_everyone()


def _save_best(
    state: Path, partial: Path, progress: Progress, new_best: dict[str, torch.Tensor] | None
) -> dict[str, str]:
    """What the manifest says of the best weights: their checksum, where there are any.

    safetensors writes them itself, in a quarter of the time that they take as bytes. A file that a kill leaves of that
    lies in the partial checkpoint, and goes with it.
    """
    if new_best is not None:
        path = best_weights(state, progress.best_epoch)
        written = partial / path.name
        save_file({name: weight.cpu().contiguous() for name, weight in new_best.items()}, written)
        flush(written)
        os.replace(written, path)
        flush(state)
        return {_BESIDE + path.name: sha256_of(path)}
    before = checkpoint_folder(state, progress.epochs - 1) / _MANIFEST
    return _vouched_for(before) if before.exists() else {}


def _remove_unused_weights(state: Path) -> None:
    """Of epochs that no checkpoint takes for the best any more."""
    used = {name for folder in _newest_first(state) for name in _vouched_for(folder / _MANIFEST)}
    for path in state.glob("best_*"):
        if _BESIDE + path.name not in used:
            path.unlink()


def _vouched_for(manifest: Path) -> dict[str, str]:
    """The best weights in a manifest, by their place; none where it is damaged."""
    try:
        return {name: checksum for name, checksum in read_json(manifest).items() if name.startswith(_BESIDE)}
    except InputError:
        return {}


def load_checkpoint(accelerator: Accelerator, state: Path) -> Progress | None:
    """Load the newest whole checkpoint into what accelerate has prepared; its progress, or None when there is none."""
    found = [str(_newest_whole(state) or "")] if accelerator.is_main_process else [""]
    folder = broadcast_object_list(found)[0]
    if not folder:
        return None
    try:
        accelerator.load_state(folder)
        return Progress(**read_json(Path(folder) / _PROGRESS))
    except Exception as error:  # whatever torch and accelerate raise on files that others have written
        raise InputError(
            f"checkpoint {folder} can't be loaded ({first_line(error)}): delete it to go on from the one before"
        ) from error


def _newest_whole(state: Path) -> Path | None:
    for folder in _newest_first(state):
        problem = _damage(folder)
        if problem is None:
            return folder
        message = f"checkpoint {folder} is damaged ({problem}): going on from the one before"
        warnings.warn(message, CheckpointWarning, stacklevel=3)
    return None


def _newest_first(state: Path) -> list[Path]:
    folders = [path for path in state.glob("epoch_*") if path.suffix != PARTIAL]
    return sorted(folders, reverse=True)


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = read_json(folder / _MANIFEST)
        for name, checksum in manifest.items():
            if sha256_of(folder / name) != checksum:
                return f"{name} has another checksum"
    except (OSError, InputError) as error:
        return str(error)
    return None
