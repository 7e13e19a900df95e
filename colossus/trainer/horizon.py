"""How far a run goes, and the share of the learning rate at each step.

A run of given steps or tokens knows its end from the start. A run of given minutes goes on at the full
rate until the clock decides that the decay must begin now in order to end on time: a warm-up-stable-decay
schedule (Hu et al. 2024, MiniCPM, arXiv 2404.06395) may begin its decay at any step.
"""

from __future__ import annotations

import math
from collections import deque
from itertools import pairwise

from colossus.data.order import BatchSchedule
from colossus.job import Job
from colossus.optim.schedule import Decay, cosine_factor, wsd_factor
from colossus.trainer.decisions import Decisions


class Horizon:
    """The end of a run and its learning-rate factors, from the job and the decisions alone."""

    def __init__(self, job: Job, schedule: BatchSchedule, decisions: Decisions) -> None:
        self._job, self._decisions = job, decisions
        self._total: int | None = job.run.steps
        if job.run.tokens is not None and job.run.minutes is None:
            self._total = steps_for(job.run.tokens, job, schedule)

    def decay(self, step: int) -> Decay | None:
        """The decay that holds at `step`; None while the rate is stable with no end in sight."""
        if self._total is not None:
            length = round(self._total * self._job.optimizer.decay_fraction)
            return Decay(self._total - length, self._total, 1.0, self._job.optimizer.final_lr_fraction)
        decided = self._decisions.get("decay", step)
        return Decay(**decided) if decided is not None else None

    def total_steps(self, step: int) -> int | None:
        """Steps of the whole run as known at `step`, or None while the clock has not decided."""
        decay = self.decay(step)
        return self._total if decay is None else decay.end_step

    def done(self, step: int) -> bool:
        """Whether `step` updates are all that the run takes."""
        total = self.total_steps(step)
        return total is not None and step >= total

    def factor(self, step: int) -> float:
        """The share of the full learning rate at `step`."""
        optimizer = self._job.optimizer
        if optimizer.schedule == "cosine":
            assert self._total is not None, "derive refuses a cosine without a known end"
            return cosine_factor(step, optimizer.warmup_steps, self._total, optimizer.final_lr_fraction)
        return wsd_factor(step, optimizer.warmup_steps, self.decay(step))


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

    def step_seconds(self) -> float | None:
        """Seconds a step, all told; None before two steps of this attempt have ended."""
        if len(self._ends) < 2:
            return None
        last_step, last_seconds = self._ends[-1]
        span = max(8, last_step // 4)
        first_step, first_seconds = next(e for e in self._ends if e[0] >= last_step - span)
        return (last_seconds - first_seconds) / max(1, last_step - first_step)

    def propose(
        self, step: int, run_seconds: float, reserve_seconds: float, current: Decay | None, factor: float
    ) -> Decay | None:
        """The decay to follow from `step` on where it should change now, else None."""
        step_seconds = self.step_seconds()
        left = self._budget_seconds - run_seconds - reserve_seconds
        if step_seconds is None:
            return self._last_step(step, factor) if left <= 0 and current is None else None
        fits = int(left / step_seconds)
        if current is None:
            wanted = (
                max(1, math.ceil(step * self._fraction / (1 - self._fraction)))
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
