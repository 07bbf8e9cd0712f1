"""The console script ``inmerge``: what in-model merging would do to a model, seen before it is trained."""

from __future__ import annotations

import argparse
import csv
import difflib
import importlib
import io
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

# torch and timm are imported where they are needed, so that --help answers at once.
if TYPE_CHECKING:
    from torch import nn

    from inmerge_optim.similarity import LayerProfile

_NEAREST = 3
_SHOWN_KEYS = 3


class InputError(Exception):
    """What the user gave can't be used; the message is one sentence that says what to do."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: as typed after ``inmerge``; those of the process by default.

    Returns:
        The exit code: 0, or 2 if the input can't be used, which standard error then explains in one sentence.
    """
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"inmerge: warning: {message}", file=sys.stderr)
            _inspect(options)
    except InputError as error:
        print(f"inmerge: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader (head, say) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="inmerge", description="In-model merging (InMerge) of similar kernels.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    inspect = commands.add_parser(
        "inspect",
        help="show which layers of a model are merged, and how many of their kernels are similar enough",
        description="Show which layers of a model are counted and selected for merging, the reason where not, how "
        "similar their kernels are beside random ones, and how many a step would merge.",
    )
    source = inspect.add_argument_group("the model and its weights (random ones unless they are given)")
    source.add_argument(
        "model", nargs="?", metavar="MODEL", help="the name of a timm model: resnet34, or resnet34.a1_in1k"
    )
    source.add_argument("--module", metavar="PKG.MOD:FACTORY", help="a function without arguments that returns a model")
    source.add_argument("--pretrained", action="store_true", help="fetch the pretrained weights of the timm model")
    source.add_argument("--checkpoint", type=Path, metavar="FILE", help="load weights (.safetensors, .pth)")
    source.add_argument("--num-classes", type=int, metavar="N", help="classes of the timm model, if not its own number")
    settings = inspect.add_argument_group("the settings of the merging")
    settings.add_argument(
        "--skip-layers",
        type=_count_or_fraction,
        default=0.6,
        metavar="N",
        help="shallow layers left alone: a whole number, or a fraction of those counted (default: 0.6)",
    )
    settings.add_argument("--merge-prob", type=float, default=0.3, metavar="P", help="(default: 0.3)")
    settings.add_argument(
        "--similarity-threshold",
        type=_number_or_text,
        default=0.3,
        metavar="TAU",
        help="a cosine, as in the paper, or one that fits each layer: 4sd for 4 standard deviations of random kernels' "
        "cosines, q0.9 for the quantile of the drawn pairs' cosines (default: 0.3)",
    )
    settings.add_argument("--names", metavar="REGEX", help="select the layers whose names match, whatever their depth")
    settings.add_argument(
        "--layer-types",
        nargs="+",
        choices=("conv", "linear"),
        default=["conv"],
        help="(default: conv; linear is experimental)",
    )
    settings.add_argument(
        "--input-size", nargs=3, type=int, metavar=("C", "H", "W"), help="for a model that has no size of its own"
    )
    settings.add_argument(
        "--rate", type=float, metavar="R", help="say which threshold would merge this share of the draws"
    )
    output = inspect.add_argument_group("files, beside the table on the screen")
    output.add_argument("--json", type=Path, metavar="FILE", help="everything about each layer")
    output.add_argument("--csv", type=Path, metavar="FILE", help="the same as one row per layer, without the pairs")
    output.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="the first layer's kernels and each layer's similarities (.png, .pdf, .svg)",
    )
    return parser


def _count_or_fraction(text: str) -> float:
    try:
        return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def _number_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _inspect(options: argparse.Namespace) -> None:
    _check_files(options)
    model, title = _build(options)
    from torch import nn

    from inmerge_optim.selection import CONVOLUTIONS, LayerTypes
    from inmerge_optim.similarity import similarity_profile, threshold_for_rate

    types: dict[str, LayerTypes] = {"conv": CONVOLUTIONS, "linear": (nn.Linear,)}
    try:
        profiles = similarity_profile(
            model,
            options.skip_layers,
            merge_prob=options.merge_prob,
            similarity_threshold=options.similarity_threshold,
            names=options.names,
            layer_types=tuple(layer for name in options.layer_types for layer in types[name]),
            input_size=options.input_size,
        )
        threshold = None if options.rate is None else threshold_for_rate(profiles, options.rate)
    except ValueError as error:
        raise InputError(str(error)) from error
    print("\n".join(_table(profiles, title, options, threshold)))
    if options.json:
        _write(options.json, lambda: (_json(profiles, title, options, threshold) + "\n").encode())
    if options.csv:
        _write(options.csv, lambda: _csv(profiles).encode())
    if options.plot:
        from inmerge_optim.plots import plot_profile

        _write(
            options.plot,
            lambda: plot_profile(
                profiles, model, title, threshold=options.similarity_threshold, file_format=options.plot.suffix[1:]
            ),
        )


def _check_files(options: argparse.Namespace) -> None:
    """Refuse output files that can't be written before anything is computed."""
    for option in ("json", "csv", "plot"):
        path = getattr(options, option)
        if path is not None and (not path.parent.is_dir() or path.is_dir()):
            raise InputError(f"--{option} {path} can't be written: name a file in a folder that exists")
    if options.plot:
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise InputError("--plot needs matplotlib: pip install 'inmerge_optim[plot]'") from error
        known = Figure().canvas.get_supported_filetypes()
        if options.plot.suffix[1:].lower() not in known:
            raise InputError(f"--plot {options.plot} must end in one of {', '.join(f'.{ending}' for ending in known)}")


def _build(options: argparse.Namespace) -> tuple[nn.Module, str]:
    """Return the model and a line that says what it is."""
    if (options.model is None) == (options.module is None):
        raise InputError("name either a timm MODEL or --module PKG.MOD:FACTORY")
    if options.pretrained and (options.module or options.checkpoint):
        raise InputError(
            "--pretrained fetches the weights of a timm MODEL and goes with neither --module nor --checkpoint"
        )
    if options.num_classes is not None and options.module:
        raise InputError("--num-classes is for a timm MODEL: let the factory of --module set the classes")
    if options.checkpoint and not options.checkpoint.is_file():
        raise InputError(f"--checkpoint {options.checkpoint} is no file")
    import torch

    torch.manual_seed(0)
    model = _call_factory(options.module) if options.module else _timm_model(options)
    if options.checkpoint:
        _load(model, options.checkpoint)
    if options.module:
        weights = "weights as the factory made them"
    elif options.pretrained:
        weights = "pretrained weights"
    else:
        weights = "random weights: --checkpoint or --pretrained gives others"
    return (
        model,
        f"{options.model or options.module} ({f'weights of {options.checkpoint}' if options.checkpoint else weights})",
    )


def _timm_model(options: argparse.Namespace) -> nn.Module:
    import timm

    name, _, tag = options.model.partition(".")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), _NEAREST)
        hint = f"near names: {', '.join(near)}" if near else "timm.list_models() names them all"
        raise InputError(f"{options.model} is no model of timm; {hint}")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{name}.*")]
    if tag and tag not in tags:
        raise InputError(f"timm's {name} has no weights {tag!r}, but {', '.join(tags) or 'none'}")
    if options.pretrained and not tags:
        raise InputError(f"timm has no pretrained weights for {name}: give a file with --checkpoint")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries, which end in the sentence below
    kwargs = {} if options.num_classes is None else {"num_classes": options.num_classes}
    try:
        model: nn.Module = timm.create_model(options.model, pretrained=options.pretrained, **kwargs)
    except Exception as error:  # whatever the hub's client, the network or the model's constructor raise
        if options.pretrained:
            raise InputError(
                f"the pretrained weights of {options.model} can't be fetched ({_first_line(error)}): is there a "
                "network? A file of weights can be given with --checkpoint"
            ) from error
        raise InputError(f"timm can't build {options.model} ({_first_line(error)})") from error
    return model


def _call_factory(place: str) -> nn.Module:
    from torch import nn

    name, _, attribute = place.partition(":")
    if not name or not attribute:
        raise InputError(f"--module {place} must look like package.module:factory")
    sys.path.insert(0, os.getcwd())  # as for python -m
    try:
        module = importlib.import_module(name)
    except Exception as error:  # whatever a stranger's module raises
        raise InputError(f"--module {place}: {name} can't be imported ({_first_line(error)})") from error
    finally:
        sys.path.remove(os.getcwd())
    factory = getattr(module, attribute, None)
    if not callable(factory):
        near = difflib.get_close_matches(attribute, dir(module), _NEAREST)
        raise InputError(
            f"--module {place}: {name} has no function {attribute}"
            + (f"; near names: {', '.join(near)}" if near else "")
        )
    try:
        model = factory()
    except Exception as error:  # whatever a stranger's factory raises
        raise InputError(f"--module {place}: {attribute}() failed ({_first_line(error)})") from error
    if not isinstance(model, nn.Module):
        raise InputError(
            f"--module {place}: {attribute}() returned a {type(model).__name__}, but a torch.nn.Module is needed"
        )
    return model


def _load(model: nn.Module, path: Path) -> None:
    import torch
    from timm.models import load_state_dict

    try:
        found = load_state_dict(str(path), device="cpu", weights_only=True)
    except Exception as error:  # of safetensors, pickle, zip files and timm itself
        if "weights_only" in str(error):
            raise InputError(
                f"--checkpoint {path} is a pickle that holds more than weights, and loading it could run any code "
                "(torch.load with weights_only=True refuses it): save its state_dict() alone, best as .safetensors"
            ) from error
        raise InputError(
            f"--checkpoint {path} can't be read as weights ({_first_line(error)}): give a .safetensors or .pth file"
        ) from error
    if not isinstance(found, Mapping) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise InputError(f"--checkpoint {path} holds no state_dict: save model.state_dict()")
    expected = model.state_dict()
    missing = [key for key in expected if key not in found and not key.endswith("num_batches_tracked")]
    foreign = [key for key in found if key not in expected]
    shapes = [key for key in expected if key in found and found[key].shape != expected[key].shape]
    differences = [
        *(f"{key} is missing in the file" for key in missing[:_SHOWN_KEYS]),
        *(f"{key} of the file is not in the model" for key in foreign[:_SHOWN_KEYS]),
        *(
            f"{key} is {(*found[key].shape,)} in the file and {(*expected[key].shape,)} in the model"
            for key in shapes[:_SHOWN_KEYS]
        ),
    ]
    if differences:
        count = len(missing) + len(foreign) + len(shapes)
        hint = "; --num-classes sets the classes of a timm model" if shapes and not missing and not foreign else ""
        raise InputError(
            f"--checkpoint {path} does not fit: {count} keys differ, first {', '.join(differences[:_SHOWN_KEYS])}{hint}"
        )
    model.load_state_dict(found, strict=False)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _write(path: Path, content: Callable[[], bytes]) -> None:
    """Write a file beside its place, and rename it when it is whole."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(content())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"{path} can't be written ({error.strerror or error})") from error


_HEADER = (
    "depth",
    "layer",
    "kernels",
    "length",
    "groups",
    "mean",
    "95 %",
    "highest",
    "above",
    "random",
    "dead",
    "merges",
    "remark",
)


def _table(profiles: list[LayerProfile], title: str, options: argparse.Namespace, threshold: float | None) -> list[str]:
    """Return the lines of the report."""
    rows = [_HEADER, *(_row(profile) for profile in profiles)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    left = (_HEADER.index("layer"), _HEADER.index("remark"))
    lines = [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    counted = sum(profile.depth is not None for profile in profiles)
    selected = sum(profile.selected for profile in profiles)
    draws, merges = _expected(profiles)
    totals = [
        f"{len(profiles)} layers, {counted} counted, {selected} selected.",
        f"A step draws {draws:.1f} kernels and merges {merges:.2f} of them on average ({_percent(merges, draws)}).",
    ]
    if options.rate is not None:
        totals.append(
            "No layer is selected, so no threshold merges anything."
            if threshold is None
            else f"A similarity threshold of {threshold:.4f} would merge {options.rate:.1%} of the draws."
        )
    columns = (
        f"length: weights of a kernel; mean, 95 %, highest: of the cosines; above: share of pairs above "
        f"{options.similarity_threshold}; random: that share for random kernels; merges: expected per step."
    )
    return [title, "", *lines, "", columns, *totals]


def _row(profile: LayerProfile) -> tuple[str, ...]:
    if profile.mean is None or profile.quantiles is None:
        cosines = ["-"] * 5
    else:
        shares = (profile.share_above_threshold or 0.0, profile.random_share_above_threshold or 0.0)
        values = (profile.mean, profile.quantiles[0.95], max(pair.cosine for pair in profile.most_similar))
        cosines = [*(f"{round(value, 2) + 0:.2f}" for value in values), *(_percent(share, 1) for share in shares)]
    return (
        "-" if profile.depth is None else str(profile.depth),
        profile.name,
        str(profile.kernels),
        str(profile.row_length),
        str(profile.groups),
        *cosines,
        str(len(profile.dead_kernels) or "-"),
        f"{profile.expected_merges:.2f}" if profile.selected else "-",
        profile.reason,
    )


def _percent(part: float, whole: float) -> str:
    share = part / whole if whole else 0.0
    return "<0.01 %" if 0 < share < 1e-4 else f"{100 * share:.2f} %"


def _expected(profiles: list[LayerProfile]) -> tuple[float, float]:
    return sum(profile.expected_draws for profile in profiles), sum(profile.expected_merges for profile in profiles)


def _scalars(profile: LayerProfile) -> dict[str, Any]:
    return {
        "name": profile.name,
        "depth": profile.depth,
        "selected": profile.selected,
        "reason": profile.reason,
        "kernels": profile.kernels,
        "row_length": profile.row_length,
        "groups": profile.groups,
        "mean": profile.mean,
        "threshold": profile.threshold,
        "share_above_threshold": profile.share_above_threshold,
        "random_share_above_threshold": profile.random_share_above_threshold,
        "expected_draws": profile.expected_draws,
        "expected_merges": profile.expected_merges,
    }


def _json(profiles: list[LayerProfile], title: str, options: argparse.Namespace, threshold: float | None) -> str:
    draws, merges = _expected(profiles)
    layers = [
        {
            **_scalars(profile),
            "quantiles": profile.quantiles,
            "dead_kernels": profile.dead_kernels,
            "most_similar": [pair._asdict() for pair in profile.most_similar],
            "least_similar": [pair._asdict() for pair in profile.least_similar],
        }
        for profile in profiles
    ]
    names = ("skip_layers", "merge_prob", "similarity_threshold", "names", "layer_types", "input_size")
    content = {
        "model": title,
        "settings": {name: getattr(options, name) for name in names},
        "expected_draws": draws,
        "expected_merges": merges,
        "rate": options.rate,
        "threshold_for_rate": threshold,
        "layers": layers,
    }
    return json.dumps(content, indent=2, allow_nan=False)


def _csv(profiles: list[LayerProfile]) -> str:
    from inmerge_optim.similarity import QUANTILES

    rows = []
    for profile in profiles:
        quantiles = {f"quantile_{share:g}": (profile.quantiles or {}).get(share) for share in QUANTILES}
        rows.append({**_scalars(profile), **quantiles, "dead_kernels": len(profile.dead_kernels)})
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()
