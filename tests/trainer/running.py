"""Runs jobs in real processes that can be killed: forked from a server that has imported torch already."""

from __future__ import annotations

import atexit
import dataclasses
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from colossus import api
from colossus.checkpoints.load import newest_whole
from colossus.job import Job
from colossus.measure.machine import table_path, this_machine
from colossus.parallel.program import decoders
from colossus.trainer.hooks import Hook
from colossus.trainer.run import Run
from colossus.trainer.step import StepResult
from colossus.trainer.training import Training

SECONDS = 200.0  # until all ranks have ended
GRACE_SECONDS = 20.0  # that the other ranks have, once one was killed

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    [
        "torch._dynamo",  # that every optimizer imports
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "colossus.api",
        "colossus.generation",
        "colossus.launcher.local",
        "colossus.monitor.report",
        "colossus.trainer.loop",
    ]
)


class StopAt(Hook):
    """Ends the run after so many steps, as a scheduler would; it can be pickled to every rank. Several ranks
    take one step more after the one in which they are asked."""

    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, training: Training, result: StepResult) -> None:
        if training.step == self.step - (training.world.size > 1):
            training.ask_to_stop("asked")


@dataclasses.dataclass
class Kill(Hook):
    """Ends the process by `kill -9`, as a failing machine would.

    where: "before" a step, once saves under way are whole; within a "step"; in an "evaluation" after it, or
    in a "save" (its third sync: all is written but for the commit); "decided": before the step from which
    on the decay was decided, and `step` steps later.
    """

    where: str
    step: int
    rank: int = 0

    def on_start(self, training: Training) -> None:
        def forward(*_: Any) -> None:
            here = "step" if training.state.model.training else "evaluation"
            if here == self.where and training.step >= self.step:
                self._now(training)

        for model in decoders(training.state.model):
            model.register_forward_pre_hook(forward)

    def before_step(self, training: Training) -> None:
        if self.where == "before" and training.step == self.step:
            training.saver.wait()
            training.world.sum([0.0])  # waits for all ranks
            self._now(training)
        if self.where == "save" and training.step == self.step - 1 and training.world.rank == self.rank:
            _kill_at_sync(3)
        if self.where == "decided":
            decay = training.decisions.get("decay", training.step)
            if decay is not None and training.step >= decay["begin_step"] + self.step:
                self._now(training)

    def _now(self, training: Training) -> None:
        if training.world.rank == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)
        # In a pipeline the one to be killed may wait for what this one sends.
        if self.where == "before" or training.job.layout.pp == 1:
            time.sleep(60)  # until that is noticed


def _kill_at_sync(count: int) -> None:
    real = os.fsync
    calls = 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)

    os.fsync = fsync  # type: ignore[assignment]


def train_in_processes(job: Job, hooks: Sequence[Hook] = (), follow: Path | None = None) -> list[int]:
    """Trains in one real process a rank, as torchrun starts them; returns their exit codes (-9: killed)."""
    started = start(job, hooks, follow)
    end = time.monotonic() + SECONDS
    while any(process.exitcode is None for process in started):
        if any(process.exitcode for process in started):  # the others may wait for it in vain
            end = min(end, time.monotonic() + GRACE_SECONDS)
        if any(process.exitcode == -signal.SIGKILL for process in started) or time.monotonic() > end:
            for process in started:
                process.kill()
        time.sleep(0.005)
    return [process.exitcode or 0 for process in started]


def start(job: Job, hooks: Sequence[Hook] = (), follow: Path | None = None) -> list[BaseProcess]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {"COLOSSUS_CACHE": kept_machine()}
    environment["PYTEST_CURRENT_TEST"] = os.environ.get("PYTEST_CURRENT_TEST", "")  # for tools/recording
    started: list[BaseProcess] = [
        _processes.Process(target=_rank, args=(job, list(hooks), follow, rank, port, environment))
        for rank in range(job.layout.num_ranks)
    ]
    for process in started:
        process.start()
    return started


def _rank(
    job: Job, hooks: list[Hook], follow: Path | None, rank: int, port: int, environment: dict[str, str]
) -> None:
    os.environ |= environment
    if job.layout.num_ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job.layout.num_ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    api.train(job, hooks, follow=follow)


@cache
def kept_machine() -> str:
    """A cache folder with the table of this machine, so that no process of a test measures it again."""
    folder = Path(tempfile.mkdtemp(prefix="colossus-cache-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "machines" / table_path().name
    path.parent.mkdir()
    path.write_text(dataclasses.replace(this_machine(), quiet=True).to_json())
    return str(folder)


def follower_of(job: Job, folder: Path) -> Job:
    """The job of a new run in `folder` that follows the job.toml of a run, as `--exact` makes it."""
    kept = api.load_job(Path(job.run.folder) / "job.toml")
    return api.resolve(kept.put({"run.folder": str(folder)}, "argument"), exact=True)


def run_of(job: Job) -> Run:
    return Run(Path(job.run.folder))


def state_of(job: Job) -> tuple[int, dict[Any, torch.Tensor]]:
    """Step and every tensor of the newest checkpoint."""
    checkpoint = newest_whole(job.run.folder)
    assert checkpoint is not None
    return checkpoint.step, {key: checkpoint.read(*key) for key in checkpoint.names()}


def _kernels(job: Job) -> dict[str, Any]:
    """What was chosen before the first step, of which the bits depend."""
    first = next(e["value"] for e in run_of(job).events("decision") if e["name"] == "machine")
    return {name: first.get(name) for name in ("type", "threads", "attention", "equal_groups")}


def assert_bitwise_equal(one: Job, other: Job) -> None:
    """Every loss that was logged, and all that the last checkpoint holds."""
    assert _kernels(one) == _kernels(other)
    losses, others = run_of(one).loss, run_of(other).loss
    assert losses and losses == others
    (step, tensors), (other_step, expected) = state_of(one), state_of(other)
    assert step == other_step and tensors.keys() == expected.keys()
    for key, tensor in tensors.items():
        assert tensor.dtype == expected[key].dtype and torch.equal(tensor, expected[key]), key
