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
    """SIGINT and SIGTERM ask for the end. A second SIGINT, a person's, ends the process at once, as usual;
    what comes within a second is the same wish, since a terminal and a launcher may both tell a rank. A
    second SIGTERM changes nothing: schedulers and launchers send it again while a run still saves.

    The first step of an attempt may compile for a minute, and so may what comes before a later one (see
    `hooks.compile`). A process that trains alone gives it up: nothing
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
                if number == signal.SIGINT and time.monotonic() - self._asked_at > SAME_SECONDS:
                    restore()
                    signal.raise_signal(number)
                return
            self._asked_at = time.monotonic()
            training.ask_to_stop(signal.Signals(number).name)
            if (self._in_first_step or training.between_steps) and training.world.size == 1:
                training.give_up_step()

        def leave(kind: object, error: BaseException | None, trace: object) -> None:
            if training.world.size == 1 or not isinstance(error, Exception):
                restore()
                return
            # Launchers end the other ranks of one that failed, which have yet to tell of it: `World.join`
            # gives the handlers back.
            for number in before:
                signal.signal(number, signal.SIG_IGN)

        for number in before:
            signal.signal(number, ask)
        training.at_end.push(leave)

    def before_step(self, training: Training) -> None:
        self._in_first_step = self._steps == 0

    def after_step(self, training: Training, result: StepResult) -> None:
        self._in_first_step = False
        self._steps += 1
