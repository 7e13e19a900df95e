"""Python's collector of cyclic garbage: it runs between steps, at the same steps on all ranks.

By itself it runs whenever enough was allocated, on each rank at another moment, and looks at all that was
imported and built: a third of a second, for which every other rank waits in its next collective.
"""

from __future__ import annotations

import gc

from colossus.trainer.hooks import Hook
from colossus.trainer.step import StepResult
from colossus.trainer.training import Training

EVERY_STEPS = 10
SETTLED = 3  # times after which an attempt keeps nothing new: by then layers are compiled


class Collect(Hook):
    """What lives from an attempt's first steps on is looked at no more; afterwards the collector is the
    process's again."""

    def on_start(self, training: Training) -> None:
        self._times = 0
        if gc.isenabled():
            training.at_end.callback(gc.enable)
        training.at_end.callback(gc.unfreeze)
        gc.collect(1)
        gc.freeze()
        gc.disable()

    def after_step(self, training: Training, result: StepResult) -> None:
        if training.step % EVERY_STEPS:
            return
        gc.collect()
        self._times += 1
        if self._times <= SETTLED:
            gc.freeze()
