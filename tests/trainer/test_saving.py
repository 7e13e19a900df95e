"""Saves that fail now and then, for good, or on one rank: the run goes on as long as that loses nothing."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from colossus import api
from colossus.checkpoints import committer
from colossus.checkpoints.find import latest_verified, verify
from colossus.errors import MachineError
from colossus.job import Job
from colossus.trainer.hooks import Hook
from colossus.trainer.hooks import save as saving
from colossus.trainer.step import StepResult
from colossus.trainer.training import Training
from tests.checkpoints.outside import break_sync, with_fault
from tests.trainer.running import assert_bitwise_equal, run_of, train_in_processes

Make = Callable[..., Job]


@dataclasses.dataclass
class BreakSync(Hook):
    """Makes syncing a file whose path holds one of `names` fail with EIO, on one rank, so many times."""

    names: tuple[str, ...]
    times: int
    rank: int = 0

    def on_start(self, training: Training) -> None:
        if training.world.rank == self.rank:
            real = break_sync(self.names, self.times)
            training.at_end.callback(lambda: setattr(os, "fsync", real))
            command, committer.command = committer.command, with_fault("sync", *self.names, self.times)
            training.at_end.callback(lambda: setattr(committer, "command", command))


class Wait(Hook):
    """Lets saves end before the next step, so that each error is met a step later."""

    def before_step(self, training: Training) -> None:
        training.saver.wait_together()


LAST_ALONE = ["checkpoint.steps=0", "optimizer.schedule=cosine"]  # no save at the begin of a decay


def checkpoints(job: Job) -> set[str]:
    return {path.name for path in (Path(job.run.folder) / "checkpoints").iterdir()}


@pytest.mark.parametrize(
    "name", ["step-00000004/pieces-00000", "step-00000004/manifest", "step-00000004/COMMITTED"]
)
def test_one_error_of_the_disk_costs_nothing(
    name: str, small_job: Make, caplog: pytest.LogCaptureFixture
) -> None:
    job = small_job("run", "checkpoint.minutes=0.001")
    assert api.train(job, [BreakSync((name,), 1), Wait()]).outcome == "finished"
    (failed,) = run_of(job).events("save_failed")
    assert failed["step"] in (5, 6)  # told by the sums of step 4, if it fails before them, or of step 5
    assert "cannot save step 4" in failed["reason"] and "Input/output error" in failed["reason"]
    assert [r.getMessage() for r in caplog.records if "cannot save" in r.getMessage()] == [
        f"{failed['reason']}; it will be tried again"
    ]
    saved = [e["saved_step"] for e in run_of(job).events("checkpoint")]
    assert 4 not in saved and min(s for s in saved if s > 4) <= 6 and saved[-1] == 12
    found = latest_verified(job.run.folder)
    assert found is not None and found.name == "step-00000012"
    assert "step-00000004" not in checkpoints(job)


class Slowly(Wait):
    """Longer than the pause before a second try."""

    def before_step(self, training: Training) -> None:
        super().before_step(training)
        time.sleep(0.06)


def test_a_save_that_failed_is_tried_again_after_a_pause(small_job: Make) -> None:
    """Neither the steps nor the clock call for it: ranks learn of the error, and that it is time, from the
    sums of the steps that follow, which they read a step late."""
    job = small_job("run", "checkpoint.steps=6", "checkpoint.minutes=0.05", "run.steps=12")
    assert api.train(job, [BreakSync(("step-00000006/",), 1), Slowly()]).outcome == "finished"
    again, last = [e["saved_step"] for e in run_of(job).events("checkpoint")]
    assert 9 <= again < last == 12


def test_a_disk_that_is_gone_ends_the_run_once_too_much_is_at_stake(small_job: Make) -> None:
    """Nothing is saved however often it is tried; the run goes on once the disk is back."""
    job = small_job("run", "checkpoint.minutes=0.01", "run.steps=2000")
    with pytest.raises(MachineError, match=r"cannot save step \d+ .*Input/output error; nothing of this run"):
        api.train(job, [BreakSync(("step-",), 10**9), Wait()])
    assert 2 <= len(run_of(job).events("save_failed")) < 60
    assert 4 < max(run_of(job).loss) < 1999
    assert not checkpoints(job)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_the_last_save_is_tried_more_than_once(times: int, small_job: Make) -> None:
    job = small_job("run", *LAST_ALONE, "checkpoint.minutes=60", "run.steps=3")
    hooks = [BreakSync(("pieces-00000.safetensors",), times)]
    if times == saving.LAST_TRIES:
        with pytest.raises(MachineError, match=r"cannot save step 3 .*; nothing of this run is saved yet"):
            api.train(job, hooks)
        assert not checkpoints(job)
        assert api.train(job).outcome == "finished"
    else:
        assert api.train(job, hooks).outcome == "finished"
        assert [e["saved_step"] for e in run_of(job).events("checkpoint")] == [3]


def test_the_disk_of_another_rank(small_job: Make) -> None:
    """Rank 1 cannot write its part once: all ranks save again, and take the same steps as ever."""
    settings = ["layout.dp_shard=2", "checkpoint.minutes=0.001"]
    whole, job = small_job("whole", *settings), small_job("run", *settings)
    assert train_in_processes(whole) == [0, 0]
    broken = BreakSync(
        ("step-00000004/pieces-00001.safetensors", "step-00000004/pieces-00001.failed"), 2, rank=1
    )
    assert train_in_processes(job, [broken, Wait()]) == [0, 0]
    failed = run_of(job).events("save_failed")
    assert failed and all("cannot save step 4" in e["reason"] for e in failed)
    assert "step-00000004" not in checkpoints(job)
    assert_bitwise_equal(job, whole)


@dataclasses.dataclass
class Machines(Hook):
    """Ranks of a machine each, where memory is free for so many copies of what one of them writes."""

    copies: float

    def on_start(self, training: Training) -> None:
        os.environ["LOCAL_WORLD_SIZE"] = "1"
        free = self.copies * training.saver.copy_bytes(training.state.tensors())
        saving.free_memory_bytes = lambda: int(free)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("copies", "copied"), [(2.1, True), (1.9, False)])
def test_a_copy_is_compared_with_the_memory_of_its_own_machine(
    copies: float, copied: bool, small_job: Make
) -> None:
    """Where training waits for the writing, it stands still as long as that takes."""
    job = small_job("run", *LAST_ALONE, "layout.dp_shard=2", "run.steps=4")
    assert train_in_processes(job, [Machines(copies)]) == [0, 0]
    (saved,) = run_of(job).events("checkpoint")
    assert (saved["blocked_seconds"] < saved["seconds"]) is copied


@dataclasses.dataclass
class Fail(Hook):
    """Raises where its method is called for step `step`, on the ranks that are named."""

    method: str
    step: int
    ranks: tuple[int, ...] = (0, 1)
    message: str = "the hook's own"

    def _act(self, training: Training, method: str) -> None:
        if (method, training.step) == (self.method, self.step) and training.world.rank in self.ranks:
            raise ValueError(self.message)

    def before_step(self, training: Training) -> None:
        self._act(training, "before")
        if (self.method, training.step) == ("data", self.step - 1):  # with this step the next batch is read
            training.batches.next = lambda step: self._act(training, "data")  # type: ignore[assignment]

    def after_step(self, training: Training, result: StepResult) -> None:
        self._act(training, "after")

    def on_figures(self, training: Training, result: StepResult) -> None:
        self._act(training, "figures")


@pytest.mark.parametrize("method", ["before", "after", "figures", "data"])
def test_an_error_costs_no_step_that_was_taken(method: str, small_job: Make) -> None:
    whole, job = small_job("whole"), small_job("run", "checkpoint.steps=5")
    api.train(whole)
    with pytest.raises(ValueError, match="the hook's own"):
        api.train(job, [Fail(method, 7)])
    assert [e["saved_step"] for e in run_of(job).events("checkpoint")] == [
        5,
        6,
        7,
    ]  # 6: there the rate begins to fall
    assert sorted(run_of(job).loss) == list(range(7)) and run_of(job).outcome == "unfinished"
    assert api.train(job).outcome == "finished"
    assert [e["step"] for e in run_of(job).events("resume")] == [7]
    assert_bitwise_equal(job, whole)


def saved_steps(job: Job) -> list[int]:
    """Those that were kept, of which every byte is right."""
    return sorted(verify(Path(job.run.folder) / "checkpoints" / name).step for name in checkpoints(job))


def test_what_is_saved_is_not_saved_again(small_job: Make) -> None:
    with pytest.raises(ValueError, match="the hook's own"):
        api.train(job := small_job("run"), [Fail("before", 8)])
    assert [e["saved_step"] for e in run_of(job).events("checkpoint")] == [4, 6, 8]


def test_a_step_is_saved_once_where_the_rate_falls_after_a_look_at_held_out_texts(small_job: Make) -> None:
    run = api.train(small_job("run", "checkpoint.steps=2", "run.validate_every=2"))
    saved = [e["saved_step"] for e in run.events("checkpoint")]
    assert saved == sorted(set(saved)) and len(saved) > 2


@pytest.mark.parametrize(("steps", "saved"), [(1, [1]), (2, [2]), (3, [1, 3]), (4, [2, 4])])
def test_a_finish_is_saved_once(steps: int, saved: list[int], small_job: Make) -> None:
    """Also where the rate would have begun to fall one step before."""
    run = api.train(small_job("run", f"run.steps={steps}", "checkpoint.steps=0"))
    assert [e["saved_step"] for e in run.events("checkpoint")] == saved


@pytest.mark.parametrize(("at", "step_seconds"), [(2, 0.5), (9, 0.1)])
def test_no_save_of_the_clock_comes_right_before_the_last(
    at: int, step_seconds: float, small_job: Make
) -> None:
    """After a pause that is longer than an interval one is due, and made where the run goes on for more than
    half an interval; else the last save will do."""

    class Pause(Hook):
        def after_step(self, training: Training, result: StepResult) -> None:
            time.sleep(3.1 if training.step == at else step_seconds)

    run = api.train(small_job("run", "checkpoint.steps=0", "checkpoint.minutes=0.05"), [Pause()])
    found = [e["saved_step"] for e in run.events("checkpoint")]
    if at == 2:
        assert found[0] in (3, 4)
    else:
        assert found == [6, 12]


def test_an_error_before_the_first_step_saves_nothing(small_job: Make) -> None:
    with pytest.raises(ValueError, match="the hook's own"):
        api.train(job := small_job("run"), [Fail("before", 0)])
    assert checkpoints(job) == set()


@dataclasses.dataclass
class Spoil(Hook):
    """Fails within the update of step 7 once half of the weights are changed, or leaves a weight, or what
    the optimizer remembers, that is not finite."""

    what: str

    def before_step(self, training: Training) -> None:
        if training.step != 7:
            return
        if self.what == "update":
            step = training.state.optimizer.step

            def fail(*arguments: Any) -> None:
                step(*arguments)
                raise ValueError("within the update")

            training.state.optimizer.step = fail  # type: ignore[method-assign]
            return
        kind = {"weight": "weight", "moment": "exp_avg_sq"}[self.what]
        tensor = next(t for (_, k), t in training.state.tensors().items() if k == kind)
        tensor.view(-1)[3] = float("inf")
        raise ValueError("the hook's own")


@pytest.mark.parametrize("what", ["update", "weight", "moment"])
def test_what_is_torn_or_not_finite_is_not_saved(what: str, small_job: Make) -> None:
    with pytest.raises(ValueError, match=r"within the update|the hook's own"):
        api.train(job := small_job("run"), [Spoil(what)])
    assert saved_steps(job) == [4, 6]


def test_a_save_that_fails_on_the_way_out_hides_nothing(
    small_job: Make, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match="the hook's own") as caught:
        api.train(job := small_job("run"), [BreakSync(("step-00000007",), 1), Fail("before", 7)])
    assert saved_steps(job) == [4, 6] and caught.value.__context__ is None
    (said,) = [r.getMessage() for r in caplog.records if "on the way out" in r.getMessage()]
    assert "cannot save step 7" in said and "step-00000006 is saved whole" in said


@pytest.mark.parametrize(("ranks", "saved"), [((0, 1), [6, 7]), ((0,), [4, 6]), ((1,), [4, 6])])
def test_an_error_of_two_ranks(ranks: tuple[int, ...], saved: list[int], small_job: Make) -> None:
    """What both of them met is saved by both; of one rank the other does not hear before it has gone."""
    job = small_job("run", "layout.dp_shard=2")
    began = time.monotonic()
    assert 0 not in train_in_processes(job, [Fail("after", 7, ranks)])
    assert time.monotonic() - began < 60
    assert saved_steps(job) == saved
    assert len(run_of(job).loss) == (7 if len(ranks) == 2 else 6)
