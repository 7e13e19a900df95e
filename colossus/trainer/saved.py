"""What a checkpoint and the event log say that a run decided (see `Training.meta`), and whether that can be.

Both may be a stranger's. A change may hold what is part of a run's course, and nothing else: no name of code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from colossus.checkpoints.format import DamagedCheckpoint, Manifest, step_of
from colossus.data.order import Phase
from colossus.errors import UserError
from colossus.events import read_events
from colossus.job import Job
from colossus.optim.schedule import Decay
from colossus.trainer.course import COURSE, CUT
from colossus.trainer.decisions import BRANCH, CHANGE

Holds = Callable[[Any], bool]


def saved_decisions(path: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """The decisions of the run until a checkpoint of it, once all is checked that it says of the run.

    Raises:
        DamagedCheckpoint: that is none of what a run saves.
    """
    meta, step = manifest.meta, manifest.step
    wrong = [name for name, holds in _RUN.items() if not holds(meta.get(name))]
    if not wrong and not (meta["optimizer_steps"] <= meta["step"] == step == (step_of(path.name) or step)):
        wrong = ["step", "optimizer_steps"]
    if wrong:
        said = "; ".join(f"{name}={meta.get(name)!r:.60}" for name in wrong)
        raise DamagedCheckpoint(f"{path}: its manifest says what no run of step {step} saves: {said}")
    decisions: list[dict[str, Any]] = meta["decisions"]
    return decisions


def logged_decisions(folder: Path) -> list[dict[str, Any]]:
    """The decisions of a run's event log, in order, as `decisions_among` says."""
    return decisions_among(folder, read_events(folder))


def decisions_among(folder: Path, events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The decisions among the events of the run in `folder`.

    Raises:
        UserError: one is none that a run takes.
    """
    found = [event for event in events if event["kind"] == "decision"]
    for event in found:
        if not _decision(event):
            what = {name: event.get(name) for name in ("name", "first_step", "value")}
            raise UserError(f"{folder / 'events.jsonl'}: a decision that no run takes: {what!r:.200}")
    return found


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf


def _table(**parts: Holds) -> Holds:
    """A table that has these; whatever else it has is another version's."""
    return lambda value: isinstance(value, dict) and all(h(value.get(name)) for name, h in parts.items())


def _list(holds: Holds) -> Holds:
    return lambda value: isinstance(value, list) and all(map(holds, value))


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _only(kind: type, holds: Holds) -> Holds:
    """A table of the fields of a dataclass, and no others."""
    names = {field.name for field in fields(kind)}
    return lambda value: holds(value) and names == value.keys()


def _course(value: Any) -> bool:
    """A part of a run's course: fields that may change from a step on, with values that they may have."""
    if not isinstance(value, dict) or not value.keys() <= {*COURSE, CUT}:
        return False
    try:
        Job().put({name: one for name, one in value.items() if one is not None}, "argument")
    except UserError:
        return False
    return True


_CHANGED = _table(
    before=_course,
    after=_course,
    rewarm=lambda value: isinstance(value, bool),
)
_VALUES: dict[str, Holds] = {  # of decisions that a run goes on by; of others any value will do
    "machine": _table(
        type=_text,
        threads=lambda value: _natural(value) and 0 < value < 2**20,
        compile=lambda value: isinstance(value, bool),
        processor=_text,
        device=lambda value: value is None or _text(value),
        ranks=_natural,
    ),
    "phases": _list(
        _only(
            Phase,
            _table(
                first_sample=_natural, seq_len=_natural, weights=_list(_number), fingerprints=_list(_text)
            ),
        )
    ),
    "decay": _only(
        Decay, _table(begin_step=_natural, end_step=_natural, from_factor=_number, to_factor=_number)
    ),
    "shares": _list(_natural),
    "validation_documents": _natural,
    "final_documents": _natural,
    CHANGE: _CHANGED,
    BRANCH: lambda value: isinstance(value, dict),
}


def _decision(value: Any) -> bool:
    if not _table(name=_text, first_step=_natural)(value) or "value" not in value:
        return False
    return _VALUES.get(value["name"], lambda _: True)(value["value"])


_RUN: dict[str, Holds] = {
    "step": _natural,
    "optimizer_steps": _natural,
    "sample": _natural,
    "decisions": _list(_decision),
}
