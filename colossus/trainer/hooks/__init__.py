"""What happens around training, one concern a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from colossus.trainer.step import StepResult
    from colossus.trainer.training import Training


class Hook:
    """Called by the loop on every rank. Override what you need; a hook never changes what a step computes."""

    def on_start(self, training: Training) -> None:
        """Before the first step of this attempt, after a checkpoint was restored."""

    def before_step(self, training: Training) -> None:
        """Before step `training.step`, while its clock is not yet running."""

    def after_step(self, training: Training, result: StepResult) -> None:
        """After an update; `training.step` is the number of updates that the run has taken."""

    def on_finish(self, training: Training) -> None:
        """After the last step, or when the run was asked to stop: in the reverse order of the hooks.

        The last checkpoint is saved and the last validation made when this is called.
        """
