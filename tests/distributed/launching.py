"""Checks in several real processes: pytest starts this script by torchrun, each process runs checks and reports."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

LIMIT = 240  # seconds for one launch, on a busy machine too
_GRACE = 30


def torchrun(script: str, *arguments: str, processes: int, nodes: int = 1) -> str:
    """Run a script in processes of so many nodes, all on the loopback address; return its output.

    Args:
        script: its path, absolute or from this folder.
    """
    where = ["--standalone"] if nodes == 1 else ["--master-addr=127.0.0.1", f"--master-port={_free_port()}"]
    agent = [sys.executable, "-m", "torch.distributed.run", *where, f"--nnodes={nodes}"]
    task = [f"--nproc-per-node={processes}", str(Path(__file__).parent / script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryFile("w+") as output:
        agents = [
            subprocess.Popen(
                [*agent, f"--node-rank={node}", *task],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )
            for node in range(nodes)
        ]
        try:
            for agent in agents:
                agent.wait(LIMIT + _GRACE)  # processes that hang end themselves before: see run_checks
        finally:
            for agent in agents:
                agent.terminate()  # torchrun takes its processes along
            for agent in agents:
                agent.wait(_GRACE)
        output.seek(0)
        return output.read()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end_when_stuck() -> None:
    """Let this process end at the limit with a word on where it hung, so that none outlives the tests."""
    faulthandler.dump_traceback_later(LIMIT, exit=True)


def checks_of(module: str) -> dict[str, Callable[[], None]]:
    """Return a module's checks by what they show: its own functions whose names start with check_."""
    return {
        name.removeprefix("check_"): function
        for name, function in vars(importlib.import_module(module)).items()
        if name.startswith("check_") and function.__module__ == module
    }


def run_checks(folder: str, *modules: str) -> None:
    """Run the checks of modules in this process as one rank of several, and write into a folder what failed.

    The first failure ends the launch: the other ranks may be waiting for this one.
    """
    end_when_stuck()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    report = Path(folder) / f"{dist.get_rank()}.json"
    found: dict[str, str] = {}
    for name, check in ((name, check) for module in modules for name, check in checks_of(module).items()):
        try:
            check()
            dist.barrier()
            found[name] = ""
        except BaseException:
            found[name] = f"on rank {dist.get_rank()}:\n{traceback.format_exc()}"
        report.write_text(json.dumps(found))
        if found[name]:
            os._exit(1)
    dist.destroy_process_group()


@contextlib.contextmanager
def shared_folder() -> Iterator[Path]:
    """Make a folder that all ranks of a launch see, for as long as all of them need it."""
    with tempfile.TemporaryDirectory() as folder:
        names = [folder]
        dist.broadcast_object_list(names)
        yield Path(names[0])
        dist.barrier()


@functools.cache
def outcomes(modules: tuple[str, ...], processes: int) -> dict[str, str]:
    """Launch the checks of modules once, and return by name what failed on any rank: an empty text if all went well.

    Checks that were not reached are missing; the launch's own output stands under the empty name.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = torchrun("launching.py", folder, *modules, processes=processes)
        reports = [json.loads(report.read_text()) for report in sorted(Path(folder).iterdir())]
    failures = {name: "".join(report.get(name, "") for report in reports) for report in reports for name in report}
    finished = {name for name in failures if len(reports) == processes and all(name in report for report in reports)}
    return {name: text for name, text in failures.items() if text or name in finished} | {"": output}


if __name__ == "__main__":
    run_checks(*sys.argv[1:])
