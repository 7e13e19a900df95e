"""The training loop."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from colossus.events import Listener
from colossus.job import Job
from colossus.trainer.hooks import Hook
from colossus.trainer.hooks.defaults import with_defaults
from colossus.trainer.run import Run
from colossus.trainer.step import train_step
from colossus.trainer.training import Stopped, Training


def train(job: Job, folder: Path, hooks: Sequence[Hook] = (), listeners: Iterable[Listener] = ()) -> Run:
    """Trains as the resolved `job` says, from the last whole checkpoint in `folder` if there is one.

    Every rank of the job calls it. Returns when the run is finished or was stopped after saving.

    Raises:
        UserError: the folder is in use, or its data or checkpoint do not fit the job.
        MachineError: storage failed, or the loss stayed non-finite; what is saved is whole.
    """
    with Training.open(job, folder, listeners) as training:
        all_hooks = with_defaults(job, hooks)
        for hook in all_hooks:
            hook.on_start(training)
        with contextlib.suppress(Stopped):
            take_steps(training, all_hooks)
        for hook in reversed(all_hooks):
            hook.on_finish(training)
        return Run(folder)


def take_steps(training: Training, hooks: Sequence[Hook]) -> None:
    """Step after step, to the end or until the run is asked to stop."""
    while not training.horizon.done(training.step):
        batch = training.batches.next(training.step)
        num_targets = training.agree(batch)
        if training.stop_reason or training.horizon.done(training.step):
            return
        for hook in hooks:
            hook.before_step(training)
        result = train_step(
            training.state,
            batch,
            num_targets,
            training.horizon.factor(training.step),
            training.job,
            training.world,
        )
        for hook in hooks:
            hook.after_step(training, result)
