"""What a person sees while a run trains: one line that changes in place, or plain lines in a file."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from typing import Any, Protocol

from colossus.events import number
from colossus.monitor import phrases
from colossus.words import clock, count, percent

REDRAW_SECONDS = 0.1
PLAIN_SECONDS = 10.0
BAR_WIDTH = 16
SMOOTH_SECONDS = 5.0  # over which speed and loss are averaged
CLEAR, BOLD, DIM, RESET = "\r\x1b[2K", "\x1b[1m", "\x1b[2m", "\x1b[0m"


class Stream(Protocol):
    """What a view writes to: `sys.stdout`, or a file."""

    def write(self, text: str, /) -> object: ...
    def flush(self) -> object: ...
    def isatty(self) -> bool: ...


class Quiet:
    """A stream that goes silent once it cannot be written (closed pipe, full disk): no view ends a run."""

    def __init__(self, stream: Stream) -> None:
        self._stream: Stream | None = stream

    def write(self, text: str, /) -> None:
        self._try(lambda stream: stream.write(text))

    def flush(self) -> None:
        self._try(lambda stream: stream.flush())

    def isatty(self) -> bool:
        return bool(self._try(lambda stream: stream.isatty()))

    @property
    def is_silent(self) -> bool:
        """Whether it could not be written."""
        return self._stream is None

    def _try(self, act: Callable[[Stream], object]) -> object:
        try:
            return act(self._stream) if self._stream is not None else None
        except (OSError, ValueError):  # a closed file is a ValueError
            self._stream = None
            return None


class LiveView:
    """Shows events as they are written: pass `show` as a listener of the event log.

    In a terminal, steps change one line in place; elsewhere they are plain lines, ten seconds apart. What
    is worth remembering (validation, decisions, checkpoints) has a line of its own in both. NO_COLOR is
    honoured. Once `out` cannot be written, nothing is shown any more, and the run goes on.
    """

    def __init__(
        self, out: Stream, *, terminal: bool | None = None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._out, self._now = Quiet(out), now
        self._terminal = (out.isatty() and os.environ.get("TERM") != "dumb") if terminal is None else terminal
        self._colour = self._terminal and "NO_COLOR" not in os.environ
        self._last_drawn = -1e9
        self._line_open = False
        self._progress = Progress()

    def show(self, event: dict[str, Any]) -> None:
        """Takes the next event."""
        self._progress.take(event)
        if event["kind"] == "step":
            due = PLAIN_SECONDS if not self._terminal else REDRAW_SECONDS
            if self._now() - self._last_drawn >= due:
                self._last_drawn = self._now()
                self._draw()
            return
        if (line := phrases.of(event)) is not None:
            self._write_line(line)
        if event["kind"] in ("start", "resume") and self._terminal:
            self._out.write("the first step ...")
            self._out.flush()
            self._line_open = True
        if event["kind"] == "end":
            self.close()

    def close(self) -> None:
        """Leaves the last state of the line standing."""
        if self._line_open:
            self._out.write("\n")
            self._out.flush()
            self._line_open = False

    def _draw(self) -> None:
        parts = self._progress.parts()
        if not self._terminal:
            self._out.write("  ".join(parts) + "\n")
            self._out.flush()
            return
        room = shutil.get_terminal_size().columns - 1
        head, bar, rest = parts[0], self._bar(), parts[1:]
        while rest and len("  ".join([head, bar, *rest])) > room:
            rest.pop(-2 if len(rest) > 1 else -1)  # the time left stays longest
        line = "  ".join([head, bar, *rest])[:room]
        if self._colour and len(line) > len(head):
            line = f"{BOLD}{head}{RESET}{line[len(head) :]}".replace(bar, f"{DIM}{bar}{RESET}")
        self._out.write(CLEAR + line)
        self._out.flush()
        self._line_open = True

    def _bar(self) -> str:
        share = self._progress.share
        if share is None:
            return "-" * BAR_WIDTH
        filled = min(BAR_WIDTH, int(share * BAR_WIDTH))
        return "█" * filled + "░" * (BAR_WIDTH - filled) + f" {int(100 * min(1, share))}%"

    def _write_line(self, line: str) -> None:
        self._out.write((CLEAR if self._line_open else "") + line + "\n")
        self._line_open = False
        self._out.flush()


class Progress:
    """Where a run is, from its events."""

    def __init__(self) -> None:
        self._budget_seconds: float | None = None
        self._total_steps: int | None = None
        self._step = 0
        self._run_seconds = 0.0
        self._bits_per_byte: float | None = None
        self._recent: list[dict[str, Any]] = []

    def take(self, event: dict[str, Any]) -> None:
        """Notes what the line shows of `event`."""
        self._run_seconds = event["run_seconds"]
        if event["kind"] in ("start", "resume"):
            minutes = event.get("minutes")
            self._budget_seconds = minutes * 60 if minutes else None
            self._step, self._recent = event.get("step") or 0, []
        if event["kind"] in ("start", "resume", "step"):
            self._total_steps = event.get("total_steps") or self._total_steps
        if event["kind"] == "step":
            self._step = (event.get("step") or 0) + 1
            self._recent.append(event)
            oldest = self._run_seconds - SMOOTH_SECONDS
            while len(self._recent) > 2 and self._recent[0]["run_seconds"] < oldest:
                self._recent.pop(0)
        if event["kind"] == "validation" and event.get("bits_per_byte") is not None:
            self._bits_per_byte = number(event["bits_per_byte"])

    @property
    def share(self) -> float | None:
        """Of the run that is done: of its minutes where it has these, else of its steps."""
        if self._budget_seconds:
            return self._run_seconds / self._budget_seconds
        return self._step / self._total_steps if self._total_steps else None

    @property
    def seconds_left(self) -> float | None:
        """None while nothing tells."""
        if self._budget_seconds:
            return self._budget_seconds - self._run_seconds
        if not self._total_steps or len(self._recent) < 2:
            return None
        first, last = self._recent[0], self._recent[-1]
        per_step = (last["run_seconds"] - first["run_seconds"]) / max(1, last["step"] - first["step"])
        return per_step * (self._total_steps - self._step)

    def parts(self) -> list[str]:
        """The parts of the line, the step first and the time left last."""
        of = f"/{self._total_steps:,}" if self._total_steps else ""
        parts = [f"step {self._step:,}{of}"]
        if any(e.get("loss") is not None for e in self._recent):
            parts.append(f"loss {self._mean('loss'):.3f}")
        if self._bits_per_byte is not None:
            parts.append(f"{self._bits_per_byte:.3f} bits/byte")
        seconds = sum(map(_seconds, self._recent))
        if seconds:
            parts.append(f"{count(self._sum('tokens') / seconds)} tokens/s")
            flops = sum(number(e.get("mfu", 0.0)) * _seconds(e) for e in self._recent)
            parts.append(f"MFU {percent(flops / seconds)}")
            if any("expert_load" in e for e in self._recent):
                parts.append(f"busiest expert {self._mean('expert_load'):.2f} x mean")
            for name, what in (("data", "data"), ("rank", "other ranks")):
                if (waiting := self._sum(f"{name}_wait_seconds") / seconds) >= 0.01:
                    parts.append(f"waiting for {what} {percent(waiting)}")
        if (left := self.seconds_left) is not None:
            parts.append(f"{clock(left)} left")
        return parts

    def _sum(self, name: str) -> float:
        return sum(number(e.get(name, 0.0)) for e in self._recent)

    def _mean(self, name: str) -> float:
        values = [number(e[name]) for e in self._recent if e.get(name) is not None]
        return sum(values) / len(values) if values else float("nan")


def _seconds(event: dict[str, Any]) -> float:
    """Of a step, from the end of the one before it."""
    parts = ("step", "data_wait", "rank_wait", "between")
    return sum(number(event.get(f"{name}_seconds", 0.0)) for name in parts)
