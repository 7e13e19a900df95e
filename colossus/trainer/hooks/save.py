"""Saves by time and by step, and at the end."""

from __future__ import annotations

import time

from colossus.measure.machine import free_memory_bytes
from colossus.trainer.hooks import Hook
from colossus.trainer.step import StepResult
from colossus.trainer.training import Training

WRITE_BYTES_PER_SECOND = 200e6  # of a slow disk: what the last save is expected to take until one was timed


class Save(Hook):
    """The clock of any rank says when; the ranks learn of it together. Writing goes on beside training, from
    a copy in memory; where a copy would take more than half of what is free, training waits for the write."""

    def on_start(self, training: Training) -> None:
        self._last_time = time.monotonic()
        self._last_step = training.step if training.step else -1
        tensors = training.state.tensors()
        copy_bytes = training.saver.copy_bytes(tensors)
        # All ranks must take the same way; on one machine they share its memory.
        (all_bytes,) = training.world.sum([copy_bytes])
        self._asynchronous = not training.world.any(2 * all_bytes > free_memory_bytes())
        if self._asynchronous:
            training.saver.prepare(tensors)
        training.costs["save"] = copy_bytes / WRITE_BYTES_PER_SECOND

    def after_step(self, training: Training, result: StepResult) -> None:
        self._report(training)
        every = training.job.checkpoint
        by_step = bool(every.steps) and training.step % every.steps == 0
        by_keep = bool(every.keep_every) and training.step % every.keep_every == 0
        due = time.monotonic() - self._last_time >= every.minutes * 60
        if by_step or by_keep or training.world.any(due):
            self._save(training)

    def on_finish(self, training: Training) -> None:
        if self._last_step != training.step and not training.torn:
            self._save(training)
        training.saver.wait()
        self._report(training)

    def _save(self, training: Training) -> None:
        training.saver.save(
            training.step, training.state.tensors(), training.meta(), asynchronous=self._asynchronous
        )
        self._last_time, self._last_step = time.monotonic(), training.step

    def _report(self, training: Training) -> None:
        for saved in training.saver.poll():
            training.costs["save"] = saved.seconds
            training.event(
                "checkpoint",
                path=str(saved.path.relative_to(training.folder)),
                saved_step=saved.step,
                bytes=saved.num_bytes,
                blocked_seconds=round(saved.blocked_seconds, 4),
                seconds=round(saved.seconds, 4),
            )
