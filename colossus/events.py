"""The event log: one JSON object a line. Everything that a person is shown is a view of it."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from colossus.errors import MachineError, UserError, only_shown
from colossus.untrusted import MIB, open_file, open_to_append, parse_json

SCHEMA = 1
MAX_LINE_BYTES = 64 * MIB
Listener = Callable[[dict[str, Any]], None]


class EventLog:
    """Appends to a run's `events.jsonl`.

    `run_seconds` is monotonic over attempts: each starts where the log of the one before ended, so that
    downtime is not counted. Opening a log cuts off the torn last line that a killed attempt left. Listeners
    are told of every event once it is written; one that raises is told no more, and the run goes on.

    Raises (opening and writing alike):
        MachineError: no space, no permission.
    """

    def __init__(
        self,
        folder: Path,
        rank: int | None = None,
        listeners: Iterable[Listener] = (),
        *,
        new_attempt: bool = True,
    ) -> None:
        self.path = folder / "events.jsonl"
        self._rank = rank
        self._listeners = list(listeners)
        earlier = list(_read(self.path))
        self.attempt = int(new_attempt) + max((event["attempt"] for event in earlier), default=-1)
        self._offset = max((event["run_seconds"] for event in earlier), default=0.0)
        self._started: float | None = None
        with self._storage_errors():
            self._descriptor = open_to_append(self.path)
            with open(self._descriptor, "rb", closefd=False) as file:
                os.ftruncate(self._descriptor, _whole_bytes(file.read()))
            self._sync_name()

    def _sync_name(self) -> None:
        """What is synced later is found by its name."""
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # not every file system knows how to
                os.fsync(folder)
        finally:
            os.close(folder)

    def start_clock(self) -> None:
        """Training time of this attempt counts from here."""
        self._started = time.monotonic()

    @property
    def run_seconds(self) -> float:
        """Seconds of training, over all attempts."""
        return self._offset + (time.monotonic() - self._started if self._started is not None else 0.0)

    def write(
        self, kind: str, step: int | None = None, *, synced: bool = False, **fields: Any
    ) -> dict[str, Any]:
        """Appends one event; with `synced` it is on disk when this returns."""
        event = {
            "schema": SCHEMA,
            "time": round(time.time(), 3),
            "run_seconds": round(self.run_seconds, 3),
            "attempt": self.attempt,
            "rank": self._rank,
            "step": step,
            "kind": kind,
        } | fields
        line = json.dumps(_plain(event), ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"
        data = line.encode()
        with self._storage_errors():
            while data:
                data = data[os.write(self._descriptor, data) :]
            if synced:
                os.fsync(self._descriptor)
        for listener in [*self._listeners]:
            told = False
            with only_shown(f"{self.path}: a listener raised at an event {kind!r}, and hears no more"):
                listener(event)
                told = True
            if not told:
                self._listeners.remove(listener)
        return event

    def close(self) -> None:
        os.close(self._descriptor)

    @contextlib.contextmanager
    def _storage_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise MachineError(f"{self.path}: cannot be written ({error.strerror})") from error


class Tail:
    """What is new in a run's `events.jsonl`, while another process writes it. Each line is read once."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "events.jsonl"
        self._position = _whole_bytes(self._path.read_bytes()) if self._path.is_file() else 0

    def new(self) -> list[dict[str, Any]]:
        """The events whose lines were ended since the last call."""
        if not self._path.is_file():
            return []
        with self._path.open("rb") as file:
            file.seek(self._position)
            data = file.read()
        whole = data[: _whole_bytes(data)]  # a torn line is read once it is whole, or was cut off
        self._position += len(whole)
        return list(_events(self._path, whole.splitlines(keepends=True)))


def read_events(folder: str | Path) -> list[dict[str, Any]]:
    """All events of a run in order of time, those of nodes' own logs merged in.

    A torn last line is dropped; lines of a newer schema that are no objects are ignored.

    Raises:
        UserError: an event says what none can.
    """
    folder = Path(folder)
    files = [folder / "events.jsonl", *sorted(folder.glob("events/node-*.jsonl"))]
    events = [event for file in files for event in _read(file)]
    return sorted(events, key=lambda e: (e["attempt"], e["run_seconds"])) if len(files) > 1 else events


def kept_and_lost(events: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """`events` without what a killed attempt took beyond the checkpoint that the next one went on from, and
    those steps, validations and evaluations."""
    kept: list[dict[str, Any]] = []
    lost: list[dict[str, Any]] = []
    for event in events:
        if event["kind"] in ("start", "resume"):
            begin = event.get("step") or 0
            lost += [e for e in kept if _is_beyond(e, begin)]
            kept = [e for e in kept if not _is_beyond(e, begin)]
        kept.append(event)
    return kept, lost


def _is_beyond(event: dict[str, Any], begin: int) -> bool:
    """Whether the weights after `begin` updates know nothing of it."""
    first = {"step": begin, "validation": begin + 1, "eval": begin + 1}.get(event["kind"])
    return first is not None and (event.get("step") or 0) >= first


def number(value: Any) -> float:
    """A number of the log; "nan", "inf" and "-inf" stand for themselves, and nothing for a figure that was
    withheld: it is no number."""
    return math.nan if value is None else float(value)


def _read(path: Path) -> Iterator[dict[str, Any]]:
    try:
        file = open_file(path)
    except OSError:
        return
    with io.BufferedReader(file) as lines:
        yield from _events(path, iter(lambda: lines.readline(MAX_LINE_BYTES), b""))


def _events(path: Path, lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            event = parse_json(line) if line.endswith(b"\n") else None
        except ValueError:
            continue
        if isinstance(event, dict) and {"attempt", "run_seconds", "kind"} <= event.keys():
            if wrong := [name for name, holds in _HOLDS.items() if name in event and not holds(event[name])]:
                said = ", ".join(f"{name}={event[name]!r:.60}" for name in wrong)
                raise UserError(f"{path}: an event that no run writes: {said}")
            yield event


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _seconds(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


_HOLDS: dict[str, Callable[[Any], bool]] = {  # what events say that a run goes on by
    "attempt": _natural,
    "run_seconds": _seconds,
    "kind": lambda value: isinstance(value, str),
    "step": lambda value: value is None or _natural(value),
    "loss": lambda value: value is None or type(value) in (int, float) or value in ("nan", "inf", "-inf"),
    "saved_step": _natural,
}


def _whole_bytes(data: bytes) -> int:
    """Bytes up to the last whole line."""
    return data.rfind(b"\n") + 1


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
