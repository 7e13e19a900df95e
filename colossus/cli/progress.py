"""The progress of building token shards: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self, TextIO, cast

from colossus.monitor.live import Stream
from colossus.words import clock, percent, size

PLAIN_SECONDS = 5.0


class BuildProgress:
    """Pass `show` as the `progress` of a build. Nothing is shown of a build that has nothing to do."""

    def __init__(self, out: Stream) -> None:
        self._out = out
        self._bar: Any = None
        self._began = self._last = time.monotonic()
        self._said = False

    def show(self, done: int, total: int) -> None:
        """`done` of `total` bytes of text have become tokens."""
        if total <= 0 or (done >= total and not self._said and self._bar is None):
            return
        if self._out.isatty():
            self._draw(done, total)
        elif time.monotonic() - self._last >= PLAIN_SECONDS:
            self._last, self._said = time.monotonic(), True
            took = clock(time.monotonic() - self._began)
            self._out.write(f"tokens: {percent(done / total)} of {size(total)} of text, {took}\n")
            self._out.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _draw(self, done: int, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        if self._bar is None:
            columns = (TextColumn("tokens"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(file=cast(TextIO, self._out)), transient=True)
            self._bar.start()
            self._bar.add_task("tokens", total=total)
        self._bar.update(self._bar.task_ids[0], completed=done)
