"""Models and their weights: by timm's name or from a factory, and from files that run no code.

The command line and the recipes build their models here, so that a name, a hub or a file is refused in the same words.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_state_dict
from torch import Tensor, nn

_SHOWN_KEYS = 3
_SAFE, _UNSAFE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


class ModelError(ValueError):
    """A model can't be built as it was asked for; the message is one sentence, which begins with its name."""


class CheckpointError(ValueError):
    """Weights can't be had or don't fit; the message is one sentence, which begins with the path of a file."""


def check_name(name: str) -> None:
    """Refuse a name that timm's registry doesn't have, offering near ones; with a source (hf_hub:) it isn't looked up.

    Raises:
        ModelError: the architecture, or its tag of pretrained weights, is unknown.
    """
    if ":" in name:
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise ModelError(f"{name} is unknown to timm{_near(architecture, timm.list_models())}")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise ModelError(f"{name}: timm's {architecture} has no weights {tag!r}, but {', '.join(tags) or 'none'}")


def create_timm_model(name: str, *, pretrained: bool = False, **settings: Any) -> nn.Module:
    """Build a model of timm by its name, by that of a hub (``hf_hub:user/model``) or of a folder (``local-dir:path``).

    Args:
        name: as ``timm.create_model`` takes it.
        pretrained: whether to fetch its weights; files among them run no code, whatever timm's version.
        settings: of ``timm.create_model``: ``num_classes``, ``in_chans`` and so on.

    Raises:
        ModelError: the name is unknown, or timm can't build the model with these settings.
        CheckpointError: it has no pretrained weights, or they can't be had.
    """
    check_name(name)
    try:
        with _no_code_from_files():
            model: nn.Module = timm.create_model(name, pretrained=pretrained, **settings)
    except Exception as error:  # whatever the hub's client, the network or the model's constructor raise
        if pretrained:
            raise CheckpointError(f"the pretrained weights of {name} can't be had ({first_line(error)})") from error
        with_settings = f" with {settings}" if settings else ""
        raise ModelError(f"{name} can't be built by timm{with_settings} ({first_line(error)})") from error
    return model


def call_factory(place: str) -> nn.Module:
    """Build a model by a function without arguments, which may lie in the current folder, as for ``python -m``.

    Args:
        place: ``package.module:function``.

    Raises:
        ModelError: there is no such function, it fails, or it returns no module.

    Example:
        >>> call_factory("torch.nn:Identity")
        Identity()
    """
    name, _, attribute = place.partition(":")
    if not name or not attribute:
        raise ModelError(f"{place} must look like package.module:factory")
    with _current_folder_first():
        try:
            module = importlib.import_module(name)
        except (Exception, SystemExit) as error:  # whatever a user's module raises, a script's sys.exit() among it
            raise ModelError(f"{place}: {name} can't be imported ({first_line(error)})") from error
        factory = getattr(module, attribute, None)
        if not callable(factory):
            raise ModelError(f"{place}: {name} has no function {attribute}{_near(attribute, dir(module))}")
        try:
            model = factory()
        except (Exception, SystemExit) as error:
            raise ModelError(f"{place}: {attribute}() failed ({first_line(error)})") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{place}: {attribute}() returned a {type(model).__name__}, but a torch.nn.Module is needed")
    return model


def read_checkpoint(path: str | Path, model: nn.Module, *, classifier: bool = True) -> dict[str, Tensor]:
    """Read a file of weights without running any code in it, and compare it with the model that is to have them.

    timm alone loads another architecture's file without a word where ``strict`` is off, and before its release 1.0.26
    runs the code that a pickle holds. Prefixes of DDP and torch.compile are removed, and of a training checkpoint the
    averaged weights are taken, then those of the model, as timm does.

    Args:
        path: a .safetensors file, or what ``torch.save`` wrote (.pth, .bin).
        model: has the keys, shapes and kinds of numbers to expect; it is not changed.
        classifier: whether the classifier (which timm names in ``model.pretrained_cfg``) must fit as well.

    Returns:
        The weights by key, those of the classifier among them, whether compared or not.

    Raises:
        CheckpointError: the file holds no weights, more than weights, or those of another model; or some are complex,
            whole or not finite numbers, which would be cast or trained without a word.
    """
    weights = _read(Path(path))
    heads = () if classifier else _classifiers(model)
    expected = {key: value for key, value in model.state_dict().items() if not key.startswith(heads)}
    found = {key: value for key, value in weights.items() if not key.startswith(heads)}
    differences = _differences(found, expected)
    if differences:
        architecture = _timm_config(model).get("architecture") or type(model).__name__
        more = f" and {len(differences) - _SHOWN_KEYS} more" if len(differences) > _SHOWN_KEYS else ""
        raise CheckpointError(
            f"{path} does not fit {architecture}: {', '.join(differences[:_SHOWN_KEYS])}{more}; give the model that it "
            "was saved from, with its number of classes"
        )
    trained = {name for name, _ in model.named_parameters()} & found.keys()
    broken = [key for key in found if key in trained and not found[key].to(expected[key].dtype).isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{path} has weights that are not finite, {broken[0]} first: give one from before the training diverged"
        )
    return weights


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if not path.is_file():
            raise CheckpointError(f"{path} is no file")
        with _no_code_from_files(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about what it then refuses with an error
            weights = load_state_dict(str(path), device="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # of safetensors, pickle, zip files and timm itself
        if "weights_only" in str(error):
            raise CheckpointError(
                f"{path} holds no weights, or more than weights: torch.load with weights_only=True refuses it, since "
                "loading it otherwise could run any code; save its state_dict() alone, best as .safetensors"
            ) from error
        raise CheckpointError(
            f"{path} can't be read as weights ({first_line(error)}): give a .safetensors or .pth file"
        ) from error
    if not isinstance(weights, Mapping) or not all(_is_plain(value) for value in weights.values()):
        raise CheckpointError(f"{path} holds no state_dict of plain tensors: save model.state_dict()")
    return dict(weights)


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    """Return the prefixes of the keys of a timm model's classifiers."""
    names = _timm_config(model).get("classifier") or ()
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))


def _timm_config(model: nn.Module) -> Mapping[str, Any]:
    config = getattr(model, "pretrained_cfg", None)
    return config if isinstance(config, Mapping) else {}


def _differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Say for each key that differs in what it does; old files lack batch norm's counters, which are not needed."""
    missing = [key for key in expected if key not in found and not key.endswith("num_batches_tracked")]
    common = [(key, found[key], expected[key]) for key in expected if key in found]
    return [
        *(f"{key} is missing in the file" for key in missing),
        *(f"{key} of the file is not in the model" for key in found if key not in expected),
        *(
            f"{key} is {(*theirs.shape,)} in the file and {(*ours.shape,)} in the model"
            for key, theirs, ours in common
            if theirs.shape != ours.shape
        ),
        *(
            f"{key} is of {theirs.dtype} in the file and of {ours.dtype} in the model"
            for key, theirs, ours in common
            if ours.is_floating_point() and not theirs.is_floating_point()
        ),
    ]


@contextmanager
def _no_code_from_files() -> Iterator[None]:
    """Read files with weights_only=True here, whatever the libraries in between say.

    timm before 1.0.26 passes weights_only=False on many of its ways to a file; torch's own switch overrides that.
    """
    before = {name: os.environ.pop(name, None) for name in (_SAFE, _UNSAFE)}
    os.environ[_SAFE] = "1"
    try:
        yield
    finally:
        os.environ.pop(_SAFE, None)
        os.environ.update({name: value for name, value in before.items() if value is not None})


@contextmanager
def _current_folder_first() -> Iterator[None]:
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known)
    return f": did you mean {' or '.join(near)}?" if near else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, and the second where that only announces it."""
    first, second, *_ = [*str(error).strip().splitlines(), "", ""]
    return (f"{first} {second.strip()}" if first.endswith(":") else first).rstrip(".") or type(error).__name__
