"""Notes which lines of Colossus each test runs, in pytest's process and in those that tests start.

Lines of JSON are appended to the file COLOSSUS_LINES: {"test", "stage", "lines"} of each process, and of each
test how it went: {"test", "stage", "seconds", "passed"}. Which test is running, pytest itself says in the
environment; processes that are forked from a server are told. As a plugin of pytest: `-p recorder`.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCES = f"{ROOT / 'colossus'}{os.sep}"
POOLS = tuple(  # whose processes are killed once they have answered
    str(ROOT / "tests" / name) for name in ("ranks/pool.py", "parallel/real_ranks.py")
)
FLUSH_SECONDS = 0.3  # that a process may lose which is killed


class Recorder:
    """The lines that the running test was seen on in this process."""

    def __init__(self, out: str) -> None:
        self._out = out
        self._test = ""
        self._seen: dict[CodeType, set[int]] = {}
        self._whole: dict[CodeType, int] = {}  # how many lines there are
        self._new: dict[str, list[int]] = {}
        self._flushed = 0.0
        self._lock = threading.RLock()

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Called where a frame begins."""
        code = frame.f_code
        if not (code.co_filename or "").startswith(SOURCES):
            if code.co_filename in POOLS:
                self.flush()
            return None
        test = os.environ.get("PYTEST_CURRENT_TEST", "")
        if test != self._test:
            self.flush()
            self._test, self._seen = test, {}
        if code not in self._whole:
            self._whole[code] = len({line for *_, line in code.co_lines() if line})
        seen = self._seen.setdefault(code, set())
        if len(seen) == self._whole[code]:
            return None
        self._note(code, frame.f_lineno)
        return self._line

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self._note(frame.f_code, frame.f_lineno)
        return self._line

    def _note(self, code: CodeType, line: int) -> None:
        seen = self._seen.setdefault(code, set())
        if line and line not in seen:  # 0: before the first of a module
            seen.add(line)
            with self._lock:
                self._new.setdefault(code.co_filename, []).append(line)
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self.flush()

    def flush(self) -> None:
        """Writes what is new."""
        self._flushed = time.monotonic()
        if self._new:
            with self._lock:
                new, self._new = self._new, {}
            test, _, stage = self._test.rpartition(" (")
            lines = {file.removeprefix(f"{ROOT}{os.sep}"): sorted(found) for file, found in new.items()}
            self.write({"test": test, "stage": stage.removesuffix(")"), "lines": lines})

    def write(self, row: dict[str, Any]) -> None:
        """In one call, so that processes don't write into each other's lines; on lines of its own, even where
        another was killed in the middle."""
        descriptor = os.open(self._out, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(descriptor, b"\n" + json.dumps(row).encode() + b"\n")
        os.close(descriptor)


_recorders: list[Recorder] = []


def start() -> None:
    """In every process, as it starts."""
    made = Recorder(os.environ["COLOSSUS_LINES"])
    _recorders.append(made)
    leave, kill = os._exit, os.kill

    def flush_and_leave(status: int) -> None:
        made.flush()
        leave(status)

    def flush_and_kill(pid: int, number: int) -> None:
        if pid == os.getpid():
            made.flush()
        kill(pid, number)

    os._exit, os.kill = flush_and_leave, flush_and_kill  # type: ignore[assignment]
    atexit.register(made.flush)
    threading.settrace(made.trace)
    sys.settrace(made.trace)


def pytest_runtest_logreport(report: Any) -> None:
    """pytest tells how a stage of a test went."""
    for made in _recorders:
        made.write(
            {
                "test": report.nodeid,
                "stage": report.when,
                "seconds": round(report.duration, 3),
                "passed": report.outcome == "passed",
            }
        )
