"""Ends a run in good order when the system asks: the step in progress is finished, then all is saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from colossus.trainer.hooks import Hook
from colossus.trainer.training import Training


class StopOnSignal(Hook):
    """SIGINT and SIGTERM ask for the end once; a second one ends the process at once, as usual."""

    def on_start(self, training: Training) -> None:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            return

        def ask(number: int, frame: FrameType | None) -> None:
            training.ask_to_stop(signal.Signals(number).name)
            signal.signal(number, self._before[number])

        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, ask)

    def on_finish(self, training: Training) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
