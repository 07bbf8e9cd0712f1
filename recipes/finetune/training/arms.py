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
from ..options import BASELINE, Options, SomeOptions, check_options
from ..runs.layout import BACKBONE
from .averages import Average
from .controls import Control, ControlOptimizer

SETTINGS = ("skip_layers", "merge_prob", "merge_weight", "similarity_threshold")  # of merging
ROUNDS = "merge_rounds"
TRAINING = ("weight_decay", "smoothing")  # that any arm may have for its own
_OWN = (*SETTINGS, ROUNDS, *TRAINING)
_AT, _COMMA, _IS = "@", ",", "="  # of an arm's name that tells its settings
COMPACT = "compact"
# How an arm's model is made smaller: by what a merging arm has made equal; or, to the size that this gave, by pruning
# the backbone's channels of the smallest norms, or random ones, or by making those equal that k-means puts together.
WAYS = (COMPACT, "l1-pruned", "l2-pruned", "random-pruned", "kmeans")


@dataclass(frozen=True)
class Arm:
    """One way to spend the E2 epochs after the backbone stage.

    Attributes:
        criterion: which pairs are merged after each step; None: nothing is merged.
        average: the average of weights over training that is evaluated and kept; None: the weights as trained.
        settings: of SETTINGS, ROUNDS and TRAINING those that the arm has for its own, in place of the options'; so a
            sweep is one trial.
        rounds: whether it also merges without a step after each epoch, before it is evaluated.
        control: what stands in for each merge, see controls.py.
        smaller: how its model is made smaller before its first epoch; None: it isn't.
    """

    criterion: Criterion | None = None
    average: Average | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    rounds: bool = False
    control: Control | None = None
    smaller: "Reduction | None" = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.settings) - set(_OWN))
        if unknown:
            raise ValueError(f"an arm can't set {unknown[0]} for itself: expected any of {', '.join(_OWN)}")
        if ROUNDS in self.settings and not self.rounds:
            raise ValueError(f"an arm that makes no rounds has no use for {ROUNDS}: leave it out")
        unused = [name for name in self.settings if name in SETTINGS]
        unused += [name for name in ("rounds", "control") if getattr(self, name)]
        if unused and self.criterion is None:
            raise ValueError(f"an arm that merges nothing has no use for {', '.join(unused)}: leave it out")


@dataclass(frozen=True)
class Reduction:
    """How an arm's model is made smaller.

    Attributes:
        way: one of WAYS.
        merging: how the arm merges whose kernels are taken out, or whose size is aimed at.
        needs: the arm that must be finished before: that one, or the one that was made smaller by it.
    """

    way: str
    merging: Arm
    needs: str


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
    way = _way_of(name)
    if way:
        return _smaller_arm(name, way)
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


def _way_of(name: str) -> str | None:
    """How the arm of that name is made smaller, as "compact" of inmerge-compact@similarity_threshold=0.2."""
    base = name.partition(_AT)[0]
    return next((way for way in WAYS if base not in ARMS and base.endswith(f"-{way}")), None)


def _smaller_arm(name: str, way: str) -> Arm:
    base, at, settings = name.partition(_AT)
    source = base.removesuffix(f"-{way}") + at + settings
    merging = arm_of(source)
    if merging.criterion is None:
        raise InputError(f"--arms {name} can't be used: {source} merges nothing, so that nothing is equal in it")
    if merging.control:
        raise InputError(f"--arms {name} can't be used: {source} is a control of merging, which makes nothing equal")
    own = {name: value for name, value in merging.settings.items() if name in TRAINING}
    needs = source if way == COMPACT else smaller_name(source, COMPACT)
    return Arm(settings=own, smaller=Reduction(way, merging, needs))


def smaller_name(source: str, way: str) -> str:
    """The name of the arm that is made smaller in some way by, or to the size of, a merging arm."""
    base, at, settings = source.partition(_AT)
    return f"{base}-{way}{at}{settings}"


def with_compacted_arms(options: SomeOptions) -> SomeOptions:
    """The options with the arms that --compact stands for, each behind the merging arm whose model it makes smaller."""
    if not options.compact:
        return options
    arms: list[str] = []
    for name in options.arms:
        arms.append(name)
        arm = arm_of(name)
        if arm.criterion and not arm.control and smaller_name(name, COMPACT) not in options.arms:
            arms.append(smaller_name(name, COMPACT))
    return replace(options, arms=tuple(arms))


def reduction_of(arm: str) -> Reduction | None:
    """How the model of an arm, which need not be known here, is made smaller; None: it isn't."""
    way = _way_of(arm)
    return _smaller_arm(arm, way).smaller if way else None


def needed_stage(arm: str) -> str:
    """The stage that must be done before an arm's begins: the backbone, or that of another arm."""
    smaller = reduction_of(arm)
    return smaller.needs if smaller else BACKBONE


def arm_name(base: str, settings: Mapping[str, Any]) -> str:
    """The name of an arm with settings of its own, in the order of SETTINGS, ROUNDS and TRAINING."""
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
    if name == ROUNDS:
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(f"{name} is {text!r}, but it must be an int from 1")
        return int(text)
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
    _check_smaller_arms(options)


def _check_smaller_arms(options: Options) -> None:
    names = options.arms
    if options.compact and not merging_arms(options):
        raise InputError(f"--compact has no effect on --arms {' '.join(names)}, which don't merge: leave it out")
    for place, name in enumerate(names):
        if reduction_of(name) and not options.compact:
            raise InputError(f"--arms {name} needs --compact, by which merging makes channels equal: add it")
        needed = needed_stage(name)
        if needed not in (BACKBONE, *names[:place]):
            raise InputError(f"--arms {name} is made from what {needed} leaves: name that one before it")


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


def rounds_after_epoch(arm: Arm, options: Options, val_images: int) -> int:
    """How often an arm merges without a step after each epoch."""
    return arm.settings.get(ROUNDS, options.merge_rounds or val_images) if arm.rounds else 0


def wrap_optimizer(arm: Arm, optimizer: Optimizer, model: nn.Module, options: Options, seed: int) -> Optimizer:
    """The optimizer that an arm trains with; a merging one is wrapped before accelerate prepares it."""
    if arm.criterion is None:
        return optimizer
    settings = merge_settings(arm, options) | {"criterion": arm.criterion, "seed": seed}
    settings["merge_channels"] = options.compact
    try:
        if arm.control:
            return ControlOptimizer(optimizer, model, arm.control, **settings)
        return InMergeOptimizer(optimizer, model, **settings)
    except (ValueError, TypeError) as error:
        raise InputError(f"{options.model} can't be merged with these options: {error}") from error
