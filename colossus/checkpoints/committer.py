"""The process beside training that commits (see `commit`), as the process of training knows it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import weakref
from dataclasses import asdict
from pathlib import Path
from typing import Any

from colossus.checkpoints.commit import Order
from colossus.errors import MachineError

ENDING_SECONDS = 10.0  # for it to end, once it is let go


def command() -> list[str]:
    """Starts it. What it imports is the standard library's and ours: -S spares it all that is installed."""
    return [sys.executable, "-S", "-P", "-m", "colossus.checkpoints.commit"]


def environment() -> dict[str, str]:
    """Where it finds this package: without `site` no installed one is seen."""
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}


class Ended(MachineError):
    """The process ended without an answer: nobody but the storage knows what became of its order."""


class Committer:
    """One process, from the first order until `close`; a new one where it has ended. It has a session of its
    own: what a terminal sends to training is not for it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._writing = threading.Lock()

    def start(self) -> None:
        """Starts it, if it does not run: it is ready a moment later. Raises MachineError where that fails."""
        if self._process is None or self._process.poll() is not None:
            self._start()

    def begin(self, order: Order) -> None:
        """Gives an order; `answer` tells what came of it. Raises as `start`."""
        self.start()
        if not self._send(asdict(order)):  # it has just ended
            self._start()
            self._send(asdict(order))

    def look(self) -> None:
        """Has it look at once for what it waits for."""
        self._send({"look": True})

    def cancel(self, save: str, reason: str = "another rank could not write its part") -> None:
        """Has it give up a save, if that is not committed yet."""
        self._send({"cancel": save, "reason": reason})

    def answer(self) -> dict[str, Any]:
        """Waits for it. Raises MachineError where it is an error; Ended where there is none."""
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise Ended(f"the process that commits ended with exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise MachineError(answer["error"])
        assert "bug" not in answer, answer["bug"]
        return answer

    def close(self) -> None:
        """Ends it; a save under way is given up."""
        process, self._process = self._process, None
        if process is not None:
            _end(process)

    def _start(self) -> None:
        self.close()
        try:
            self._process = subprocess.Popen(
                command(),
                env=environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise MachineError(f"the process that commits cannot be started ({error.strerror})") from error
        weakref.finalize(self, _end, self._process)

    def _send(self, tree: dict[str, Any]) -> bool:
        """Whether there is a process that takes it."""
        process = self._process
        if process is None or process.stdin is None:
            return False
        try:
            with self._writing:
                process.stdin.write(json.dumps(tree).encode() + b"\n")
                process.stdin.flush()
        except (OSError, ValueError):  # it has ended, or it was closed
            return False
        return True


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(OSError):  # it has ended
        process.stdin.close()
    try:
        process.wait(ENDING_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()
