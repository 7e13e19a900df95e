"""A run in progress: what the loop and its hooks share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from colossus.checkpoints.load import Checkpoint, candidates, load_agreed
from colossus.checkpoints.save import Saver
from colossus.data.loader import Batch, Batches
from colossus.data.order import BatchSchedule, Phase
from colossus.data.sources import TrainingData
from colossus.derive import choose_for_machine
from colossus.errors import MachineError
from colossus.events import EventLog, Listener, read_events
from colossus.generation.load import open_weights
from colossus.job import Job
from colossus.measure.attention import FUSED, fused_is_quicker
from colossus.measure.grouped import equal_is_quicker
from colossus.measure.machine import this_machine
from colossus.measure.memory import keep_freed
from colossus.models.experts import Experts
from colossus.parallel.program import decoders
from colossus.parallel.world import World
from colossus.trainer import course
from colossus.trainer.decisions import CHANGE, CLOCK_FOLLOWS, Decision, Decisions
from colossus.trainer.folder import locked
from colossus.trainer.going_on import is_on_course
from colossus.trainer.horizon import Deadline, Horizon
from colossus.trainer.saved import decisions_among, saved_decisions
from colossus.trainer.shares import decide_shares
from colossus.trainer.state import TrainState
from colossus.trainer.storage import check_same_data, check_shared
from colossus.trainer.together import on_every_rank, on_first_rank

if TYPE_CHECKING:
    from colossus.trainer.hooks import Hook
    from colossus.trainer.step import StepResult

STOP_REASONS = ("SIGINT", "SIGTERM", "asked")
NUM_OF_SAVES = 4
NUM_TOLD = 2 + NUM_OF_SAVES + len(STOP_REASONS)  # numbers that `Training.tell` gives


class Stopped(BaseException):
    """All ranks agreed to stop in the middle of something that can be given up.

    No `Exception`: what it passes through, a compiler above all, must not take it for an error of its own.
    """


@dataclass
class Training:
    """The state of a run in progress, the same on every rank but for what is rank 0's alone.

    job: of the step to come, with the type, threads and compilation that hold for this attempt.
    course: the job from step to step.
    costs: seconds that finishing will take, by what (measured: the last save, the whole validation).
    stop_reason: why the run ends before its time; set by all ranks together.
    unread: the last step, where its figures are not read yet. hooks: who hears of them.
    save_tells: NUM_OF_SAVES numbers that saving has summed with each step's figures; save_told: the sums.
    torn: the run was stopped within an update: weights and optimizer must not be saved.
    batch: of the step to come.
    between_steps: what is being computed is no part of an update, and can be given up without loss.
    at_end: what is undone when the attempt ends, however it ends.
    """

    job: Job
    course: list[course.Part]
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
    batch: Batch | None = None
    between_steps: bool = False
    unread: StepResult | None = None
    hooks: Sequence[Hook] = ()
    proposal: dict[str, float] | None = None
    save_tells: Callable[[], Sequence[float]] = lambda: [0.0] * NUM_OF_SAVES
    save_told: Sequence[float] = (0.0,) * NUM_OF_SAVES

    @classmethod
    @contextlib.contextmanager
    def open(cls, job: Job, folder: Path, listeners: Iterable[Listener]) -> Iterator[Training]:
        """Joins the world, takes the folder, builds the model, and restores the last whole checkpoint."""
        with contextlib.ExitStack() as stack:
            world = stack.enter_context(
                World.join(job.layout, job.fleet.device, experts=job.model.experts is not None)
            )
            on_first_rank(world, lambda: stack.enter_context(locked(folder)))
            check_shared(folder, world)
            log = EventLog(folder, listeners=listeners) if world.rank == 0 else None
            if log is not None:
                stack.callback(log.close)
            earlier = read_events(folder) if world.rank == 0 else []
            logged: list[dict[str, Any]] = []
            on_first_rank(world, lambda: logged.extend(decisions_among(folder, earlier)))
            logged = world.broadcast(logged)
            keeps = world.broadcast(this_machine().keeps_freed_memory if world.rank == 0 else None)
            if job.fleet.device == "cpu" and keep_freed(keeps):
                stack.callback(keep_freed, False)
            job, state, decisions, damaged = _go_on(job, folder, logged, world, log)
            step, parts = state.step, course.parts(job, decisions)
            settled = decisions.get("machine", step) or {}
            for part in decoders(state.model):
                part.fused_attention = settled.get("attention") == FUSED
                for module in part.modules():
                    if isinstance(module, Experts):
                        module.equal_groups = bool(settled.get("equal_groups"))
            changed_at = max((d.first_step for d in decisions.changes()), default=0)
            since = takewhile(lambda e: e.get("name") != CHANGE, reversed(earlier))
            taken = max(((e.get("step") or 0) + 1 for e in since if e["kind"] == "step"), default=changed_at)
            schedule = BatchSchedule(job.run.batch_schedule)
            running = next((d.value for d in reversed([*decisions]) if d.name == "phases"), None)
            data = TrainingData.open(job, schedule, running)
            check_same_data(data, job.data.folder, world)
            on_every_rank(world, lambda: data.verify(world.rank, world.size))
            phases = [asdict(phase) for phase in data.phases]
            if running is None:
                decisions.decide("phases", 0, lambda: phases, world, log)
            elif [Phase.from_dict(phase) for phase in running] != data.phases:
                decisions.record(Decision("phases", phases, changed_at), log)
            shares = decide_shares(job, state, decisions, step, world, log)
            every = job.checkpoint
            saver = stack.enter_context(
                Saver(
                    folder,
                    world,
                    keep=every.keep,
                    keep_every=every.keep_every,
                    damaged=damaged,
                )
            )
            cuts = [
                (p.first_step, p.job.layout.of_replica(world.place.dp_replicate).micro_batch) for p in parts
            ]
            batches = stack.enter_context(
                Batches(
                    data.train,
                    data.order,
                    schedule,
                    start_step=step,
                    rank=world.data.rank,
                    size=world.data.size,
                    micro_batch=cuts,
                    shares=shares,
                    mask_documents=job.data.mask_documents,
                    device=world.device,
                )
            )
            horizon = Horizon(job, schedule, decisions)
            timed = job.run.minutes is not None and world.rank == 0
            end_is_followed = decisions.get(CLOCK_FOLLOWS, 0) and any(d.name == "decay" for d in decisions)
            deadline = Deadline(job, taken) if timed and not end_is_followed else None
            training = cls(
                parts[0].job,
                parts,
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
            training.follow_course()
            yield training

    @property
    def step(self) -> int:
        """Updates taken so far; the number of the step to come."""
        return self.state.step

    def job_of(self, step: int) -> Job:
        """What holds at a step. Figures are read a step late, when the job may be another already."""
        return [part.job for part in self.course if part.first_step <= step][-1]

    def follow_course(self) -> None:
        """Takes what was changed for the step to come."""
        job = self.job_of(self.step)
        if job is not self.job:
            self.job = job
            self.state.optimizer.follow(job.optimizer)

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
        """Asks, from any rank, that all ranks stop before the next step; of several ranks, those that learn
        of it too late take one step more."""
        self.stop_asked = self.stop_asked or reason

    def give_up_step(self) -> None:
        """Leaves what is being computed, from within it."""
        self.stop_reason, self.torn = self.stop_asked, not self.between_steps
        raise Stopped(self.stop_reason)

    def ends(self) -> bool:
        """Whether no step is to follow. All ranks conclude the same."""
        if self.world.size == 1:
            self._take_stop(self._stop_flags())
        return self.stop_reason is not None or self.horizon.done(self.step)

    def count_targets(self, batch: Batch | None) -> float:
        """The targets of the first global batch of an attempt; every rank waits for all."""
        return self.world.sum([self._targets(batch)])[0]

    def batch_after(self, batch: Batch) -> Batch | None:
        """The batch of the next step, where there is to be one."""
        return None if self.horizon.done(batch.step + 1) else self.batches.next(batch.step + 1)

    def tell(self, following: Batch | None) -> list[float]:
        """What all ranks must know before the update after this one, to be summed: the targets of its batch,
        whether the clock has a decision, what saving has to tell, whether any rank wants to stop. NUM_TOLD
        numbers."""
        self.proposal = self._propose_decay(self.step + 1)
        proposed = float(self.proposal is not None)
        return [self._targets(following), proposed, *self.save_tells(), *self._stop_flags()]

    def read(self) -> None:
        """Reads the figures of the last step, where that is not done yet: takes the decision that the clock
        had, learns what was asked for, and lets hooks know. Every rank calls this."""
        result, self.unread = self.unread, None
        if result is None:
            return
        _, proposed, *rest = result.beside
        self.save_told, stops = rest[:NUM_OF_SAVES], rest[NUM_OF_SAVES:]
        if proposed:
            proposal = self.proposal
            self.decisions.decide("decay", self.step, lambda: proposal, self.world, self.log)
        self._take_stop(stops)
        for hook in self.hooks:
            hook.on_figures(self, result)

    def read_and_factor(self) -> float:
        """The learning-rate factor of the step in progress, once all is known of the one before it. Raises
        `Stopped` where any rank was asked to stop before that one's end."""
        self.read()
        if self.stop_reason is not None:
            raise Stopped(self.stop_reason)
        return self.horizon.factor(self.step)

    def _targets(self, batch: Batch | None) -> float:
        """Of the ranks that were given the same rows, one counts them."""
        return float(batch.num_targets) if batch is not None and self.world.rows.counts else 0.0

    def check_stop(self) -> None:
        """Raises `Stopped` on every rank where any was asked to stop. Every rank calls this."""
        self._take_stop(self.world.sum(self._stop_flags()))
        if self.stop_reason is not None:
            raise Stopped(self.stop_reason)

    def check_stop_alone(self) -> None:
        """Raises `Stopped` where this rank is alone and was asked to stop: amid the passes of a step, all of
        which several ranks take, since one that left would let the others wait."""
        if self.world.size == 1 and self.stop_asked is not None:
            self.check_stop()

    def _stop_flags(self) -> list[float]:
        asked = self.stop_asked if self.stop_asked in (None, *STOP_REASONS) else "asked"
        return [float(asked == reason) for reason in STOP_REASONS]

    def _take_stop(self, counts: Sequence[float]) -> None:
        asked = (reason for reason, count in zip(STOP_REASONS, counts, strict=True) if count)
        self.stop_reason = self.stop_reason or next(asked, None)

    def _propose_decay(self, step: int) -> dict[str, float] | None:
        """For `step`, which begins when the one in progress has ended."""
        if self.deadline is None or self.log is None:
            return None
        if any(d.name == "decay" for d in self.decisions.to_come(step)):
            return None  # replayed first
        if step < self.deadline.first_step:
            return None
        decay = self.deadline.propose(
            step,
            max(self.log.run_seconds, self.deadline.next_end()),
            sum(self.costs.values()),
            self.horizon.decay(step),
            self.horizon.factor(step),
            self.horizon.origin(step),
        )
        return asdict(decay) if decay is not None else None


def _go_on(
    job: Job, folder: Path, logged: list[dict[str, Any]], world: World, log: EventLog | None
) -> tuple[Job, TrainState, Decisions, list[Path]]:
    """The run as its newest whole checkpoint left it, or as it begins: the job of this attempt, its state and
    decisions, and the checkpoints that turned out to be damaged.

    logged: the decisions of the event log.
    """
    state: TrainState | None = None
    built: Job | None = None
    damaged: list[Path] = []
    for checkpoint in candidates(folder, world, damaged=damaged):
        saved = _decisions_of(checkpoint, world)
        if saved is None:
            continue
        decisions = Decisions.merge(saved, logged)
        if not is_on_course(saved, checkpoint.step, decisions):
            raise MachineError(
                f"{checkpoint.path}: from before the run was changed, and nothing newer is whole; begin a "
                f"branch there: run.branch_from={folder}@{checkpoint.step}"
            )
        settled = _settle_machine(job, decisions, checkpoint.step, world, log)
        if state is None or settled != built:
            state = None  # freed before another is built
            state, built = TrainState.build(course.parts(settled, decisions)[0].job, world), settled
        if load_agreed(checkpoint, partial(state.restore, share=True), world):
            state.pass_on()
            return settled, state, decisions, damaged
    decisions = Decisions.merge(logged)
    job = _settle_machine(job, decisions, 0, world, log)
    state = TrainState.build(course.parts(job, decisions)[0].job, world)
    if job.model.init_from is not None:
        state.begin_with(open_weights(job.model.init_from))
    return job, state, decisions, []


def _decisions_of(checkpoint: Checkpoint, world: World) -> list[dict[str, Any]] | None:
    """Those until a checkpoint; None where what it says of its run cannot be."""
    found: list[dict[str, Any]] = []

    def read(checkpoint: Checkpoint) -> None:
        found.extend(saved_decisions(checkpoint.path, checkpoint.manifest))

    return found if load_agreed(checkpoint, read, world) else None


def _settle_machine(job: Job, decisions: Decisions, step: int, world: World, log: EventLog | None) -> Job:
    """The job with the type, threads and compilation of this attempt.

    They are decided at the first step, and again from the step on at which a run goes on with another
    processor (what was quick there may be a hundred times slower here), with more or fewer ranks, or with
    other settings that the user asked for.
    """
    fields = {"type": "precision.type", "threads": "run.threads", "compile": "layout.compile"}
    asked = {key: job.get(n) for key, n in fields.items() if job.asked_for(n)}
    decided = decisions.get("machine", step)

    def with_kernels(value: dict[str, Any]) -> dict[str, Any]:
        """Kernels change bits, so they are decided too. Older versions knew one of each."""
        device = job.fleet.device or "cpu"
        fused = fused_is_quicker(job.model, job.data.seq_len, value["type"], value["threads"], device)
        equal = equal_is_quicker(job.model, value["type"], value["threads"], device)
        return value | {"attention": FUSED if fused else "products", "equal_groups": equal}

    def choose() -> dict[str, Any]:
        machine = this_machine()
        place = {
            "processor": machine.processor,
            "instructions": machine.instructions,
            "device": job.fleet.device,
            "ranks": world.size,
        }
        if decided is None:
            return with_kernels(place | {key: job.get(name) for key, name in fields.items()})
        if "instructions" not in decided:  # of an older version
            place.pop("instructions")
        if any(decided[key] != place[key] for key in place if key != "ranks"):
            return with_kernels(place | choose_for_machine(job, machine))
        if decided["ranks"] != world.size:
            return decided | place | {"threads": choose_for_machine(job, machine)["threads"]} | asked
        return decided | asked

    chosen = world.broadcast(choose() if world.rank == 0 else None)
    if chosen != decided:
        decisions.record(Decision("machine", chosen, step), log)
    torch.set_num_threads(chosen["threads"])
    changed = {name: chosen[key] for key, name in fields.items() if job.get(name) != chosen[key]}
    return job.put(changed, "derived")
