"""The console script ``inmerge``: what in-model merging would do to a model, seen before it is trained."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from inmerge_optim import __version__
from inmerge_optim.inspection import (
    STANDARD_OUTPUT,
    Inspection,
    is_standard_output,
    obstacle,
    to_csv,
    to_json,
    to_table,
    write,
)
from inmerge_optim.tables import printable

# torch and timm are imported where they are needed, so that --help answers at once.
if TYPE_CHECKING:
    from torch import nn

_OUTPUTS = ("json", "csv", "plot")
_LAYER_TYPES = ("conv", "linear")


class InputError(Exception):
    """What the user gave can't be used; the message is one sentence that says what to do."""


class _Parser(argparse.ArgumentParser):
    """Refuses what it does not know in one line, with the option that may have been meant."""

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            first = next((argument for argument in unknown if argument.startswith("-")), unknown[0])
            near = difflib.get_close_matches(first.partition("=")[0], re.findall(r"--[a-z-]+", self.format_usage()), 1)
            self.error(f"unexpected argument {first}" + (f": did you mean {near[0]}?" if near else ""))
        return options, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {_one_line(message)} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: as typed after ``inmerge``; those of the process by default.

    Returns:
        The exit code: 0, or 2 if the input can't be used, which standard error then explains in one sentence.
    """
    parser = _parser()
    options = parser.parse_args(_join_values(sys.argv[1:] if arguments is None else arguments))
    if options.command is None:
        parser.error("a command is missing: inspect or compact")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: _say("warning", str(message))
            options.run(options)
    except InputError as error:
        _say("error", str(error))
        return 2
    except BrokenPipeError:  # the reader (head, say) has seen enough
        return 0
    except KeyboardInterrupt:
        _say("error", "stopped by the keyboard; nothing was written")
        return 130
    return 0


def _say(kind: str, message: str) -> None:
    print(f"inmerge: {kind}: {_one_line(message)}", file=sys.stderr)


def _one_line(message: str) -> str:
    return printable(" ".join(message.split()))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="inmerge", description="In-model merging (InMerge) of similar kernels.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"inmerge {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")  # asked for once no option is unknown
    inspect = commands.add_parser(
        "inspect",
        help="show which layers of a model are merged, and how many of their kernels are similar enough",
        description="Show which layers of a model are counted and selected for merging, the reason where not, how "
        "similar their kernels are beside random ones, and how many a step would merge.",
        allow_abbrev=False,  # since the values of an option are found by its full name
    )
    inspect.set_defaults(run=_inspect)
    _add_source(inspect)
    _add_settings(inspect)
    output = inspect.add_argument_group("files, beside the table on the screen, or in its place (-)")
    output.add_argument("--json", type=Path, metavar="FILE", help="everything about each layer")
    output.add_argument("--csv", type=Path, metavar="FILE", help="the same as one row per layer, without the pairs")
    output.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="the first layer's kernels and each layer's similarities (.png, .pdf, .svg)",
    )
    compact = commands.add_parser(
        "compact",
        help="take equal channels out of a model, so that a smaller one computes the same",
        description="Take equal channels out of a model that was trained with merge_channels, so that a smaller one "
        "computes the same; say which layers lost how many, and why the others kept theirs.",
        allow_abbrev=False,
    )
    compact.set_defaults(run=_compact, module=None)
    _add_source(compact, module=False)
    _add_input_size(compact)
    compact.add_argument(
        "--tolerance",
        type=float,
        default=1e-3,
        metavar="T",
        help="how far apart two kernels may be, as a share of the larger one's norm (default: 0.001)",
    )
    compact.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="the smaller model, which inmerge_optim.load_compacted builds again (.safetensors)",
    )
    return parser


def _add_source(parser: argparse.ArgumentParser, module: bool = True) -> None:
    source = parser.add_argument_group("the model and its weights (random ones unless they are given)")
    source.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="the name of a timm model: resnet34, resnet34.a1_in1k, hf_hub:user/model or local-dir:folder",
    )
    if module:
        source.add_argument(
            "--module", metavar="PKG.MOD:FACTORY", help="a function without arguments that returns a model"
        )
    source.add_argument("--pretrained", action="store_true", help="fetch the pretrained weights of the timm model")
    source.add_argument("--checkpoint", type=Path, metavar="FILE", help="load weights (.safetensors, .pth)")
    source.add_argument("--num-classes", type=int, metavar="N", help="classes of the timm model, if not its own number")
    source.add_argument("--in-chans", type=int, metavar="N", help="channels that the timm model takes, if not its own")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    settings = parser.add_argument_group("the settings of the merging")
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
    settings.add_argument("--exclude", metavar="REGEX", help="leave out the layers whose names match, also those named")
    settings.add_argument(
        "--layer-types",
        type=_layer_types,
        default=["conv"],
        metavar="TYPE ...",
        help="conv, linear or both (default: conv; linear is experimental)",
    )
    _add_input_size(settings)
    settings.add_argument(
        "--rate", type=float, metavar="R", help="say which threshold would merge this share of the draws"
    )


def _add_input_size(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--input-size",
        type=_size,
        metavar="C ...",
        help="the channels and lengths of an input, for a model that has no size of its own: 3 224 224 of an image, "
        "1 32 32 32 of a volume, 12 1000 of a signal",
    )


def _join_values(arguments: Sequence[str]) -> list[str]:
    """Make one argument of the values of an option that takes several, so that MODEL may stand right behind them.

    argparse alone would give it to the option, whose values are known by their looks: numbers, or types of layers.
    """
    looks = {"--input-size": re.compile(r"[+-]?[\d.]+"), "--layer-types": re.compile("|".join(_LAYER_TYPES))}
    joined: list[str] = []
    option = ""  # the last one
    for argument in arguments:
        if option in looks and looks[option].fullmatch(argument):
            joined[-1] += f"={argument}" if joined[-1] == option else f" {argument}"
        else:
            option = argument.partition("=")[0]
            joined.append(argument)
    return joined


def _size(text: str) -> tuple[int, ...]:
    lengths = text.split()
    if not 1 <= len(lengths) <= 4 or not all(re.fullmatch(r"0*[1-9]\d*", length) for length in lengths):
        raise argparse.ArgumentTypeError(
            f"{text.strip()!r} is no size: 1 to 4 whole numbers from 1 are needed, channels first"
        )
    return tuple(map(int, lengths))


def _layer_types(text: str) -> list[str]:
    names = text.split()
    if not names or not set(names) <= set(_LAYER_TYPES):
        raise argparse.ArgumentTypeError(f"{text.strip()!r} is not among {', '.join(_LAYER_TYPES)}")
    return names


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
    _check_options(options)
    outputs = _check_outputs(options)
    try:
        model, title = _build(options)
        found = _profile(options, model, title)
    except ImportError as error:
        raise InputError(f"inmerge inspect needs torch, timm and numpy ({error}): pip install inmerge_optim") from error
    if not any(map(is_standard_output, outputs.values())):
        table = to_table(found).encode(sys.stdout.encoding, "backslashreplace")
        with _written("the standard output"):
            write(STANDARD_OUTPUT, table)
    formats = {"json": to_json, "csv": to_csv}
    for name, path in outputs.items():
        content = formats[name](found) if name in formats else _plot(found, model, path)
        with _written(f"--{name} {path}"):
            write(path, content)


@contextmanager
def _written(what: str) -> Iterator[None]:
    """Say in a sentence what can't be written."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise InputError(f"{what} can't be written ({error.strerror or error})") from error


def _check_options(options: argparse.Namespace) -> None:
    if (options.model is None) == (options.module is None):
        raise InputError("name either a timm MODEL or --module PKG.MOD:FACTORY")
    if options.pretrained and (options.module or options.checkpoint):
        raise InputError(
            "--pretrained fetches the weights of a timm MODEL and goes with neither --module nor --checkpoint"
        )
    for name in ("num_classes", "in_chans"):
        if getattr(options, name) is not None and options.module:
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{option} is for a timm MODEL: let the factory of --module set it")


def _check_outputs(options: argparse.Namespace) -> dict[str, Path]:
    """Return the files to write by option, and refuse those that can't be written before anything is computed."""
    outputs: dict[str, Path] = {name: path for name in _OUTPUTS if (path := getattr(options, name)) is not None}
    taken = {} if options.checkpoint is None else {os.path.realpath(options.checkpoint): "checkpoint"}
    for name, path in outputs.items():
        if reason := obstacle(path):
            raise InputError(f"--{name} {path} {reason}: name a regular file, or - for the standard output")
        other = taken.setdefault("-" if is_standard_output(path) else os.path.realpath(path), name)
        if other != name:
            raise InputError(f"--{name} {path} is also that of --{other}: give each a file of its own")
    if "plot" in outputs:
        _check_plot(outputs["plot"])
    return outputs


def _check_plot(path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("--plot needs matplotlib: pip install 'inmerge_optim[plot]'") from error
    known = Figure().canvas.get_supported_filetypes()
    if _plot_format(path) not in known:
        raise InputError(f"--plot {path} must end in one of {', '.join(f'.{ending}' for ending in known)}")


def _plot_format(path: Path) -> str:
    return "png" if is_standard_output(path) else path.suffix[1:].lower()


def _build(options: argparse.Namespace) -> tuple[nn.Module, str]:
    """Return the model and a line that says what it is."""
    import torch

    from inmerge_optim.models import CheckpointError, ModelError, call_factory, create_timm_model, read_checkpoint

    torch.manual_seed(0)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries, which end in the sentence below
    try:
        if options.module:
            model = call_factory(options.module)
        else:
            model = create_timm_model(options.model, pretrained=options.pretrained, **_model_settings(options))
        if options.checkpoint:
            model.load_state_dict(read_checkpoint(options.checkpoint, model), strict=False)
    except ModelError as error:
        raise InputError(f"--module {error}" if options.module else str(error)) from error
    except CheckpointError as error:
        if options.checkpoint:
            raise InputError(f"--checkpoint {error}") from error
        raise InputError(f"{error}: is there a network? A file of weights can be given with --checkpoint") from error
    if options.checkpoint:
        weights = f"weights of {options.checkpoint}"
    elif options.module:
        weights = "weights as the factory made them"
    elif options.pretrained:
        weights = "pretrained weights"
    else:
        weights = "random weights: --checkpoint or --pretrained gives others"
    return model, f"{options.model or options.module} ({weights})"


def _model_settings(options: argparse.Namespace) -> dict[str, int]:
    """Return what timm's create_model is to be told beside the name."""
    return {name: value for name in ("num_classes", "in_chans") if (value := getattr(options, name)) is not None}


def _compact(options: argparse.Namespace) -> None:
    _check_options(options)
    if options.output.suffix != ".safetensors":
        raise InputError(f"--output {options.output} must end in .safetensors")
    if reason := obstacle(options.output):
        raise InputError(f"--output {options.output} {reason}: name a regular file")
    if options.checkpoint and os.path.realpath(options.output) == os.path.realpath(options.checkpoint):
        raise InputError(f"--output {options.output} is also that of --checkpoint: give it a file of its own")
    try:
        import torch

        from inmerge_optim.compacted_files import save_compacted
        from inmerge_optim.compaction import compact
        from inmerge_optim.tracing import own_size

        model, title = _build(options)
        size = options.input_size or own_size(model)
        inputs = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
        smaller, report = compact(model, inputs, options.tolerance)
    except ImportError as error:
        lacking = error.__cause__ or error
        raise InputError(
            f"inmerge compact needs torch, timm, numpy and torch-pruning ({lacking}): "
            "pip install 'inmerge_optim[compact]'"
        ) from error
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error
    print(f"{printable(title)}\n\n{report}")
    description = {"model": options.model, "settings": _model_settings(options), "input_size": [*inputs.shape]}
    with _written(f"--output {options.output}"):
        save_compacted(options.output, smaller, report, description)


def _profile(options: argparse.Namespace, model: nn.Module, title: str) -> Inspection:
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
            exclude=options.exclude,
            layer_types=tuple(layer for name in options.layer_types for layer in types[name]),
            example_inputs=options.input_size,
        )
        threshold = None if options.rate is None else threshold_for_rate(profiles, options.rate)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error
    names = ("skip_layers", "merge_prob", "similarity_threshold", "names", "exclude", "layer_types", "input_size")
    settings = {name: getattr(options, name) for name in names}
    return Inspection(title, profiles, settings, options.rate, threshold)


def _plot(found: Inspection, model: nn.Module, path: Path) -> bytes:
    from inmerge_optim.plots import plot_profile

    threshold = found.settings["similarity_threshold"]
    return plot_profile(found.profiles, model, found.title, threshold=threshold, file_format=_plot_format(path))
