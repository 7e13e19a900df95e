"""Wishes to end, while ranks run."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from types import FrameType

SAME_SECONDS = 1.0  # in which a second Ctrl-C is the same wish


class Signals:
    """SIGINT and SIGTERM, while ranks run: handed on once. A second Ctrl-C ends the ranks at once; a second
    SIGTERM changes nothing, since schedulers send it again while a run still saves."""

    asked: int | None = None
    insisted = False

    def __enter__(self) -> Signals:
        self._restore = contextlib.ExitStack()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.signal(number, self._take)
                self._restore.callback(signal.signal, number, before or signal.SIG_DFL)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore.close()

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.asked is None:
            self.asked, self._asked_at = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._asked_at > SAME_SECONDS:
            self.insisted = True
