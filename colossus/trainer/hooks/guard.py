"""Stops a run whose loss has gone for good."""

from __future__ import annotations

from colossus.errors import MachineError
from colossus.trainer.hooks import Hook
from colossus.trainer.step import StepResult
from colossus.trainer.training import Training

PATIENCE = 20  # steps in a row whose gradient is not finite


class Guard(Hook):
    """A step whose gradient is not finite changes no weight; twenty in a row end the run."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def on_figures(self, training: Training, result: StepResult) -> None:
        self._in_a_row = self._in_a_row + 1 if result.skipped else 0
        if self._in_a_row >= PATIENCE:
            raise MachineError(
                f"step {result.step}: the gradient was not finite in {PATIENCE} steps in a row; "
                f"the last good weights are in {training.folder / 'checkpoints'}. Try a lower "
                f"optimizer.lr (now {training.job.optimizer.lr:g}) in a new run"
            )
