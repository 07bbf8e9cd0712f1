"""The options that every recipe has, and how they are read from the command line and from a config file."""

import dataclasses
import math
import os
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro

from .errors import InputError, first_line, is_main_process, near_names
from .files import read_yaml

BASELINE = "baseline"  # the arm that the others are compared with
MARGIN = 0.005
MARGIN_CHOSEN = "margin_chosen"  # what config.yaml says beside the options
_CONFIGS = Path(__file__).parents[1] / "configs"
_LARGEST_SEED = 2**32 - 1  # of scikit-learn's generators
# Beyond these a mistake is likelier than a wish, and a machine runs out of memory or of processes.
_AT_MOST = {"image_size": 4096, "prepare_size": 4096, "workers": 512, "prepare_workers": 512}
_AT_MOST |= {"split_seed": _LARGEST_SEED, "epochs": 100_000, "inmerge_epochs": 100_000}


@dataclass(kw_only=True)
class Options:
    """Options of the paired trial; a recipe's own options are added by a subclass."""

    model: str = "resnet18"
    """Any timm model with convolutions."""
    pretrained: bool = True
    """Start from timm's pretrained weights (from the hub, or from --checkpoint)."""
    checkpoint: Path | None = None
    """A local file with weights of that architecture; used in place of the hub's."""
    in_chans: Literal[1, 3] = 3
    """Channels that the model takes; grey images are expanded to three on the device."""
    data_dir: Path | None = None
    """The folder with the data."""
    image_size: int | None = None
    """Side of the images in pixels; they are resized once, ahead of training. None: as in the source."""
    epochs: int = 10
    """Epochs of the backbone stage (E1)."""
    inmerge_epochs: int = 5
    """Epochs of each arm (E2)."""
    seeds: tuple[int, ...] = (0,)
    """One backbone and one run of each arm per seed."""
    split_seed: int = 0
    """Seed of the split, where the data come without one; it does not vary with --seeds."""
    arms: tuple[str, ...] = (BASELINE, "inmerge")
    """What is compared; baseline must be among them."""
    tune: tuple[str, ...] = ()
    """Arms with settings, such as weight-decay@weight_decay=0.01 weight-decay@weight_decay=0.1: the one that is best on
    validation over --tune-seeds takes the place of weight-decay in --arms."""
    tune_seeds: tuple[int, ...] = ()
    """Seeds of the run that tunes, in a folder beside --output; none of --seeds."""
    keep_by: Literal["auroc", "loss"] = "auroc"
    """The epoch that is kept has the highest AUROC on validation, or the lowest loss there."""
    start_from: Literal["last", "kept"] = "last"
    """The epoch of the backbone that the arms start from: the last, or the best by --keep-by, at the rate it had."""
    primary_metric: Literal[
        "auroc", "accuracy", "balanced_accuracy", "auprc", "kappa", "log_loss", "log_loss_scaled", "brier"
    ] = "auroc"
    """The metric that the verdict is about; of both log losses and brier lower is better."""
    margin: float | None = None
    """The smallest difference in it that matters. None: 0.005, and the report says that it was not chosen."""
    planned_seeds: int | None = None
    """How many seeds there will be in the end, where they are run a few at a time: verdicts before that are interim."""
    batch_size: int = 128
    """Images per optimizer step, over all processes and accumulation steps."""
    opt: str = "sgd"
    """Any timm optimizer. timm's sgd has Nesterov's momentum; momentum is SGD with the plain one, the paper's."""
    lr: float = 0.01
    """Learning rate of the backbone stage."""
    inmerge_lr: float | None = None
    """Learning rate that the arms begin with. None: the one that the backbone stage ends with, by its --sched."""
    momentum: float = 0.9
    """Momentum, for optimizers that have it."""
    weight_decay: float = 1e-4
    """Weight decay; as in timm, biases and norm layers have none."""
    sched: Literal["constant", "cosine", "multistep", "plateau"] = "constant"
    """timm's schedule of the learning rate, over the epochs of each stage; plateau follows the validation loss."""
    decay_milestones: tuple[int, ...] = ()
    """Epochs after which multistep multiplies the learning rate by a tenth."""
    patience_epochs: int | None = None
    """Epochs without a lower validation loss after which plateau multiplies the learning rate by a tenth, and begins
    with a fresh optimizer; so it does after each further epoch with a higher loss."""
    warmup_epochs: int = 0
    """Epochs of linear warm-up at the start of the backbone stage."""
    clip_grad: float | None = None
    """Largest norm of the gradient."""
    grad_accum_steps: int = 1
    """Forward and backward passes per optimizer step."""
    hflip: float = 0.0
    """Probability of a horizontal flip of a training image."""
    aug: tuple[str, ...] = ()
    """Augmentation of training images: any of flips (both ways), quarter-turns, rotations (10 degrees at most), crops
    (to 80 % of the side at least), brightness and contrast (20 % at most)."""
    smoothing: float = 0.0
    """Label smoothing, for tasks of classes."""
    class_weights: Literal["balanced"] | None = None
    """balanced: weigh classes, or the positive cases of each label, by how rare they are in training."""
    skip_layers: int | float = 0.6
    """Shallow convolutions that are never merged: a count, or a fraction below 1."""
    merge_prob: float = 0.3
    """Probability with which a kernel is picked at a step."""
    merge_weight: float = 0.8
    """Weight of the kernel itself in a merge."""
    similarity_threshold: float | str = 0.3
    """Cosine above which a pair is merged; or 4sd, in standard deviations of random kernels' cosines, or q0.9, the
    quantile of the cosines drawn in a layer at a step."""
    cooldown_epochs: int = 0
    """Epochs at the end of the merging arms that merge nothing."""
    merge_rounds: int | None = None
    """Rounds of merging without a step that validation-rounds makes after an epoch. None: one per validation image."""
    compact: bool = False
    """Make each merging arm's model smaller by what merging made equal, as a further arm (inmerge-compact). The merging
    arms blend biases and batch norms along with kernels then. Needs inmerge_optim[compact]."""
    final_rounds: int | None = None
    """Rounds of merging without a step ahead of that, until similar kernels are equal. None: 1500."""
    recalibrate_bn: bool = False
    """Estimate batch norm's statistics anew on the training images before each evaluation, in all arms alike."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """None: what the launcher says."""
    channels_last: bool = False
    """Keep images and weights with their channels last in memory, which many devices compute faster."""
    compile: bool = False
    """Compile the model with torch.compile."""
    grad_checkpointing: bool = False
    """Compute activations again in the backward pass, which saves memory, where the model can."""
    drop_twins: bool = False
    """Leave an image that lies in several splits, by its pixels, or a patient who does, in the last of them alone."""
    limit_train: int | None = None
    """Train on so many images, drawn by --split-seed: a dry run, or a trial with little data."""
    label_noise: float = 0.0
    """Share of the training labels that are replaced by another one at random, drawn by --split-seed; of a multi-label
    task, share of the entries that are turned over. Validation and test keep theirs."""
    workers: int = 0
    """Worker processes that load batches."""
    tracker: str = "none"
    """tensorboard, wandb, trackio or none: where each epoch's figures are logged, each stage as a run of its own."""
    output: Path | None = None
    """The run folder. None: runs/<data>-<model>."""
    resume: bool = False
    """Go on with the run in the output folder, or start it."""
    allow_other_versions: bool = False
    """Go on with a run that was begun with other versions of torch, timm or the like, and record both."""
    engine: Literal["here", "ray"] = "here"
    """ray: run seeds, arms and cells on a Ray cluster, each stage as a process of its own; here: one after another."""
    ray_address: str | None = None
    """Address of a running Ray, or auto. None: start one on this machine."""
    cpus_per_task: int = 1
    """Cores, and threads, of a task on Ray."""
    gpus_per_task: float = 0.0
    """GPUs of a task on Ray; a fraction shares one."""
    config: Path | None = None
    """A YAML file with values for these options; the command line has the last word."""


SomeOptions = TypeVar("SomeOptions", bound=Options)
AnyText = TypeVar("AnyText", str, Path)


def parse_options(kind: type[SomeOptions], argv: list[str] | None = None) -> SomeOptions:
    """Read and check the options: defaults, then the config file's values, then the command line's."""
    argv = sys.argv[1:] if argv is None else argv
    from_file = [word for path in _config_paths(argv) for word in _read_config(kind, path)]
    options = tyro.cli(kind, args=[*from_file, *argv], console_outputs=is_main_process())
    options = _with_whole_paths(options)
    check_options(options)
    return options


def _with_whole_paths(options: SomeOptions) -> SomeOptions:
    """With ~ expanded in every path, here and nowhere else: not all libraries do it."""
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    if (values.get("hub") or "").startswith("~"):  # a folder, where others are names on the hub
        values["hub"] = str(whole("--hub", Path(values["hub"])))
    texts: dict[str, Any] = {name: value for name, value in values.items() if isinstance(value, str | Path)}
    return dataclasses.replace(options, **{name: whole(f"--{_flag(name)}", value) for name, value in texts.items()})


def whole(option: str, value: AnyText) -> AnyText:
    """A text as it is, or a path with ~ expanded; an InputError where no file or report can have it."""
    try:
        os.fspath(value).encode()
        if "\0" in os.fspath(value):
            raise ValueError("it has a NUL")
        return value.expanduser() if isinstance(value, Path) else value
    except (ValueError, RuntimeError) as error:  # no UTF-8; no such user
        raise InputError(
            f"{option} {os.fspath(value)!r} can't be used ({first_line(error)}): choose another"
        ) from error


def _config_paths(argv: list[str]) -> list[Path]:
    """The value of --config, found ahead of the parser because it sets the parser's defaults."""
    paths = [Path(value) for word, value in pairwise(argv) if word == "--config"]
    paths += [Path(word.removeprefix("--config=")) for word in argv if word.startswith("--config=")]
    return [whole("--config", _found(path)) for path in paths[-1:]]


def _found(path: Path) -> Path:
    """A file of configs/ may be given by its name alone, wherever the recipes are installed."""
    known = _CONFIGS / path.name
    return known if path.parent == Path() and not path.exists() and known.exists() else path


def _read_config(kind: type[Options], path: Path) -> list[str]:
    """A config file as command-line words, so that one parser coerces and checks the values of both."""
    known = {field.name for field in dataclasses.fields(kind)} - {"config"}
    words: list[str] = []
    names: set[str] = set()
    content = _config_content(path)
    if MARGIN_CHOSEN in content:  # the config.yaml of a run
        content.pop("config", None)
        if content.pop(MARGIN_CHOSEN) is False:
            content.pop("margin", None)
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise InputError(f"--config {path} sets the unknown option {key!r}{near_names(name, known)}")
        if name in names:
            raise InputError(f"--config {path} sets {name} twice: leave out one of both")
        names.add(name)
        try:
            words += _as_words(_flag(name), value)
        except ValueError as error:
            raise InputError(f"--config {path} gives {key} a value that can't be used ({error})") from error
    return words


def _config_content(path: Path) -> dict[str, Any]:
    try:
        return read_yaml(path)
    except InputError as error:
        raise InputError(f"--config {error}: give an existing YAML file") from error


def config_values(argv: list[str]) -> dict[str, Any]:
    """What the config file says, as it stands there, for recipes whose options depend on it."""
    return {key: value for path in _config_paths(argv) for key, value in _config_content(path).items()}


def _as_words(flag: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    values = value if isinstance(value, list) else [value]
    if any(isinstance(part, list | dict | set | bytes) for part in values):
        raise ValueError("expected one value, or a list of them")
    words = [str(part) for part in values]
    if any(word.startswith("--") for word in words):
        raise ValueError("it begins with --, as options do")
    return [f"--{flag}", *words]


def check_options(options: Options) -> None:
    """Refuse values out of range and options that contradict each other or would have no effect."""
    at_least = {"epochs": 0, "inmerge_epochs": 0, "batch_size": 1, "grad_accum_steps": 1, "workers": 0}
    at_least |= {"cooldown_epochs": 0}
    at_least |= {"warmup_epochs": 0, "lr": 0, "momentum": 0, "weight_decay": 0, "split_seed": 0}
    for name, lowest in at_least.items():
        if not getattr(options, name) >= lowest:
            raise InputError(f"--{_flag(name)} must be at least {lowest}, not {getattr(options, name)}")
    for name, value in vars(options).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"--{_flag(name)} must be a finite number, not {value}")
        if name in _AT_MOST and value is not None and value > _AT_MOST[name]:
            raise InputError(f"--{_flag(name)} must be at most {_AT_MOST[name]}, not {value}")
    for name in ("inmerge_lr", "clip_grad", "image_size", "limit_train", "margin", "merge_rounds", "final_rounds"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise InputError(f"--{_flag(name)} must be above 0, not {value}")
    if not 0 <= options.hflip <= 1:
        raise InputError(f"--hflip must be a probability between 0 and 1, not {options.hflip}")
    for name in ("smoothing", "label_noise"):
        if not 0 <= getattr(options, name) < 1:
            raise InputError(f"--{_flag(name)} must be at least 0 and below 1, not {getattr(options, name)}")
    _check_seeds(options)
    if options.checkpoint and not options.pretrained:
        raise InputError(
            "--checkpoint gives pretrained weights and --no-pretrained forbids them: leave out one of both"
        )
    if options.decay_milestones and options.sched != "multistep":
        raise InputError(f"--decay-milestones has no effect with --sched {options.sched}: use --sched multistep")
    if options.sched == "multistep" and not options.decay_milestones:
        raise InputError("--sched multistep needs --decay-milestones, the epochs after which the rate falls")
    if not options.cpus_per_task >= 1 or not options.gpus_per_task >= 0:
        raise InputError(
            f"--cpus-per-task must be at least 1 and --gpus-per-task at least 0, not {options.cpus_per_task} and "
            f"{options.gpus_per_task:g}"
        )
    for name in ("ray_address", "cpus_per_task", "gpus_per_task"):
        if options.engine == "here" and getattr(options, name) != getattr(Options, name):
            raise InputError(f"--{_flag(name)} has no effect without --engine ray: leave it out")
    if (options.sched == "plateau") != (options.patience_epochs is not None):
        raise InputError(
            "--sched plateau and --patience-epochs, how long it waits, have no effect without each other: give both"
        )
    if options.patience_epochs is not None and options.patience_epochs < 1:
        raise InputError(f"--patience-epochs must be at least 1, not {options.patience_epochs}")
    if options.final_rounds is not None and not options.compact:
        raise InputError("--final-rounds has no effect without --compact: leave it out")
    if options.start_from == "kept" and not options.epochs:
        raise InputError("--start-from kept has no effect with --epochs 0, which leaves one start: leave it out")
    if options.cooldown_epochs and options.cooldown_epochs >= options.inmerge_epochs:
        raise InputError(
            f"--cooldown-epochs {options.cooldown_epochs} leaves no epoch that merges: choose fewer than "
            f"--inmerge-epochs {options.inmerge_epochs}"
        )
    if options.warmup_epochs > options.epochs:
        raise InputError(f"--warmup-epochs {options.warmup_epochs} is longer than --epochs {options.epochs}")


def _check_seeds(options: Options) -> None:
    seeds, planned = options.seeds, options.planned_seeds
    if not seeds:
        raise InputError("--seeds needs at least one seed")
    if len(set(seeds)) < len(seeds):
        raise InputError(f"--seeds {' '.join(map(str, seeds))} names a seed twice: a repeated run adds no evidence")
    if min(seeds) < 0:
        raise InputError(f"--seeds must not be negative, and {min(seeds)} is")
    if planned is not None and planned < len(seeds):
        raise InputError(
            f"--planned-seeds {planned} is fewer than the {len(seeds)} of --seeds: a plan holds for all that are run"
        )
    if max(seeds) > _LARGEST_SEED:
        raise InputError(f"--seeds must be at most {_LARGEST_SEED}, and {max(seeds)} is more")


def _flag(name: str) -> str:
    return name.replace("_", "-")


def as_plain(options: Options) -> dict[str, Any]:
    """The options as YAML knows them: paths as text, tuples as lists; and the margin that holds, chosen or not."""
    plain = {}
    for name, value in dataclasses.asdict(options).items():
        plain[name] = (
            os.fspath(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        )
    chosen = options.margin is not None
    return plain | {"margin": options.margin if chosen else MARGIN, MARGIN_CHOSEN: chosen}
