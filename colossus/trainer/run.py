"""A run as its reader sees it: a folder, its events and what came out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossus.events import kept_and_lost, number, read_events


@dataclass(frozen=True)
class Run:
    """A run on disk, finished or not; everything is read from its event log."""

    folder: Path

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Its events in order, all or those of one kind."""
        return [event for event in read_events(self.folder) if kind is None or event["kind"] == kind]

    @property
    def loss(self) -> dict[int, float]:
        """Step -> training loss in nats a token, of the steps that had targets. What a killed attempt took
        beyond the checkpoint that the next one went on from is no part of the run."""
        steps = [e for e in self._kept("step") if e.get("loss") is not None and e.get("step") is not None]
        return {event["step"]: number(event["loss"]) for event in steps}

    @property
    def outcome(self) -> str:
        """ "finished", "SIGINT", "SIGTERM" or "asked" (stopped after saving), or "unfinished"."""
        last = self.events()[-1:]
        reason = last[0].get("reason") if last and last[0]["kind"] == "end" else None
        return reason if isinstance(reason, str) else "unfinished"

    @property
    def is_saved(self) -> bool:
        """Whether a checkpoint has all steps that were taken, at least one."""
        saved = max((event.get("saved_step", 0) for event in self._kept("checkpoint")), default=0)
        return saved > max(self.loss, default=0)

    @property
    def bits_per_byte(self) -> float | None:
        """On the held-out documents, of the newest validation that is part of the run."""
        validations = self._kept("validation")
        last = validations[-1]["bits_per_byte"] if validations else None
        return number(last) if last is not None else None

    def _kept(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in kept_and_lost(self.events())[0] if event["kind"] == kind]
