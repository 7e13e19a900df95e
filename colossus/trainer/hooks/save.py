"""Saves by time and by step, and at the end; where a save fails, again."""

from __future__ import annotations

import logging
import time

from colossus.errors import MachineError
from colossus.measure.machine import free_memory_bytes
from colossus.trainer.decisions import BRANCH
from colossus.trainer.hooks import Hook
from colossus.trainer.step import StepResult
from colossus.trainer.training import Training

WRITE_BYTES_PER_SECOND = 200e6  # of a slow disk: what the last save is expected to take until one was timed
UNSAVED_INTERVALS = 3  # of `checkpoint.minutes`: work that a run may put at stake while its saves fail
PAUSE = 1 / 60  # of an interval, before a save that failed is tried again; then twice that, and so on
LAST_TRIES = 3  # at the end, where nothing can be waited for
LAST_PAUSE_SECONDS = 2.0  # at most, between them


class Save(Hook):
    """The clock of any rank says when; the ranks learn of it together. Writing goes on beside training, from
    a copy in memory; where a copy would take more than half of what is free, training waits for the write.

    A save that fails is told and tried again, with growing pauses, while training goes on. Once the work that
    is not saved exceeds three intervals of the clock, it is tried a last time, and the run ends with that
    error. Rank 0 knows what is saved; an error of another rank reaches it by the sum that every step makes.
    """

    def on_start(self, training: Training) -> None:
        branched = training.decisions.get(BRANCH, training.step)
        training.saver.first = branched["step"] if branched is not None else None
        self._interval = training.job.checkpoint.minutes * 60
        self._last_time = self._saved_time = time.monotonic()
        self._last_step = training.step if training.step else -1
        self._error: MachineError | None = None  # of this rank, that the others do not know of yet
        self._told: MachineError | None = None  # the one that the sum under way tells them
        self._due = self._last = False  # what they have agreed on
        training.save_tells = lambda: self._tell(training)
        self._retry_time: float | None = None
        self._saving = False
        self._step_seconds = 0.0  # of the last step
        self._pause = self._interval * PAUSE
        tensors = training.state.tensors()
        copy_bytes = training.saver.copy_bytes(tensors)
        # All ranks must take the same way, those of a machine share its memory.
        bytes_here = training.world.sum_here(copy_bytes)
        self._asynchronous = not training.world.any(2 * bytes_here > free_memory_bytes())
        if self._asynchronous:
            training.saver.prepare(tensors)
        training.costs["save"] = copy_bytes / WRITE_BYTES_PER_SECOND

    def before_step(self, training: Training) -> None:
        self._save_before_the_fall(training)

    def after_step(self, training: Training, result: StepResult) -> None:
        self._look(training)
        every = training.job.checkpoint
        by_step = bool(every.steps) and training.step % every.steps == 0
        by_keep = bool(every.keep_every) and training.step % every.keep_every == 0
        if self._last:
            self._save_at_last(training, tries=1)
        elif (by_step or by_keep or self._due) and self._last_step != training.step:
            self._save(training)

    def on_figures(self, training: Training, result: StepResult) -> None:
        self._step_seconds = result.wall_seconds
        due, last, *errors = training.save_told
        self._hear(training, errors, self._told)
        self._due, self._last = bool(due), bool(last)
        if not self._saving:
            self._save_before_the_fall(training)  # which the clock may just have decided

    def _tell(self, training: Training) -> list[float]:
        """What the others must know: whether a save is due, whether it is the last try, and of an error."""
        now = time.monotonic()
        again = self._retry_time is not None and now >= self._retry_time
        at_stake = now - self._saved_time > UNSAVED_INTERVALS * self._interval
        self._told = self._error
        return [
            float(again or (now - self._last_time >= self._interval and not self._ends_soon(training))),
            float(at_stake and self._retry_time is not None),
            *self._errors(training),
        ]

    def _ends_soon(self, training: Training) -> bool:
        """Whether the last save comes within half an interval: what is saved before it is saved twice."""
        total = training.horizon.total_steps(training.step)
        return total is not None and (total - training.step) * self._step_seconds < self._interval / 2

    def on_finish(self, training: Training) -> None:
        self._settle(training)
        failed = training.world.any(self._error is not None or self._retry_time is not None)
        if (failed or self._last_step != training.step) and not training.torn:
            self._save_at_last(training, LAST_TRIES)
        self._look(training)

    def on_error(self, training: Training) -> None:
        """Once. Each rank writes what it holds, and only rank 0 waits, for the parts of the others."""
        try:
            training.saver.wait()
        except MachineError as error:
            logging.getLogger(__name__).warning("%s", error)
        self._look(training)
        if self._last_step == training.step:
            return
        self._last_time, self._last_step = time.monotonic(), training.step
        tensors, meta = training.state.tensors(), training.meta()
        training.saver.save(training.step, tensors, meta, asynchronous=False, together=False)
        self._look(training)

    def _save_before_the_fall(self, training: Training) -> None:
        """Where the rate begins to fall, so that the run can be made longer from there."""
        if training.job.optimizer.schedule != "wsd":
            return
        training.saver.before = training.horizon.falls_at(training.step)
        total = training.horizon.total_steps(training.step)
        ends_next = total is not None and total <= training.step + 1  # where the last save is as good
        if 0 < training.step == training.saver.before and self._last_step != training.step and not ends_next:
            self._save(training)

    def _save(self, training: Training) -> None:
        """Begins a save on every rank, once the one before has ended on all of them, and the step that is
        saved is known to be good."""
        self._saving = True
        training.read()
        self._saving = False
        self._due = self._last = False
        self._settle(training)
        self._hear(training, training.world.sum(self._errors(training)), self._error)
        self._last_time, self._last_step = time.monotonic(), training.step
        try:
            training.saver.save(
                training.step, training.state.tensors(), training.meta(), asynchronous=self._asynchronous
            )
        except MachineError as error:
            self._error = error

    def _save_at_last(self, training: Training, tries: int) -> None:
        """Saves and waits for it. Raises MachineError, on every rank, where it fails again and again."""
        while True:
            self._save(training)
            self._settle(training)
            error = training.world.first_error(self._error)
            if error is None:
                self._retry_time = None
                return
            self._hear(training, training.world.sum(self._errors(training)), self._error)
            tries -= 1
            if not tries:
                raise error
            time.sleep(min(self._pause, LAST_PAUSE_SECONDS))

    def _settle(self, training: Training) -> None:
        """Waits, together with all ranks, until no save is under way."""
        training.saver.wait_together()
        self._look(training)

    def _look(self, training: Training) -> None:
        """Reports saves that have ended; an error is kept until all ranks know of it."""
        try:
            finished = training.saver.poll()
        except MachineError as error:
            self._error = error
            return
        for saved in finished:
            training.costs["save"] = saved.seconds
            self._saved_time, self._retry_time = self._last_time, None
            self._pause = self._interval * PAUSE
            training.event(
                "checkpoint",
                path=str(saved.path.relative_to(training.folder)),
                saved_step=saved.step,
                bytes=saved.num_bytes,
                blocked_seconds=round(saved.blocked_seconds, 4),
                seconds=round(saved.seconds, 4),
            )

    def _errors(self, training: Training) -> list[float]:
        """Whether this rank has an error, and whether it is rank 0, which then has given the save up."""
        failed = self._error is not None
        return [float(failed), float(failed and training.world.rank == 0)]

    def _hear(self, training: Training, errors: list[float], told: MachineError | None) -> None:
        """Every rank calls this with what `_errors` adds up to, and with its own error among these."""
        failed, given_up = errors
        if not failed:
            return
        training.saver.cancel()
        if given_up:
            training.saver.take_back()
        if told is not None:
            logging.getLogger(__name__).warning("%s; it will be tried again", told)
            training.event("save_failed", reason=str(told))
        self._error = None if self._error is told else self._error
        if self._retry_time is None:
            self._retry_time = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, self._interval)
