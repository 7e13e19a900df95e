"""Ends a run in good order when the system asks: the step in progress is finished, then all is saved."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType

from colossus.trainer.hooks import Hook
from colossus.trainer.step import StepResult
from colossus.trainer.training import Training

SAME_SECONDS = 1.0


class StopOnSignal(Hook):
    """SIGINT and SIGTERM ask for the end; a second one ends the process at once, as usual. What comes within
    a second is the same wish: a terminal and a launcher may both tell a rank, and the kernel tells it once
    for every thread of a parent that was killed.

    The first step of an attempt may compile for a minute. A process that trains alone gives it up: nothing
    is lost but what it would begin again. Several ranks take it to its end, since one that left would let
    the others wait in the middle of it.
    """

    def on_start(self, training: Training) -> None:
        self._in_first_step = False
        self._steps = 0
        self._asked_at: float | None = None
        if threading.current_thread() is not threading.main_thread():
            return
        before = {n: signal.getsignal(n) or signal.SIG_DFL for n in (signal.SIGINT, signal.SIGTERM)}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def ask(number: int, frame: FrameType | None) -> None:
            if self._asked_at is not None:
                if time.monotonic() - self._asked_at > SAME_SECONDS:
                    restore()
                    signal.raise_signal(number)
                return
            self._asked_at = time.monotonic()
            training.ask_to_stop(signal.Signals(number).name)
            if self._in_first_step and training.world.size == 1:
                training.give_up_step()

        for number in before:
            signal.signal(number, ask)
        training.at_end.callback(restore)

    def before_step(self, training: Training) -> None:
        self._in_first_step = self._steps == 0

    def after_step(self, training: Training, result: StepResult) -> None:
        self._in_first_step = False
        self._steps += 1


class Signalled(Hook):
    """Remembers whether a signal ended the run, here or on another rank."""

    was = False

    def on_start(self, training: Training) -> None:
        def remember() -> None:
            self.was = bool({training.stop_asked, training.stop_reason} & {"SIGINT", "SIGTERM"})

        training.at_end.callback(remember)
