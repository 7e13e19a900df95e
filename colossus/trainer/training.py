"""A run in progress: what the loop and its hooks share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from colossus.checkpoints.load import newest_whole
from colossus.checkpoints.save import Saver
from colossus.data.loader import Batch, Batches
from colossus.data.order import BatchSchedule
from colossus.data.sources import TrainingData
from colossus.derive import choose_for_machine
from colossus.errors import MachineError, UserError
from colossus.events import EventLog, Listener, read_events
from colossus.generation.load import open_weights
from colossus.job import Job
from colossus.measure.machine import this_machine
from colossus.parallel.world import World
from colossus.trainer.decisions import CLOCK_FOLLOWS, Decision, Decisions
from colossus.trainer.folder import locked
from colossus.trainer.horizon import Deadline, Horizon
from colossus.trainer.shares import decide_shares
from colossus.trainer.state import TrainState

STOP_REASONS = ("SIGINT", "SIGTERM", "asked")


class Stopped(BaseException):
    """All ranks agreed to stop in the middle of something that can be given up.

    No `Exception`: what it passes through, a compiler above all, must not take it for an error of its own.
    """


@dataclass
class Training:
    """The state of a run in progress, the same on every rank but for what is rank 0's alone.

    job: with the type, threads and compilation that hold for this attempt.
    costs: seconds that finishing will take, by what (measured: the last save, the whole validation).
    stop_reason: why the run ends before its time; set by all ranks together.
    torn: the run was stopped within an update: weights and optimizer must not be saved.
    at_end: what is undone when the attempt ends, however it ends.
    """

    job: Job
    folder: Path
    world: World
    state: TrainState
    data: TrainingData
    schedule: BatchSchedule
    batches: Batches
    decisions: Decisions
    horizon: Horizon
    saver: Saver
    log: EventLog | None
    deadline: Deadline | None
    at_end: contextlib.ExitStack
    costs: dict[str, float] = field(default_factory=dict)
    stop_asked: str | None = None
    stop_reason: str | None = None
    torn: bool = False

    @classmethod
    @contextlib.contextmanager
    def open(cls, job: Job, folder: Path, listeners: Iterable[Listener]) -> Iterator[Training]:
        """Joins the world, takes the folder, builds the model, and restores the last whole checkpoint."""
        with contextlib.ExitStack() as stack:
            world = stack.enter_context(
                World.join(job.layout, job.fleet.device, experts=job.model.experts is not None)
            )
            on_first_rank(world, lambda: stack.enter_context(locked(folder)))
            checkpoint = newest_whole(folder, world)
            step = checkpoint.meta["step"] if checkpoint is not None else 0
            saved = checkpoint.meta["decisions"] if checkpoint is not None else []
            log = EventLog(folder, listeners=listeners) if world.rank == 0 else None
            if log is not None:
                stack.callback(log.close)
            earlier = read_events(folder) if world.rank == 0 else []
            logged = [event for event in earlier if event["kind"] == "decision"]
            decisions = Decisions.merge(saved, world.broadcast(logged))
            taken = max((event["step"] + 1 for event in earlier if event["kind"] == "step"), default=0)
            job = _settle_machine(job, decisions, step, world, log)
            schedule = BatchSchedule(job.run.batch_schedule)
            data = TrainingData.open(job, schedule, decisions.get("phases", 0))
            on_first_rank(world, data.verify)
            decisions.decide("phases", 0, lambda: [asdict(phase) for phase in data.phases], world, log)
            state = TrainState.build(job, world)
            if checkpoint is not None:
                state.restore(checkpoint)
            elif job.model.init_from is not None:
                state.begin_with(open_weights(job.model.init_from))
            shares = decide_shares(job, state, decisions, step, world, log)
            every = job.checkpoint
            saver = stack.enter_context(Saver(folder, world, keep=every.keep, keep_every=every.keep_every))
            batches = stack.enter_context(
                Batches(
                    data.train,
                    data.order,
                    schedule,
                    start_step=step,
                    rank=world.data.rank,
                    size=world.data.size,
                    micro_batch=job.layout.of_replica(world.place.dp_replicate).micro_batch,
                    shares=shares,
                    mask_documents=job.data.mask_documents,
                    device=world.device,
                )
            )
            horizon = Horizon(job, schedule, decisions)
            timed = job.run.minutes is not None and world.rank == 0
            end_is_followed = decisions.get(CLOCK_FOLLOWS, 0) and any(d.name == "decay" for d in decisions)
            deadline = Deadline(job, taken) if timed and not end_is_followed else None
            yield cls(
                job,
                folder,
                world,
                state,
                data,
                schedule,
                batches,
                decisions,
                horizon,
                saver,
                log,
                deadline,
                stack,
            )

    @property
    def step(self) -> int:
        """Updates taken so far; the number of the step to come."""
        return self.state.step

    def event(self, kind: str, *, synced: bool = False, **fields: Any) -> None:
        """Writes an event of this step; rank 0 alone does."""
        if self.log is not None:
            self.log.write(kind, step=self.step, synced=synced, **fields)

    def decide(self, name: str, choose: Callable[[], Any]) -> Any:
        """The value of `name` that holds now: decided before, or chosen now by rank 0 for all and for good.

        Every rank calls this; `choose` runs on rank 0 alone.
        """
        known = self.decisions.get(name, self.step)
        if known is not None:
            return known
        return self.decisions.decide(name, self.step, choose, self.world, self.log)

    def meta(self) -> dict[str, Any]:
        """What a checkpoint of this step says beside its tensors."""
        return self.state.meta() | {
            "sample": self.schedule.first_sample(self.step),
            "decisions": self.decisions.to_list(),
        }

    def ask_to_stop(self, reason: str) -> None:
        """Asks, from any rank, that all ranks stop before the next step."""
        self.stop_asked = self.stop_asked or reason

    def give_up_step(self) -> None:
        """Leaves the step in progress, from within it."""
        self.stop_reason, self.torn = self.stop_asked, True
        raise Stopped(self.stop_reason)

    def agree(self, batch: Batch) -> int:
        """What all ranks must know before a step: returns the targets of the global batch.

        Takes the clock's decision where rank 0 has one, and learns whether any rank was asked to stop.
        """
        proposal = self._propose_decay()
        counts = self.world.rows.counts  # of ranks that were given the same rows
        targets, proposed, *stops = self.world.sum(
            [counts * float(batch.num_targets), float(proposal is not None), *self._stop_flags()]
        )
        if proposed:
            self.decisions.decide("decay", self.step, lambda: proposal, self.world, self.log)
        self._take_stop(stops)
        return max(1, round(targets))

    def check_stop(self) -> None:
        """Raises `Stopped` on every rank where any was asked to stop. Every rank calls this."""
        self._take_stop(self.world.sum(self._stop_flags()))
        if self.stop_reason is not None:
            raise Stopped(self.stop_reason)

    def _stop_flags(self) -> list[float]:
        asked = self.stop_asked if self.stop_asked in (None, *STOP_REASONS) else "asked"
        return [float(asked == reason) for reason in STOP_REASONS]

    def _take_stop(self, counts: Sequence[float]) -> None:
        self.stop_reason = next((r for r, n in zip(STOP_REASONS, counts, strict=True) if n), None)

    def _propose_decay(self) -> dict[str, float] | None:
        if self.deadline is None or self.log is None:
            return None
        if any(d.name == "decay" for d in self.decisions.to_come(self.step)):
            return None  # replayed first
        if self.step < self.deadline.first_step:
            return None
        decay = self.deadline.propose(
            self.step,
            self.log.run_seconds,
            sum(self.costs.values()),
            self.horizon.decay(self.step),
            self.horizon.factor(self.step),
        )
        return asdict(decay) if decay is not None else None


def _settle_machine(job: Job, decisions: Decisions, step: int, world: World, log: EventLog | None) -> Job:
    """The job with the type, threads and compilation of this attempt.

    They are decided at the first step, and again from the step on at which a run goes on with another
    processor (what was quick there may be a hundred times slower here), with more or fewer ranks, or with
    other settings that the user asked for.
    """
    fields = {"type": "precision.type", "threads": "run.threads", "compile": "layout.compile"}
    asked = {key: job.get(n) for key, n in fields.items() if job.asked_for(n)}
    decided = decisions.get("machine", step)

    def choose() -> dict[str, Any]:
        machine = this_machine()
        place = {"processor": machine.processor, "device": job.fleet.device, "ranks": world.size}
        if decided is None:
            return place | {key: job.get(name) for key, name in fields.items()}
        if any(decided[key] != place[key] for key in ("processor", "device")):
            return place | choose_for_machine(job, machine)
        if decided["ranks"] != world.size:
            return decided | place | {"threads": choose_for_machine(job, machine)["threads"]} | asked
        return decided | asked

    chosen = world.broadcast(choose() if world.rank == 0 else None)
    if chosen != decided:
        decisions.record(Decision("machine", chosen, step), log)
    torch.set_num_threads(chosen["threads"])
    changed = {name: chosen[key] for key, name in fields.items() if job.get(name) != chosen[key]}
    return job.put(changed, "derived")


def on_first_rank(world: World, act: Callable[[], Any]) -> None:
    """Runs `act` on rank 0, and raises its error on every rank."""
    error: Exception | None = None
    if world.rank == 0:
        try:
            act()
        except (UserError, MachineError) as raised:
            error = raised
    error = world.broadcast(error)
    if error is not None:
        raise error
