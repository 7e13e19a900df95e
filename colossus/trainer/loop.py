"""The training loop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import torch

from colossus.events import Listener
from colossus.job import Job
from colossus.trainer.hooks import Hook
from colossus.trainer.hooks.defaults import with_defaults
from colossus.trainer.leaving import before_leaving
from colossus.trainer.run import Run
from colossus.trainer.step import drop_step, train_step
from colossus.trainer.training import NUM_TOLD, Stopped, Training


def train(job: Job, folder: Path, hooks: Sequence[Hook] = (), listeners: Iterable[Listener] = ()) -> Run:
    """Trains as the resolved `job` says, from the last whole checkpoint in `folder` if there is one.

    Every rank of the job calls it. Returns when the run is finished or was stopped after saving.

    Raises:
        UserError: the folder is in use, or its data or checkpoint do not fit the job.
        MachineError: storage failed, or the loss stayed non-finite; what is saved is whole.
        Exception: what a hook raised. Whatever is raised after the first step, what is not saved yet is saved
            where it can be (see `leaving`).
    """
    with Training.open(job, folder, listeners) as training:
        training.hooks = all_hooks = with_defaults(job, hooks)
        for hook in all_hooks:
            hook.on_start(training)
        try:
            with contextlib.suppress(Stopped):
                take_steps(training, all_hooks)
            for hook in reversed(all_hooks):
                hook.on_finish(training)
        except Exception as error:
            before_leaving(training, all_hooks, error)
            raise
        return Run(folder)


def take_steps(training: Training, hooks: Sequence[Hook]) -> None:
    """Step after step, to the end or until the run is asked to stop.

    What a step did is read within the next, before its update: ranks and devices go on meanwhile.
    """
    ended = time.perf_counter()
    batch = None if training.horizon.done(training.step) else training.batches.next(training.step)
    num_targets: float | torch.Tensor = training.count_targets(batch)
    waited = batch.wait_seconds if batch is not None else 0.0
    while batch is not None and not training.ends():
        training.follow_course()
        following = training.batch_after(batch)
        waited += following.wait_seconds if following is not None else 0.0
        training.batch = batch
        try:
            for hook in hooks:
                hook.before_step(training)
            result = train_step(
                training.state,
                batch,
                num_targets,
                training.read_and_factor,
                training.job,
                training.world,
                since=ended,
                data_wait_seconds=waited,
                beside=partial(training.tell, following),
                between=training.check_stop_alone,
            )
        except Stopped:
            drop_step(training.state)
            break
        ended, waited = time.perf_counter(), 0.0
        training.unread, batch = result, following
        num_targets = result.figures.total[-NUM_TOLD]
        for hook in hooks:
            hook.after_step(training, result)
    training.read()
