"""Peak private memory of a process and all its descendants, sampled while they run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

EVERY_SECONDS = 0.02


class TreeMemory:
    """Samples anonymous memory (not mapped files) of the tree below process `root`. Linux.

    peak: bytes, the most that was seen of the whole tree at once.
    """

    def __init__(self, root: int) -> None:
        self.peak = 0
        self._root = root
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(EVERY_SECONDS):
            self.peak = max(self.peak, sum(map(_private_bytes, _tree(self._root))))


def _tree(root: int) -> Iterator[int]:
    yield root
    try:
        threads = [*Path(f"/proc/{root}/task").iterdir()]
        for thread in threads:
            for child in (thread / "children").read_text().split():
                yield from _tree(int(child))
    except OSError:  # it ended meanwhile
        return


def _private_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    _, found, rest = status.partition("RssAnon:")
    return int(rest.split()[0]) * 1024 if found else 0
