"""How far a run goes, and the share of the learning rate at each step.

A run of given steps or tokens knows its end from the start. A run of given minutes goes on at the full
rate until the clock decides that the decay must begin now in order to end on time: a warm-up-stable-decay
schedule (Hu et al. 2024, MiniCPM, arXiv 2404.06395) may begin its decay at any step. That is why a run can be
made longer from before its decay as if it had been that long from the start; once its rate has fallen, the
rate rises anew, and what follows is a schedule of its own.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from colossus.data.order import BatchSchedule
from colossus.job import Job
from colossus.optim.schedule import Decay, cosine_factor, wsd_factor
from colossus.trainer import course
from colossus.trainer.decisions import Decisions


@dataclass(frozen=True)
class _Stretch:
    """One warm-up, level and decay; the first is a whole run where nobody changes its length.

    first_step: from which on it holds. origin: where its rate begins to rise, from `from_factor`.
    decay_from: the share that falls from `first_step` on, where the decay had begun before, at `fell_at`.
    decided_from: the clock's decisions for that step and later are of it.
    """

    first_step: int
    job: Job
    total: int | None
    origin: int = 0
    from_factor: float = 0.0
    decay_from: float | None = None
    fell_at: int | None = None
    decided_from: int = 0

    @property
    def length(self) -> tuple[Any, ...]:
        """What makes another stretch of it."""
        optimizer = self.job.optimizer
        return self.total, self.job.run.minutes, optimizer.decay_fraction, optimizer.final_lr_fraction


class Horizon:
    """The end of a run and its learning-rate factors, from the job and the decisions alone."""

    def __init__(self, job: Job, schedule: BatchSchedule, decisions: Decisions) -> None:
        """job, schedule: of the run's last part."""
        self._decisions = decisions
        first, *changed = course.parts(job, decisions)
        batches = [BatchSchedule(part.job.run.batch_schedule) for part in (first, *changed)[:-1]]
        totals = [_total(p.job, s) for p, s in zip((first, *changed), (*batches, schedule), strict=True)]
        self._stretches = [_Stretch(0, first.job, totals[0])]
        for part, total in zip(changed, totals[1:], strict=True):
            before, step = self._stretches[-1], part.first_step
            new = _Stretch(step, part.job, total)
            if part.rewarm:
                new = replace(new, origin=step, from_factor=self._factor(before, step), decided_from=step)
            elif new.length == before.length:
                continue
            else:
                new = replace(new, origin=before.origin, from_factor=before.from_factor)
                new = replace(new, decided_from=before.decided_from)
                if (fell_at := self._falls_at(before, step)) is not None and fell_at < step:
                    new = replace(new, decay_from=self._factor(before, step), fell_at=fell_at)
            self._stretches.append(new)

    def decay(self, step: int) -> Decay | None:
        """The decay that holds at `step`; None while the rate is stable with no end in sight."""
        return self._decay(self._at(step), step)

    def total_steps(self, step: int) -> int | None:
        """Steps of the whole run as known at `step`, or None while the clock has not decided."""
        decay = self.decay(step)
        return self._at(step).total if decay is None else decay.end_step

    def done(self, step: int) -> bool:
        """Whether `step` updates are all that the run takes."""
        total = self.total_steps(step)
        return total is not None and step >= total

    def factor(self, step: int) -> float:
        """The share of the full learning rate at `step`."""
        return self._factor(self._at(step), step)

    def origin(self, step: int) -> int:
        """The step at which the rate of `step` began to rise: 0, or where the run was made longer."""
        return self._at(step).origin

    def falls_at(self, step: int) -> int | None:
        """The step at which the rate of `step` began to fall from its level, or will; None while that is
        open. From the state before it, a run can be made longer as if it had been so long from the start."""
        return self._falls_at(self._at(step), step)

    def _at(self, step: int) -> _Stretch:
        return next(s for s in reversed(self._stretches) if s.first_step <= step or s.first_step == 0)

    def _falls_at(self, stretch: _Stretch, step: int) -> int | None:
        optimizer = stretch.job.optimizer
        if optimizer.schedule == "cosine":
            return stretch.origin + optimizer.warmup_steps
        if stretch.fell_at is not None:
            return stretch.fell_at
        if stretch.total is None and (decided := self._decided(stretch, step)):
            return decided[0].begin_step  # what was decided later falls from the middle of the first
        decay = self._decay(stretch, step)
        return None if decay is None else decay.begin_step

    def _decided(self, stretch: _Stretch, step: int) -> list[Decay]:
        """By the clock, until `step`."""
        decided = [d for d in self._decisions if d.name == "decay" and d.first_step <= step]
        return [Decay(**d.value) for d in decided if d.first_step >= stretch.decided_from]

    def _decay(self, stretch: _Stretch, step: int) -> Decay | None:
        floor = stretch.job.optimizer.final_lr_fraction
        if stretch.total is not None:
            if stretch.decay_from is not None:
                return Decay(stretch.first_step, stretch.total, stretch.decay_from, floor)
            length = round((stretch.total - stretch.origin) * stretch.job.optimizer.decay_fraction)
            return Decay(max(stretch.total - length, stretch.first_step), stretch.total, 1.0, floor)
        decided = self._decided(stretch, step)
        return decided[-1] if decided else None

    def _factor(self, stretch: _Stretch, step: int) -> float:
        optimizer, origin = stretch.job.optimizer, stretch.origin
        if optimizer.schedule == "cosine":
            assert stretch.total is not None, "derive refuses a cosine without a known end"
            return cosine_factor(
                step - origin,
                optimizer.warmup_steps,
                stretch.total - origin,
                optimizer.final_lr_fraction,
                stretch.from_factor,
            )
        decay = self._decay(stretch, step)
        return wsd_factor(step, optimizer.warmup_steps, decay, origin, stretch.from_factor)


def _total(job: Job, schedule: BatchSchedule) -> int | None:
    """Steps of a run of given steps or tokens."""
    if job.run.tokens is not None and job.run.minutes is None:
        return steps_for(job.run.tokens, job, schedule)
    return job.run.steps


def steps_for(tokens: int, job: Job, schedule: BatchSchedule) -> int:
    """Steps until so many tokens were taken, through phases of samples of other lengths."""
    lengths = [(0, job.data.seq_len)]
    for phase in sorted(job.data.phases, key=lambda phase: phase.from_step):
        lengths.append((phase.from_step, phase.seq_len or lengths[-1][1]))
    for (step, seq_len), (end, _) in pairwise([*lengths, (10**18, 0)]):
        first, samples = schedule.first_sample(step), math.ceil(tokens / seq_len)
        last_step = schedule.step_of(first + samples - 1)
        if last_step < end:
            return last_step + 1
        tokens -= (schedule.first_sample(end) - first) * seq_len
    raise AssertionError("the last phase has no end")


class Deadline:
    """Rank 0's clock: says when the decay must begin, or be cut short, for the run to end on time.

    Steps are timed with all that happens between them (validation, saving), over the last quarter of
    the run, so that the estimate follows a machine that turns slower. What comes after the last step
    (`reserve_seconds`: the whole validation and the last save) is kept free.
    """

    WINDOW = 1024  # ends of steps that are remembered

    def __init__(self, job: Job, first_step: int = 0) -> None:
        """first_step: the one from which it may decide; those before it were taken by earlier attempts."""
        assert job.run.minutes is not None
        self.first_step = first_step
        self._budget_seconds = job.run.minutes * 60
        self._fraction = job.optimizer.decay_fraction
        self._floor = job.optimizer.final_lr_fraction
        self._ends: deque[tuple[int, float]] = deque(maxlen=self.WINDOW)

    def step_ended(self, step: int, run_seconds: float) -> None:
        """`step` updates have been taken `run_seconds` into the run."""
        self._ends.append((step, run_seconds))

    def forget_steps(self) -> None:
        """What steps took is no longer what they will take."""
        self._ends.clear()

    def step_seconds(self) -> float | None:
        """Seconds a step, all told; None before two steps of this attempt have ended."""
        if len(self._ends) < 2:
            return None
        last_step, last_seconds = self._ends[-1]
        span = max(8, last_step // 4)
        first_step, first_seconds = next(e for e in self._ends if e[0] >= last_step - span)
        return (last_seconds - first_seconds) / max(1, last_step - first_step)

    def next_end(self) -> float:
        """When the step in progress will have ended, in seconds of the run; 0 while nothing tells."""
        step_seconds = self.step_seconds()
        return self._ends[-1][1] + step_seconds if step_seconds is not None else 0.0

    def propose(
        self,
        step: int,
        run_seconds: float,
        reserve_seconds: float,
        current: Decay | None,
        factor: float,
        origin: int = 0,
    ) -> Decay | None:
        """The decay to follow from `step` on where it should change now, else None. origin: see `Horizon`."""
        step_seconds = self.step_seconds()
        left = self._budget_seconds - run_seconds - reserve_seconds
        if step_seconds is None:
            return self._last_step(step, factor) if left <= 0 and current is None else None
        fits = int(left / step_seconds)
        if current is None:
            wanted = (
                max(1, math.ceil((step - origin) * self._fraction / (1 - self._fraction)))
                if self._fraction < 1
                else step + 1
            )
            return None if fits > wanted else Decay(step, step + max(1, fits), factor, self._floor)
        late = (current.end_step - step) * step_seconds - left
        if late <= max(step_seconds, 0.01 * self._budget_seconds) or current.end_step - step <= 1:
            return None
        return Decay(step, step + max(1, fits), factor, self._floor)

    def _last_step(self, step: int, factor: float) -> Decay:
        return Decay(step, step + 1, factor, self._floor)
