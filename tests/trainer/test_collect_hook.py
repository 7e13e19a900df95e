"""When Python's collector runs within a run, and that it is the process's own again afterwards."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from colossus import api
from colossus.job import Job
from colossus.parallel.world import World
from colossus.trainer.hooks import Hook
from colossus.trainer.hooks.collect import EVERY_STEPS
from colossus.trainer.state import TrainState
from colossus.trainer.step import train_step
from colossus.trainer.training import Training
from tests.dryrun.programs import batch_of
from tests.ranks.cases import Case
from tests.ranks.pool import Pool
from tests.trainer.conftest import Reached

Make = Callable[..., Job]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool() as pool:
        yield pool


class Heard(Hook):
    """At which steps the collector ran."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.num_frozen = 0

    def on_start(self, training: Training) -> None:
        self._training = training
        gc.callbacks.append(self._hear)

    def on_finish(self, training: Training) -> None:
        gc.callbacks.remove(self._hear)
        self.num_frozen = gc.get_freeze_count()

    def _hear(self, phase: str, facts: dict[str, Any]) -> None:
        if phase == "start":
            self.steps.append(self._training.step)


def test_it_runs_between_steps_and_not_by_itself(small_job: Make) -> None:
    heard = Heard()
    api.train(small_job("run", f"run.steps={2 * EVERY_STEPS + 3}", "checkpoint.steps=0"), [heard])
    assert heard.steps == [EVERY_STEPS, 2 * EVERY_STEPS]
    assert heard.num_frozen > 10_000
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_a_run_that_fails_gives_it_back(small_job: Make) -> None:
    class Fails(Hook):
        def before_step(self, training: Training) -> None:
            assert not gc.isenabled()
            raise Reached

    with pytest.raises(Reached):
        api.train(small_job("run", "run.steps=2"), [Fails()])
    assert gc.isenabled() and gc.get_freeze_count() == 0


def left_by_a_step(job: Job) -> int:
    """Tensors that only the collector would let go of, after the second step of this rank."""
    with World.join(job.layout, "cpu", experts=job.model.experts is not None) as world:
        state, batch = TrainState.build(job, world), batch_of(job)
        train_step(state, batch, batch.num_tokens_global, 1.0, job, world)
        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            train_step(state, batch, batch.num_tokens_global, 1.0, job, world)
            gc.collect()
            return sum(issubclass(type(thing), torch.Tensor) for thing in gc.garbage)
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()


@pytest.mark.parametrize(
    "case",
    [
        Case.of(dp_shard=2, recompute="selective"),
        Case.of(pp=2, dp_shard=2, batch=8),
        Case.of(ep=2, dp_shard=2, preset="mixtral-8x7b", optimizer="muon"),
    ],
    ids=str,
)
def test_a_step_leaves_no_tensor_to_it(case: Case, pool: Pool) -> None:
    """Else memory would grow until its next time."""
    job = case.job()
    assert pool.run(job.layout.num_ranks, left_by_a_step, job) == [0] * job.layout.num_ranks
