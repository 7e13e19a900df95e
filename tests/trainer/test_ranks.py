"""Several ranks on this machine through `api.train`: started, followed, stopped and reported as one run."""

from __future__ import annotations

import atexit
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from colossus import api
from colossus.checkpoints.format import DamagedCheckpoint
from colossus.errors import MachineError, UserError
from colossus.job import Job
from colossus.launcher.local import FAREWELL_SECONDS
from colossus.trainer.hooks import Hook
from colossus.trainer.training import Training
from tests.trainer.running import kept_machine, run_of

Make = Callable[..., Job]


class Leave(Hook):
    """Pickled to every rank: each leaves a file, and may then fail, die or have the parent stopped."""

    def __init__(self, folder: Path, at: int = -1, how: str = "") -> None:
        self.folder, self.at, self.how, self.parent = folder, at, how, os.getpid()

    def before_step(self, training: Training) -> None:
        (self.folder / f"rank-{training.world.rank}").write_text(str(os.getpid()))
        if training.step != self.at:
            return
        training.saver.wait()
        training.world.sum([0.0])  # waits for all ranks
        if self.how == "user error":
            raise UserError("data.seq_len=1: a reason")
        if self.how == "machine error" and training.world.rank == 1:
            raise DamagedCheckpoint("the disk of rank 1:\n  both of its files")
        if self.how == "bug" and training.world.rank == 1:
            atexit.register(os.abort)  # as libraries may end a process while Python is taken down
            raise ZeroDivisionError("a bug")
        if self.how == "kill" and training.world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "signal" and training.world.rank == 0:
            os.kill(self.parent, signal.SIGTERM)


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLOSSUS_CACHE", kept_machine())


def two_ranks(small_job: Make, *settings: str) -> Job:
    return small_job("run", "layout.dp_shard=2", *settings)


def test_hooks_reach_the_ranks_and_events_come_back(small_job: Make, tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run = api.train(two_ranks(small_job), [Leave(tmp_path)], listeners=[heard.append])
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert run.outcome == "finished" and sorted(run.loss) == list(range(12))
    pids = {(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)}
    assert len(pids) == 2 and str(os.getpid()) not in pids
    assert heard == run.events()
    assert run.events("start")[0]["num_ranks"] == 2


@pytest.mark.parametrize("shares", [(1, 3), (None, None)], ids=["given", "measured"])
def test_unequal_replicas_train_as_one_rank_does(
    small_job: Make, shares: tuple[int | None, int | None]
) -> None:
    """The second computes more at once, and recomputes; in float64."""
    small = [{"replicas": 1}, {"replicas": 1, "micro_batch": 2, "recompute": "full"}]
    pools = [pool | ({"share": share} if share else {}) for pool, share in zip(small, shares, strict=True)]
    exact = ("precision.type=fp64", "run.steps=4", "run.global_batch=4", "layout.micro_batch=1")
    alone = api.train(small_job("alone", *exact))
    job = small_job("run", "layout.dp_replicate=2", "layout.dp_shard=1", *exact)
    run = api.train(job.put({"layout.pools": pools}, "argument"))
    assert run.loss == pytest.approx(alone.loss, rel=1e-12)
    decided = [event["value"] for event in run.events("decision") if event["name"] == "shares"]
    assert decided == [] if shares[0] else sum(decided[0]) == 4


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("user error", UserError, "data.seq_len=1: a reason"),
        ("machine error", MachineError, "the disk of rank 1:\n  both of its files"),
        ("bug", MachineError, "rank 1 ended with exit code 1: Traceback"),
        ("kill", MachineError, "rank 1 ended with exit code -9"),
    ],
)
def test_what_a_rank_raises_is_raised_here_whole(
    how: str, kind: type[Exception], message: str, small_job: Make, tmp_path: Path
) -> None:
    job = two_ranks(small_job)
    with pytest.raises(kind) as caught:
        api.train(job, [Leave(tmp_path, 6, how)])
    assert type(caught.value) is kind
    said = str(caught.value)
    if how == "bug":
        assert said.startswith(message) and "in before_step\n" in said and "ZeroDivisionError: a bug" in said
    else:
        assert said.startswith(message) and said.count("\n") == message.count("\n")
    if how == "kill":
        assert api.train(job).outcome == "finished"
        assert [e["step"] for e in run_of(job).events("resume")] == [4]


class FinishLate(Hook):
    """The first rank has something left to do when the others are gone."""

    def on_finish(self, training: Training) -> None:
        if training.world.rank == 0:
            time.sleep(FAREWELL_SECONDS + 1)


def test_a_rank_that_ends_late_is_waited_for(small_job: Make) -> None:
    assert api.train(two_ranks(small_job), [FinishLate()]).outcome == "finished"


def test_a_signal_to_the_parent_saves(small_job: Make, tmp_path: Path) -> None:
    job = two_ranks(small_job, "run.steps=100000", "checkpoint.steps=0", "run.validate_every=0")
    began = time.monotonic()
    run = api.train(job, [Leave(tmp_path, 9, "signal")])
    stopped = run.events("end")[0]["time"]
    assert time.time() - stopped < 15 and time.monotonic() - began < 100
    assert run.outcome == "SIGTERM"
    assert run.events("checkpoint")[-1]["saved_step"] == max(run.loss) + 1
