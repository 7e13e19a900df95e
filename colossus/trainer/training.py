"""A run in progress: what the loop and its hooks share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from colossus.data.sources import TrainingData

from colossus.checkpoints.load import newest_whole
from colossus.checkpoints.save import Saver
from colossus.data.loader import Batch
from colossus.data.order import BatchSchedule
from colossus.errors import MachineError, UserError
from colossus.events import EventLog, Listener, read_events
from colossus.job import Job
from colossus.parallel.world import World
from colossus.trainer.decisions import Decision, Decisions
from colossus.trainer.folder import locked
from colossus.trainer.horizon import Deadline, Horizon, as_value
from colossus.trainer.state import TrainState

CLOCK_FOLLOWS = "follow"  # the decision of a run that replays another's: its own clock decides nothing


@dataclass
class Training:
    """The state of a run in progress, the same on every rank but for what is rank 0's alone.

    costs: seconds that finishing will take, by what (measured: the last save, the whole validation).
    stop_reason: why the run ends; set by all ranks together.
    """

    job: Job
    folder: Path
    world: World
    state: TrainState
    data: TrainingData
    schedule: BatchSchedule
    decisions: Decisions
    horizon: Horizon
    saver: Saver
    log: EventLog | None
    deadline: Deadline | None
    costs: dict[str, float]
    stop_asked: str | None = None
    stop_reason: str | None = None

    @classmethod
    @contextlib.contextmanager
    def open(cls, job: Job, folder: Path, listeners: Iterable[Listener]) -> Iterator[Training]:
        """Joins the world, takes the folder, builds the model, and restores the last whole checkpoint."""
        torch.set_num_threads(job.run.threads)
        with contextlib.ExitStack() as stack:
            world = stack.enter_context(World.join(job.layout, job.fleet.device))
            on_first_rank(world, lambda: stack.enter_context(locked(folder)) and None)
            log = EventLog(folder, listeners=listeners) if world.rank == 0 else None
            if log is not None:
                stack.callback(log.close)
            data = TrainingData.open(job)
            state = TrainState.build(job, world)
            saver = stack.enter_context(
                Saver(folder, world, keep=job.checkpoint.keep, keep_every=job.checkpoint.keep_every)
            )
            schedule = BatchSchedule(job.run.batch_schedule)
            checkpoint = newest_whole(folder)
            saved = checkpoint.meta["decisions"] if checkpoint is not None else []
            logged = [e for e in read_events(folder) if e["kind"] == "decision"]
            decisions = Decisions.merge(saved, logged)
            if checkpoint is not None:
                state.restore(checkpoint)
            horizon = Horizon(job, schedule, decisions)
            follows = decisions.get(CLOCK_FOLLOWS, 0)
            timed = job.run.minutes is not None and world.rank == 0 and not follows
            deadline = Deadline(job) if timed else None
            yield cls(job, folder, world, state, data, schedule, decisions, horizon, saver, log, deadline, {})

    @property
    def step(self) -> int:
        """Updates taken so far; the number of the step to come."""
        return self.state.step

    def event(self, kind: str, *, synced: bool = False, **fields: Any) -> None:
        """Writes an event of this step; rank 0 alone does."""
        if self.log is not None:
            self.log.write(kind, step=self.step, synced=synced, **fields)

    def ask_to_stop(self, reason: str) -> None:
        """Asks, from any rank, that all ranks stop before the next step."""
        self.stop_asked = self.stop_asked or reason

    def agree(self, batch: Batch) -> int:
        """What all ranks must know before a step: returns the targets of the global batch.

        Takes the clock's decision where rank 0 has one, and learns whether any rank was asked to stop.
        """
        proposal = self._propose_decay()
        codes = {None: 0, "SIGINT": 1, "SIGTERM": 2}
        stop = codes.get(self.stop_asked, 3)
        sums = self.world.sum(
            [float(batch.num_targets), float(proposal is not None), *(float(stop == c) for c in (1, 2, 3))]
        )
        if sums[1]:
            self.decisions.decide("decay", self.step, lambda: proposal, self.world, self.log)
        reasons = [r for r, count in zip(("SIGINT", "SIGTERM", "asked"), sums[2:], strict=True) if count]
        self.stop_reason = reasons[0] if reasons else None
        return max(1, round(sums[0]))

    def _propose_decay(self) -> dict[str, float] | None:
        if self.deadline is None or self.log is None:
            return None
        if any(d.name == "decay" for d in self.decisions.to_come(self.step)):
            return None
        decay = self.deadline.propose(
            self.step,
            self.log.run_seconds,
            sum(self.costs.values()),
            self.horizon.decay(self.step),
            self.horizon.factor(self.step),
        )
        return as_value(decay) if decay is not None else None


def on_first_rank(world: World, act: Callable[[], Any]) -> Any:
    """Runs `act` on rank 0 and returns its result, or raises its error, on every rank."""
    outcome: Any = None
    if world.rank == 0:
        try:
            outcome = (None, act())
        except (UserError, MachineError) as error:
            outcome = (error, None)
    error, result = world.broadcast(outcome)
    if error is not None:
        raise error
    return result


def replay(decisions: Sequence[dict[str, Any]], log: EventLog) -> None:
    """Writes another run's decisions as those of a new one, which then takes the same steps."""
    follow = {"name": CLOCK_FOLLOWS, "value": True, "first_step": 0}
    for entry in [follow, *decisions]:
        known = Decision(entry["name"], entry["value"], entry["first_step"])
        log.write(
            "decision",
            step=known.first_step,
            synced=True,
            name=known.name,
            value=known.value,
            first_step=known.first_step,
        )
