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
        """After an update; `training.step` is the number of updates that the run has taken. Who asks `result`
        for a figure waits for the device and for the other ranks; `on_figures` does not."""

    def on_figures(self, training: Training, result: StepResult) -> None:
        """When what a step did is read: within the next step, before its update, and before anything is
        saved, measured or ended. `training.step` is then as it was after it."""

    def on_finish(self, training: Training) -> None:
        """After the last step, or when the run was asked to stop: in the reverse order of the hooks.

        The last checkpoint is saved and the last validation made when this is called.
        """

    def on_error(self, training: Training) -> None:
        """When an error ends the run after some step, and weights are whole on every rank: the last moment to
        keep what would be lost. In the order of the hooks; `training.unread` has the last step's figures
        where nobody has read them. No collective may be begun here: ranks may have left one half done."""


CALLED = tuple(name for name in vars(Hook) if not name.startswith("_"))  # the methods of a hook
