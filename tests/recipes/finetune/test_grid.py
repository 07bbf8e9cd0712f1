"""Trials in parts: in which order they are run, what becomes of failures, and that they end as in one process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from finetune import grid
from finetune.errors import InputError
from finetune.grid import Failure, Outcome, Trial, run_on_ray, run_or_fail
from finetune.options import Options, parse_options
from finetune.runs import settings
from finetune.runs.config import read_config, write_config
from finetune.runs.lock import RunHeld, hold_run
from finetune.sources.named import load_dataset
from finetune.sources.options import DatasetOptions
from finetune.trial import BEGIN, JUDGE, Part, run_part
from small_runs import QUICK, Killed, assert_same, kill_at, run_recipe

SMALL = ["--dataset", "digits", *QUICK, "--epochs", "1", "--inmerge-epochs", "1", "--limit-train", "200"]
Done = tuple[object, bool]


@dataclass(frozen=True, eq=False)
class Task:
    trial: Trial
    part: Part


class FakeRay:
    """Runs a task in this process when it is asked for, the newest one first."""

    def __init__(self, run: Callable[[Trial, Part], Done]) -> None:
        self.run, self.log = run, []

    def wait(self, tasks: list[Task], timeout: float) -> tuple[list[Task], list[Task]]:
        assert [task.part for task in tasks].count(BEGIN) <= 1  # they may fetch the same data
        return tasks[-1:], tasks[:-1]

    def get(self, task: Task) -> Done:
        self.log.append((task.trial.name, task.part))
        return self.run(task.trial, task.part)


@pytest.fixture
def on_fake_ray(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeRay]:
    def put(run: Callable[[Trial, Part], Done]) -> FakeRay:
        fake = FakeRay(run)

        @contextmanager
        def connected(options: Options) -> Iterator[FakeRay]:
            yield fake

        monkeypatch.setattr(grid, "_connected", connected)
        monkeypatch.setattr(grid, "_submit", lambda ray, trial, part: Task(trial, part))
        monkeypatch.setattr(grid, "_PAUSE", 0.0)
        return fake

    return put


def trials(tmp_path: Path, *names: str, seeds: tuple[int, ...] = (0, 1)) -> list[Trial]:
    return [Trial(Options(seeds=seeds, output=tmp_path / name), lambda: None, name) for name in names]


def test_parts_wait_for_those_before_them(tmp_path: Path, on_fake_ray: Callable[..., FakeRay]) -> None:
    fake = on_fake_ray(lambda trial, part: (None, True))
    outcomes = list(run_on_ray(trials(tmp_path, "a", "b")))
    assert {trial.name: outcome for trial, outcome in outcomes} == {"a": None, "b": None}
    for name in ("a", "b"):
        parts = [part for other, part in fake.log if other == name]
        assert len(parts) == 2 + 2 * 3
        assert parts[0] == BEGIN
        assert parts[-1] == JUDGE
        for seed in (0, 1):
            assert parts.index((seed, "backbone")) < min(parts.index((seed, arm)) for arm in ("baseline", "inmerge"))
    assert not list(tmp_path.rglob("inmerge.lock"))


def test_a_judged_trial_is_left_alone(tmp_path: Path, on_fake_ray: Callable[..., FakeRay]) -> None:
    fake = on_fake_ray(lambda trial, part: (None, False))
    assert [outcome for _, outcome in run_on_ray(trials(tmp_path, "a"))] == [None]
    assert fake.log == [("a", BEGIN)]


def test_a_failing_part_ends_its_trial_and_no_other(tmp_path: Path, on_fake_ray: Callable[..., FakeRay]) -> None:
    failure = Failure("no memory", "Traceback")
    fake = on_fake_ray(
        lambda trial, part: (failure, False) if (trial.name, part) == ("a", (0, "inmerge")) else (None, True)
    )
    outcomes = {trial.name: outcome for trial, outcome in run_on_ray(trials(tmp_path, "a", "b"))}
    assert outcomes == {"a": failure, "b": None}
    assert ("a", JUDGE) not in fake.log
    assert ("b", JUDGE) in fake.log


def test_a_stage_that_is_still_held_is_tried_again(tmp_path: Path, on_fake_ray: Callable[..., FakeRay]) -> None:
    tries: list[Part] = []

    def run(trial: Trial, part: Part) -> Done:
        tries.append(part)
        return (RunHeld("in use"), True) if part == (0, "baseline") and tries.count(part) < 3 else (None, True)

    on_fake_ray(run)
    assert [outcome for _, outcome in run_on_ray(trials(tmp_path, "a"))] == [None]
    assert tries.count((0, "baseline")) == 3


def test_a_folder_that_another_launch_holds_is_left_to_it(tmp_path: Path, on_fake_ray: Callable[..., FakeRay]) -> None:
    fake = on_fake_ray(lambda trial, part: (None, True))
    with hold_run(tmp_path / "a"):
        outcomes = {trial.name: outcome for trial, outcome in run_on_ray(trials(tmp_path, "a", "b"))}
    assert isinstance(outcomes["a"], RunHeld)
    assert outcomes["b"] is None
    assert {name for name, _ in fake.log} == {"b"}


def test_a_folder_with_a_run_is_refused_before_anything_is_begun(
    tmp_path: Path, on_fake_ray: Callable[..., FakeRay]
) -> None:
    fake = on_fake_ray(lambda trial, part: (None, True))
    asked = trials(tmp_path, "a", "b")
    asked[0].folder.mkdir()
    write_config(asked[0].folder, asked[0].options)
    outcomes = {trial.name: outcome for trial, outcome in run_on_ray(asked)}
    assert "holds a run: pass --resume to go on with it" in outcomes["a"].sentence
    assert outcomes["b"] is None
    assert {name for name, _ in fake.log} == {"b"}


def run_digits_on_ray(output: Path, *arguments: str) -> Outcome:
    """Run one trial, by whatever stands in for Ray."""
    options = parse_options(DatasetOptions, [*arguments, "--output", str(output)])
    try:
        [(_, outcome)] = run_on_ray([Trial(options, partial(load_dataset, options), output.name)])
    finally:
        torch.use_deterministic_algorithms(False)
    return outcome


@pytest.mark.parametrize("call", [1, 2])
def test_a_beginning_that_was_killed_as_it_wrote_is_begun_again(
    tmp_path: Path, on_fake_ray: Callable[..., FakeRay], monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """As Ray starts it again, and without --resume."""

    def run(trial: Trial, part: Part) -> Done:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        arguments = (trial.options, trial.load_data, part, None)
        with monkeypatch.context() as patch:
            kill_at(patch, settings, "write_json", call)  # after config.yaml, which makes the folder a run's
            with pytest.raises(Killed):
                run_part(*arguments)
        assert run_part(*arguments)
        return None, False

    on_fake_ray(run)
    assert run_digits_on_ray(tmp_path / "run", *SMALL) is None
    assert {"config.yaml", "data.json", "versions.json"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert read_config(tmp_path / "run")["resume"] is False


def test_parts_in_any_order_end_as_one_process_does(tmp_path: Path, on_fake_ray: Callable[..., FakeRay]) -> None:
    """The newest first, so that the second seed's arms come before the first one's; to the bit."""
    torch.set_num_threads(1)

    def run(trial: Trial, part: Part) -> Done:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return None, run_part(trial.options, trial.load_data, part, None)

    on_fake_ray(run)
    arguments = [*SMALL, "--seeds", "0", "1"]
    assert run_digits_on_ray(tmp_path / "parts", *arguments) is None
    run_recipe(*arguments, "--output", tmp_path / "whole", report=True)
    assert_same(tmp_path / "parts", tmp_path / "whole")


def test_a_stage_that_another_process_works_on_is_left_to_it(tmp_path: Path) -> None:
    """Be it without Ray: a launch that was killed may have left a task that is still at work."""
    with hold_run(tmp_path / "run/seed_0/backbone"), pytest.raises(SystemExit, match="2"):
        run_recipe(*SMALL, "--output", tmp_path / "run")
    assert not (tmp_path / "run/seed_0/backbone/state").exists()


def test_an_error_of_a_trial_is_an_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError("no room for\nthis")

    monkeypatch.setattr(grid, "run_trial", fail)
    (trial,) = trials(tmp_path, "a")
    outcome = run_or_fail(trial)
    assert (outcome.sentence, outcome.alone) == ("no room for", False)
    assert "MemoryError" in outcome.trace


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cpus_per_task": 0}, "--cpus-per-task must be at least 1"),
        ({"gpus_per_task": -1.0}, "--gpus-per-task at least 0"),
        ({"engine": "here", "ray_address": "auto"}, "--ray-address has no effect without --engine ray"),
        ({"engine": "here", "cpus_per_task": 2}, "--cpus-per-task has no effect without --engine ray"),
    ],
)
def test_options_of_the_engine_that_can_not_be(changes: dict[str, object], message: str) -> None:
    arguments = {"engine": "ray"} | changes
    words = [word for name, value in arguments.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    with pytest.raises(InputError, match=message):
        parse_options(DatasetOptions, ["--dataset", "digits", *words])


def test_ray_under_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="starts its own processes"), grid._connected(Options(engine="ray")):
        pass


def test_ray_that_is_not_there_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r'pip install "inmerge_optim\[cluster\]"'), grid._connected(Options()):
        pass


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", r"can't reach a Ray at 127.0.0.1:1 \(.*refused\): start one by ray start --head"),
        ("no.such.host.invalid:6379", r"can't reach a Ray at no.such.host.invalid:6379 \("),
        ("6379", "--ray-address 6379 must be host:port"),
        ("host:", "--ray-address host: must be host:port"),
        ("127.0.0.1:99999999", "can't reach a Ray at"),
        ("auto", r"can't reach a Ray at auto \(nobody there\)"),
    ],
)
def test_a_ray_that_can_not_be_reached_is_told_of(monkeypatch: pytest.MonkeyPatch, address: str, message: str) -> None:
    class Ray(ModuleType):
        def init(self, *_: object, **__: object) -> None:
            raise ConnectionError("nobody there\nat all")

    monkeypatch.setitem(sys.modules, "ray", Ray("ray"))
    with pytest.raises(InputError, match=message), grid._connected(Options(engine="ray", ray_address=address)):
        pass
