"""`log.txt` in the folder of a run: what its plain output says, with the time of each line."""

from __future__ import annotations

import contextlib
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from colossus.monitor import phrases
from colossus.monitor.live import PLAIN_SECONDS, Progress
from colossus.untrusted import open_to_append


class LogText:
    """Writes events as they come: pass `show` as a listener of the event log.

    Each line is appended by itself, so that nothing is open between two; what cannot be written is left out,
    for all of it stands in the event log.
    """

    def __init__(self, run_folder: Path) -> None:
        self._path = run_folder / "log.txt"
        self._progress = Progress()
        self._last_step = -1e9

    def show(self, event: dict[str, Any]) -> None:
        """Takes the next event."""
        self._progress.take(event)
        said = phrases.of(event)
        if event["kind"] == "step" and event["time"] - self._last_step >= PLAIN_SECONDS:
            self._last_step = event["time"]
            said = "  ".join(self._progress.parts())
        if said is None:
            return
        time = datetime.fromtimestamp(event["time"], UTC).strftime("%Y-%m-%d %H:%M:%SZ")
        with (
            contextlib.suppress(OSError),
            os.fdopen(open_to_append(self._path), "a", encoding="utf-8") as file,
        ):
            file.writelines(f"{time}  {line}\n" for line in said.splitlines())
