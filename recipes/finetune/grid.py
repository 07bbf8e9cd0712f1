"""Where trials run: in this process, one after another, or as tasks on Ray.

On Ray a task is a part of a trial: its beginning, a stage, or its judging. Each is a fresh process, which Ray starts
again when it or its node dies, and which goes on from the stage's last checkpoint. The process here holds the lock of
each run folder, and a task that of its stage, so that no stage is ever trained by two. Tasks and this process share the
file system of the run folders, and nothing else.
"""

import logging
import os
import pickle
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import inmerge_optim

from .data.images import ImageData
from .errors import InputError, damage_told, first_line
from .options import Options
from .reports.progress import GridProgress
from .runs.layout import BACKBONE
from .runs.lock import RunHeld, hold_run
from .runs.settings import check_run_folder
from .signals import Stopped
from .training.arms import needed_stage, with_compacted_arms
from .training.peers import LostPeer, failed_alike
from .trial import BEGIN, JUDGE, AddSections, Part, check_trial, run_part, run_trial, tell_trial

_RETRIES = 20  # of a task whose process or node died
_PAUSE = 5.0  # seconds until a task is tried again whose stage is still held, by a process that is ending
_KNOCK = 10.0  # seconds until a machine that doesn't answer is taken for out of reach
_LOOK = 1.0  # seconds between two looks at the tasks
_NO_GPU_UNASKED = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}  # else a task that asked for none sees them all


@dataclass(frozen=True)
class Trial:
    """A trial that a recipe asks for: the arguments of run_trial. For Ray its functions must be ones to be pickled."""

    options: Options
    load_data: Callable[[], ImageData]
    name: str
    main_first: bool = True
    add_sections: AddSections | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", with_compacted_arms(self.options))

    @property
    def folder(self) -> Path:
        return self.options.output or Path("runs") / self.name


@dataclass(frozen=True)
class Failure:
    """What ended a trial.

    Attributes:
        sentence: in one line.
        trace: where it came from.
        alone: whether it ended in this process of a launch and not in all of them, which then wait for this one: it
            must end, and the launch with it.
    """

    sentence: str
    trace: str
    alone: bool = False


Outcome = Failure | RunHeld | None  # None: it was judged


def run_on_engine(trial: Trial) -> None:
    """Run a trial where --engine says, and print its table."""
    if trial.options.engine == "here":
        _run_here(trial)
        return
    check_trial(trial.options)
    for _, outcome in run_on_ray([trial]):
        if isinstance(outcome, RunHeld):
            raise outcome
        if outcome is not None:
            raise InputError(outcome.sentence)
    tell_trial(trial.folder)


def run_or_fail(trial: Trial) -> Outcome:
    """Run a trial in this process, one of several; what ended it."""
    try:
        _run_here(trial)
    except RunHeld as held:
        return held
    except LostPeer:  # the launch ends, and what is told of the trial is the other's
        raise
    except Exception as error:  # whatever a model, a device or a data set raises: the other trials go on
        sentence = first_line(error)
        return Failure(sentence, traceback.format_exc(), alone=not failed_alike(trial.name, sentence))
    return None


def _run_here(trial: Trial) -> None:
    options, load_data, name = trial.options, trial.load_data, trial.name
    run_trial(options, load_data, name, main_first=trial.main_first, add_sections=trial.add_sections)


def run_on_ray(trials: Sequence[Trial]) -> Iterator[tuple[Trial, Outcome]]:
    """Run trials that were checked on Ray, as many parts at once as there is room for; each with its outcome.

    A folder that another launch holds is left to it. Folders are checked here, once they are held: what a trial's
    beginning finds there later is its own, from before its process was killed.
    """
    try:
        with ExitStack() as stack:
            mine = []
            for trial in trials:
                try:
                    stack.enter_context(hold_run(trial.folder))
                    with damage_told(trial.folder):
                        check_run_folder(trial.folder, trial.options, launch={})
                except RunHeld as held:
                    yield trial, held
                except InputError as error:
                    yield trial, Failure(str(error), traceback.format_exc())
                else:
                    mine.append(replace(trial, options=replace(trial.options, output=trial.folder.absolute())))
            if mine:
                ray = stack.enter_context(_connected(mine[0].options))  # which ends its tasks before the locks go
                yield from _work(ray, mine)
    except Stopped as stop:
        stop.kept = "the run folders keep all up to the last whole epochs: give the same command again with --resume"
        raise


def _work(ray: Any, trials: list[Trial]) -> Iterator[tuple[Trial, Outcome]]:
    """Start each part as soon as those before it are done."""
    progress = GridProgress({trial.name: trial.options for trial in trials})
    left = {trial.name: _stages(trial) for trial in trials}
    unbegun = list(trials)  # these begin one by one, for they may fetch the same data
    ready: list[tuple[float, Trial, Part]] = []  # from when on
    tasks: dict[Any, tuple[Trial, Part]] = {}
    ended: set[str] = set()
    while len(ended) < len(trials):
        if unbegun and not any(part == BEGIN for _, part in tasks.values()):
            ready.append((0.0, unbegun.pop(0), BEGIN))
        now = time.monotonic()
        for _, trial, part in [entry for entry in ready if entry[0] <= now]:
            tasks[_submit(ray, trial, part)] = trial, part
        ready = [entry for entry in ready if entry[0] > now]
        progress.show([(trial.name, part) for trial, part in tasks.values()])
        for task in ray.wait(list(tasks), timeout=_LOOK)[0] if tasks else _wait():
            trial, part = tasks.pop(task)
            outcome, more = _outcome(ray, task)
            if isinstance(outcome, RunHeld):
                ready.append((time.monotonic() + _PAUSE, trial, part))
            elif outcome is not None:
                if trial.name not in ended:
                    ended.add(trial.name)
                    progress.end(trial.name, "failed")
                    yield trial, outcome
            elif trial.name not in ended:  # of one that has failed, what still runs is of no use
                progress.count(trial.name, part)
                left[trial.name] -= {part}
                following = _following(trial, part, left[trial.name]) if more else []
                ready += [(0.0, trial, other) for other in following]
                if part == JUDGE or not more:
                    ended.add(trial.name)
                    progress.end(trial.name, "done")
                    yield trial, None
    progress.show([])


def _wait() -> list[Any]:
    time.sleep(_LOOK)
    return []


def _stages(trial: Trial) -> set[Part]:
    return {(seed, stage) for seed in trial.options.seeds for stage in (BACKBONE, *trial.options.arms)}


def _following(trial: Trial, part: Part, left: set[Part]) -> list[Part]:
    """What can be run once a part is done: backbones, then the arms that need it, and when none is left the judging."""
    if isinstance(part, str):
        return [(seed, BACKBONE) for seed in trial.options.seeds] if part == BEGIN else []
    seed, stage = part
    return [(seed, arm) for arm in trial.options.arms if needed_stage(arm) == stage] if left else [JUDGE]


def _submit(ray: Any, trial: Trial, part: Part) -> Any:
    """Start a part as a task in a process of its own, which Ray starts again if it dies."""
    options = trial.options
    paths = [str(Path(file).parents[1]) for file in (__file__, inmerge_optim.__file__)]
    module, folder, threads = __name__, os.getcwd(), options.cpus_per_task
    content = ray.cloudpickle.dumps((options, trial.load_data, part, trial.add_sections))

    # Travels by value, since the new process has to find this project first.
    def work(content: bytes) -> tuple[Any, bool]:
        import importlib
        import sys

        sys.path[:0] = [path for path in paths if path not in sys.path]
        return importlib.import_module(module).work_on(content, folder, threads)

    settings = {"num_cpus": options.cpus_per_task, "num_gpus": options.gpus_per_task, "max_calls": 1}
    return ray.remote(**settings, max_retries=_RETRIES)(work).options(name=f"{trial.name} {part}").remote(content)


def work_on(content: bytes, folder: str, threads: int) -> tuple[Outcome, bool]:
    """In a process of Ray: run a part of a trial; what ended it, and whether there is more to do.

    Args:
        folder: where the command was given, which relative paths start from.
    """
    torch.set_num_threads(threads)
    try:
        os.chdir(folder)
        return None, run_part(*pickle.loads(content))
    except RunHeld as held:
        return held, True
    except Exception as error:  # whatever a model, a device or a data set raises
        return Failure(first_line(error), traceback.format_exc()), False


def _outcome(ray: Any, task: Any) -> tuple[Outcome, bool]:
    try:
        return ray.get(task)
    except Exception as error:  # its process died too often, or Ray could not start it
        *_, reason = str(error).strip().splitlines() or [type(error).__name__]
        return Failure(f"a task on Ray could not be run ({reason})", str(error)), False


@contextmanager
def _connected(options: Options) -> Iterator[Any]:
    """Ray, at the address or started here, until the trials are at an end."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("--engine ray starts its own processes: give the command without a launcher")
    try:
        import ray
    except ImportError as error:
        raise InputError(
            f"--engine ray needs Ray, and it can't be imported ({first_line(error)}): pip install "
            '"inmerge_optim[cluster]"'
        ) from error
    if options.ray_address not in (None, "auto"):
        _check_address(options.ray_address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    settings: dict[str, Any] = {} if options.ray_address else {"include_dashboard": False}
    settings["runtime_env"] = {"env_vars": _NO_GPU_UNASKED}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(options.ray_address, log_to_driver=False, logging_level=logging.ERROR, **settings)
    except Exception as error:  # Ray raises many kinds, of a wrong address and of one that doesn't answer
        raise _unreachable(options.ray_address or "this machine", error) from error
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray has put its own there
        _check_room(ray, options)
        yield ray
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Knock first: Ray itself takes minutes to find that nobody is there."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(f"--ray-address {address} must be host:port, such as 10.0.0.1:6379, or auto")
    try:
        socket.create_connection((host, int(port)), timeout=_KNOCK).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise _unreachable(address, error) from error


def _unreachable(where: str, error: Exception) -> InputError:
    return InputError(
        f"--engine ray can't reach a Ray at {where} ({first_line(error)}): start one by ray start --head, give its "
        "address, or leave --ray-address out"
    )


def _check_room(ray: Any, options: Options) -> None:
    """Refuse tasks that no node has room for, which would wait for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for name, option, wanted in (
        ("CPU", "--cpus-per-task", options.cpus_per_task),
        ("GPU", "--gpus-per-task", options.gpus_per_task),
    ):
        most = max((node.get(name, 0.0) for node in nodes), default=0.0)
        if wanted > most:
            raise InputError(f"{option} {wanted:g} is more than the {most:g} of any node of this Ray: choose fewer")
