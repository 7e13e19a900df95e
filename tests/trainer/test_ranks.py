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
from colossus.errors import GOES_ON, MachineError
from colossus.job import Job
from colossus.trainer.hooks import Hook
from colossus.trainer.hooks.stop import SAME_SECONDS
from colossus.trainer.training import Training
from tests.trainer.running import run_of

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
        if self.how == "machine error" and training.world.rank == 1:
            atexit.register(os.abort)  # as libraries may end a process while Python is taken down
            raise MachineError("the disk of rank 1:\n  both of its files")
        if self.how == "kill" and training.world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "signal" and training.world.rank == 0:
            os.kill(self.parent, signal.SIGTERM)
        if self.how == "own signal" and training.world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


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
    ("how", "message"),
    [
        ("machine error", "the disk of rank 1:\n  both of its files; 1 other ended with it"),
        ("kill", f"rank 1 ended with exit code -9 (SIGKILL); 1 other ended with it; {GOES_ON}"),
    ],
)
def test_why_a_rank_ended_is_raised_here(
    how: str, message: str, small_job: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In one line, without a word of the others; see `tests/parallel/test_ending.py` for all that may be."""
    job = two_ranks(small_job, "run.recover=false")
    with pytest.raises(MachineError) as caught:
        api.train(job, [Leave(tmp_path, 6, how)])
    assert str(caught.value) == message
    assert "Traceback" not in capfd.readouterr().err
    if how == "kill":
        (fault,) = run_of(job).events("fault")
        assert (fault["culprit"], fault["goes_on"], fault["why"]) == (1, False, "run.recover=false")


class Kill(Hook):
    """Each of these ranks dies before its step, once or always; all note their process at each attempt."""

    def __init__(self, folder: Path, dies: dict[int, int], *, always: bool = False) -> None:
        self.folder, self.dies, self.always = folder, dies, always

    def on_start(self, training: Training) -> None:
        with (self.folder / f"rank-{training.world.rank}").open("a") as file:
            file.write(f"{os.getpid()}\n")

    def before_step(self, training: Training) -> None:
        training.saver.wait()
        training.world.sum([0.0])  # as all ranks do: what is saved is then known
        mark = self.folder / f"died-{training.step}"
        if self.dies.get(training.step) == training.world.rank and (self.always or not mark.exists()):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_goes_on_by_itself_where_a_rank_dies(small_job: Make, tmp_path: Path) -> None:
    """The first and the other one in their turn: steps, losses and weights are those of a run in which none
    died, and the rank that lives keeps its process."""
    whole = api.train(small_job("whole", "layout.dp_shard=2"))
    job = two_ranks(small_job)
    run = api.train(job, [Kill(tmp_path, {6: 1, 10: 0})])
    assert run.outcome == "finished" and run.loss == whole.loss
    assert run.bits_per_byte == whole.bits_per_byte
    faults = run.events("fault")
    assert [(event["culprit"], event["saved_step"], event["goes_on"]) for event in faults] == [
        (1, 4, True),
        (0, 8, True),
    ]
    assert [event["attempt"] for event in faults] == [0, 1]
    assert faults[0]["text"] == "rank 1 ended with exit code -9 (SIGKILL); 1 other ended with it"
    assert [event["step"] for event in run.events("resume")] == [4, 8]
    first, other = ((tmp_path / f"rank-{rank}").read_text().split() for rank in (0, 1))
    assert first[0] == first[1] != first[2] and other[0] != other[1] == other[2]
    assert "rank 1 ended with exit code -9" in (run.folder / "log.txt").read_text()


def test_a_rank_that_dies_again_and_again_ends_the_run(small_job: Make, tmp_path: Path) -> None:
    """With all that was saved: the same command goes on from there."""
    job = two_ranks(small_job)
    with pytest.raises(
        MachineError, match=r"^3 attempts in a row died before anything new was saved: rank 1"
    ):
        api.train(job, [Kill(tmp_path, {6: 1}, always=True)])
    assert [event["goes_on"] for event in run_of(job).events("fault")] == [True, True, False]
    assert api.train(job).outcome == "finished"
    assert [event["step"] for event in run_of(job).events("resume")] == [4, 4, 4]


class SlowSave(Hook):
    """The last save takes long, and a scheduler repeats itself meanwhile."""

    def __init__(self) -> None:
        self.parent = os.getpid()

    def on_start(self, training: Training) -> None:
        save = training.saver.save

        def slowly(*arguments: Any, **named: Any) -> None:
            for _ in range(3 if training.world.rank == 0 else 0):
                os.kill(self.parent, signal.SIGTERM)
                time.sleep(SAME_SECONDS + 0.1)
            save(*arguments, **named)

        training.saver.save = slowly  # type: ignore[method-assign]

    def on_finish(self, training: Training) -> None:
        if training.world.rank == 0:  # which has something left to do when the others are gone
            time.sleep(6.0)


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("how", ["signal", "own signal"])
def test_a_signal_saves_however_long_that_takes(how: str, small_job: Make, tmp_path: Path) -> None:
    """To the parent, or to a rank itself."""
    job = two_ranks(small_job, "run.steps=100000", "checkpoint.steps=0", "run.validate_every=0")
    run = api.train(job, [Leave(tmp_path, 9, how), SlowSave()])
    assert run.outcome == "SIGTERM" and run.is_saved
    assert run.events("checkpoint")[-1]["saved_step"] == max(run.loss) + 1
    assert how == "signal" or max(run.loss) == 9
