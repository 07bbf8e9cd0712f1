"""What a stage leaves of a smaller model: its file, its size, its speed, and the model for other runtimes."""

import copy
import io
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from inmerge_optim.compacted_files import save_compacted

from ..errors import first_line
from ..files import PARTIAL, read_json, storage_errors, write_json
from ..runs.layout import ONNX, PROGRAM, TIMING, WEIGHTS
from .arms import COMPACT
from .models import create_model
from .session import Session
from .smaller import input_size, write_size

LATENCY = "latency"  # in TIMING
_BATCHES = (1, 32)
_SECONDS = 0.5  # that each batch size is timed for, at least
_FEWEST = 5  # passes of each model


def write_smaller(session: Session) -> None:
    """Write all that tells of a smaller model but its result; the main process calls it."""
    folder, options = session.stage.folder, session.options
    smaller = _as_made(session)
    settings = {"num_classes": len(session.data.task.classes), "in_chans": options.in_chans}
    description = {"model": options.model, "settings": settings, "input_size": input_size(options, session.data)}
    folder.mkdir(parents=True, exist_ok=True)
    with storage_errors(folder / WEIGHTS):
        save_compacted(folder / WEIGHTS, smaller, session.smaller, description)
    write_size(folder, session.smaller)
    if session.stage.arm.smaller.way != COMPACT:
        return
    inputs = torch.zeros(input_size(options, session.data))
    for name, write in ((PROGRAM, _write_program), (ONNX, _write_onnx)):
        _write_if_possible(session, folder / name, partial(write, model=smaller, inputs=inputs))
    whole = create_model(options, session.data, pretrained=False).eval()
    write_json(folder / TIMING, {**read_json(folder / TIMING), LATENCY: _latencies(whole, smaller, inputs[:1])})


def _as_made(session: Session) -> nn.Module:
    """A copy of the stage's model on the host as the whole one is made: contiguous, without accelerate's autocast."""
    copied = copy.deepcopy(session.bare_model).cpu().eval().to(memory_format=torch.contiguous_format)
    made: nn.Module = session.accelerator.unwrap_model(copied, keep_fp32_wrapper=False)
    return made


def _write_if_possible(session: Session, path: Path, write: Callable[[Path], None]) -> None:
    """Write a file beside its place and rename it; say why where the model can't be told so: the run goes on."""
    if path.name == ONNX and not (find_spec("onnx") and find_spec("onnxscript")):
        session.accelerator.print(f"{session.stage.title}: no {ONNX}, which needs pip install onnx onnxscript")
        return
    beside = path.with_name(f"{path.stem}{PARTIAL}{path.suffix}")  # torch asks for its own suffix
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            write(beside)
        beside.replace(path)
    except Exception as error:  # whatever torch raises on a model that it can't follow
        beside.unlink(missing_ok=True)
        session.accelerator.print(f"{session.stage.title}: no {path.name} ({first_line(error)})")


def _write_program(path: Path, model: nn.Module, inputs: torch.Tensor) -> None:
    torch.export.save(torch.export.export(model, (inputs,), dynamic_shapes=_any_batch()), path)


def _write_onnx(path: Path, model: nn.Module, inputs: torch.Tensor) -> None:
    torch.onnx.export(
        model,
        (inputs,),
        path,
        input_names=["images"],
        output_names=["logits"],
        dynamo=True,
        dynamic_shapes=_any_batch(),
        external_data=False,
    )


def _any_batch() -> tuple[dict[int, torch.export.Dim], ...]:
    return ({0: torch.export.Dim.AUTO},)


def _latencies(whole: nn.Module, smaller: nn.Module, inputs: torch.Tensor) -> dict[str, list[float]]:
    """Per batch size the median milliseconds of a pass on one thread of the CPU, of the whole and the smaller model.

    They take turns, so that whatever else the machine does meets both.
    """
    found = {}
    with _one_thread(), torch.inference_mode():
        for size in _BATCHES:
            batch = inputs.expand(size, -1, -1, -1).contiguous()
            taken: list[list[float]] = [[], []]
            until = time.perf_counter() + _SECONDS
            while len(taken[0]) < _FEWEST or time.perf_counter() < until:
                for model, seconds in zip((whole, smaller), taken, strict=True):
                    start = time.perf_counter()
                    model(batch)
                    seconds.append(time.perf_counter() - start)
            found[str(size)] = [1000 * statistics.median(seconds) for seconds in taken]
    return found


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
