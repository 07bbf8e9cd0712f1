"""What is compared. An arm is added to ARMS, and nowhere else.

A merging arm with settings of its own needs no entry: "inmerge@skip_layers=5,merge_prob=0.1" names it, so that a sweep
is one trial with many arms, and its run folder tells by itself what each of them did.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from inmerge_optim import InMergeOptimizer
from inmerge_optim.settings import Criterion, parse_threshold

from ..errors import InputError, check_names
from ..options import BASELINE, Options, check_options
from .averages import Average
from .controls import Control, ControlOptimizer

SETTINGS = ("skip_layers", "merge_prob", "merge_weight", "similarity_threshold")  # of merging
TRAINING = ("weight_decay", "smoothing")  # that any arm may have for its own
_OWN = (*SETTINGS, *TRAINING)
_AT, _COMMA, _IS = "@", ",", "="  # of an arm's name that tells its settings


@dataclass(frozen=True)
class Arm:
    """One way to spend the E2 epochs after the backbone stage.

    Attributes:
        criterion: which pairs are merged after each step; None: nothing is merged.
        average: the average of weights over training that is evaluated and kept; None: the weights as trained.
        settings: of SETTINGS and TRAINING those that the arm has for its own, in place of the options'; so a sweep is
            one trial.
        rounds: whether it also merges without a step after each epoch, before it is evaluated.
        control: what stands in for each merge, see controls.py.
    """

    criterion: Criterion | None = None
    average: Average | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    rounds: bool = False
    control: Control | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.settings) - set(_OWN))
        if unknown:
            raise ValueError(f"an arm can't set {unknown[0]} for itself: expected any of {', '.join(_OWN)}")
        unused = [name for name in self.settings if name in SETTINGS]
        unused += [name for name in ("rounds", "control") if getattr(self, name)]
        if unused and self.criterion is None:
            raise ValueError(f"an arm that merges nothing has no use for {', '.join(unused)}: leave it out")


ARMS = {
    BASELINE: Arm(),
    "inmerge": Arm(criterion="similar"),
    "random-pairs": Arm(criterion="random_pairs"),
    "dissimilar": Arm(criterion="dissimilar"),
    "validation-rounds": Arm(criterion="similar", rounds=True),
    "norm-matched": Arm(criterion="similar", control="norm"),
    "noise-matched": Arm(criterion="similar", control="noise"),
    "norm-matched-rounds": Arm(criterion="similar", rounds=True, control="norm"),
    "noise-matched-rounds": Arm(criterion="similar", rounds=True, control="noise"),
    # A. Krogh, J. A. Hertz, "A Simple Weight Decay Can Improve Generalization", NIPS 1991. The value is to be tuned.
    "weight-decay": Arm(settings={"weight_decay": 0.01}),
    # C. Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016, with their value.
    "label-smoothing": Arm(settings={"smoothing": 0.1}),
    "ema": Arm(average="ema"),
    "swa": Arm(average="swa"),
}


def arm_of(name: str) -> Arm:
    """The arm of that name; an InputError for one that there is not."""
    base, at, settings = name.partition(_AT)
    check_names("--arms", "arm", [base], ARMS)
    if not at:
        return ARMS[base]
    try:
        own = dict(_own_settings(settings))
        arm = replace(ARMS[base], settings={**ARMS[base].settings, **own})
    except ValueError as error:
        raise InputError(
            f"--arms {name} can't be used ({error}): expected such as inmerge@skip_layers=5,merge_prob=0.1"
        ) from error
    if name != arm_name(base, own):  # the same arm under two names would be trained twice
        raise InputError(f"--arms {name} must be written as {arm_name(base, own)}")
    return arm


def arm_name(base: str, settings: Mapping[str, Any]) -> str:
    """The name of an arm with settings of its own, in the order of SETTINGS and TRAINING."""
    words = _COMMA.join(f"{name}{_IS}{settings[name]}" for name in _OWN if name in settings)
    return f"{base}{_AT}{words}" if words else base


def _own_settings(words: str) -> Iterator[tuple[str, Any]]:
    for word in words.split(_COMMA):
        name, equals, value = word.partition(_IS)
        if not equals or name not in _OWN:
            raise ValueError(f"{word!r} sets none of {', '.join(_OWN)}")
        yield name, setting_of(name, value)


def setting_of(name: str, text: str) -> int | float | str:
    """An arm's setting from its text: a number, or for thresholds a text as "4sd"; a ValueError where it is neither."""
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        return value if name == "skip_layers" else float(value)
    if name == "similarity_threshold":
        parse_threshold(text)
        return text
    raise ValueError(f"{name} is {text!r}, but it must be a number")


def check_arms(options: Options) -> None:
    """Refuse unknown and repeated arms, a comparison that has no baseline, and options that none of the arms needs."""
    names = options.arms
    for name in names:
        _check_own_options(name, options)
    if len(set(names)) < len(names):
        raise InputError(f"--arms {' '.join(names)} names an arm twice")
    if BASELINE not in names:
        raise InputError(f"--arms must hold {BASELINE}, which the others are compared with")
    if options.cooldown_epochs and not merging_arms(options):
        raise InputError(
            f"--cooldown-epochs has no effect on --arms {' '.join(names)}, which don't merge: leave it out"
        )
    if options.merge_rounds is not None and not any(arm_of(name).rounds for name in names):
        raise InputError(
            f"--merge-rounds has no effect on --arms {' '.join(names)}: add validation-rounds, or leave it out"
        )


def _check_own_options(name: str, options: Options) -> None:
    arm = arm_of(name)
    if arm.settings.keys() & set(TRAINING):
        try:
            check_options(own_options(arm, options))
        except InputError as error:
            raise InputError(f"--arms {name} can't be used ({error})") from error


def merging_arms(options: Options) -> list[Arm]:
    """Those of the trial's arms that merge."""
    return [arm for name in options.arms if (arm := arm_of(name)).criterion]


def own_options(arm: Arm, options: Options) -> Options:
    """The options that an arm trains with: those of the trial, but for what it trains with for its own."""
    return replace(options, **{name: value for name, value in arm.settings.items() if name in TRAINING})


def merge_settings(arm: Arm, options: Options) -> dict[str, Any]:
    """What an arm merges with: the options, but for the settings of its own."""
    return {name: arm.settings.get(name, getattr(options, name)) for name in SETTINGS}


def wrap_optimizer(arm: Arm, optimizer: Optimizer, model: nn.Module, options: Options, seed: int) -> Optimizer:
    """The optimizer that an arm trains with; a merging one is wrapped before accelerate prepares it."""
    if arm.criterion is None:
        return optimizer
    settings = merge_settings(arm, options) | {"criterion": arm.criterion, "seed": seed}
    try:
        if arm.control:
            return ControlOptimizer(optimizer, model, arm.control, **settings)
        return InMergeOptimizer(optimizer, model, **settings)
    except (ValueError, TypeError) as error:
        raise InputError(f"{options.model} can't be merged with these options: {error}") from error
