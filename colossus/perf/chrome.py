"""Traces that Chrome (chrome://tracing) and Perfetto (ui.perfetto.dev) show: the trace event format, as JSON.

Google, "Trace Event Format": complete events (`X`), counters (`C`), metadata (`M`); times in microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

MICRO = 1e6


class Trace:
    """Spans and counters of processes, each of which has lanes. Times are given in seconds.

    A span that begins within another of its lane ends within it, so that they nest: who adds them sees to it.
    """

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._processes: dict[str, int] = {}
        self._lanes: dict[tuple[int, str], int] = {}

    def span(self, process: str, lane: str, name: str, start: float, seconds: float, **facts: Any) -> None:
        """Something that takes so long. facts: what is shown when it is chosen."""
        pid = self._process(process)
        event: dict[str, Any] = {"ph": "X", "pid": pid, "tid": self._lane(pid, lane), "name": name}
        event |= {"ts": start * MICRO, "dur": seconds * MICRO}
        self._events.append(event | ({"args": facts} if facts else {}))

    def counter(self, process: str, name: str, at: float, values: Mapping[str, float]) -> None:
        """What has these values from `at` on; they are stacked."""
        self._events.append(
            {"ph": "C", "pid": self._process(process), "name": name, "ts": at * MICRO, "args": dict(values)}
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, in the order in which it was given."""
        return {"traceEvents": self._events, "displayTimeUnit": "ms"}

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    def _process(self, name: str) -> int:
        if name not in self._processes:
            pid = self._processes[name] = len(self._processes)
            self._tell("process_name", pid, 0, {"name": name})
            self._tell("process_sort_index", pid, 0, {"sort_index": pid})
        return self._processes[name]

    def _lane(self, pid: int, name: str) -> int:
        if (pid, name) not in self._lanes:
            tid = self._lanes[pid, name] = 1 + sum(other == pid for other, _ in self._lanes)
            self._tell("thread_name", pid, tid, {"name": name})
            self._tell("thread_sort_index", pid, tid, {"sort_index": tid})
        return self._lanes[pid, name]

    def _tell(self, name: str, pid: int, tid: int, args: dict[str, Any]) -> None:
        self._events.append({"ph": "M", "pid": pid, "tid": tid, "name": name, "args": args})
