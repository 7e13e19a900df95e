"""What a run was about, for its headline: model, corpus, machine, date; from the event that starts it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from colossus.architecture import Architecture, num_parameters
from colossus.errors import UserError
from colossus.events import number
from colossus.monitor.view import RunView
from colossus.words import count, plural, rate, size


@dataclass(frozen=True)
class Subject:
    """job: section -> field -> value, what is None left out. machine: (name, value) rows."""

    title: str
    lead: str
    when: str
    job: dict[str, dict[str, Any]]
    origins: dict[str, str]
    machine: list[tuple[str, str]]
    num_parameters: int | None

    @classmethod
    def of(cls, view: RunView) -> Subject:
        """From the newest start of a run; what it lacks is left out."""
        start = view.start
        job = {
            s: _present(fields) for s, fields in (start.get("job") or {}).items() if isinstance(fields, dict)
        }
        parameters = start.get("num_parameters") or _num_parameters(job.get("model", {}))
        model = job.get("model", {})
        name = str(model.get("preset") or str(model.get("family", "")).capitalize() or view.folder.name)
        corpora = job.get("data", {}).get("corpus")
        on = f" on {_listed(corpora)}" if corpora else ""
        size_of = f" with {count(parameters)} parameters" if parameters else ""
        when = (
            datetime.fromtimestamp(view.events[0]["time"], UTC).strftime("%d %B %Y, %H:%M UTC").lstrip("0")
            if view.events and "time" in view.events[0]
            else ""
        )
        how = "tuned" if "init_from" in model else "trained"
        title = f"{name}{size_of}, {how}{on}" if job else view.folder.name
        return cls(
            title, _lead(view, job), when, job, start.get("origins") or {}, _machine(start), parameters
        )


def _lead(view: RunView, job: dict[str, dict[str, Any]]) -> str:
    start, model = view.start, job.get("model", {})
    parts = []
    if {"num_layers", "hidden_size", "vocab_size"} <= model.keys():
        parts.append(
            f"{plural(model['num_layers'], 'layer')} of width {model['hidden_size']}, "
            f"a vocabulary of {model['vocab_size']:,}"
        )
    if "seq_len" in job.get("data", {}):
        parts.append(f"samples of {job['data']['seq_len']:,} tokens")
    if "type" in job.get("precision", {}):
        parts.append(f"computed in {job['precision']['type']}")
    where = f"On {start['processor']}: " if "processor" in start else ""
    return where + ", ".join(parts) + ("." if parts else "")


def _machine(start: dict[str, Any]) -> list[tuple[str, str]]:
    machine = start.get("machine") or {}
    rows = [("processor", str(start.get("processor") or machine.get("processor") or ""))]
    rows += [("cores", str(machine["cores"]))] if "cores" in machine else []
    rows += [("memory", size(machine["memory_bytes"]))] if "memory_bytes" in machine else []
    rows += [("device", str(start["device"]))] if "device" in start else []
    rows += [("ranks", str(start["num_ranks"]))] if "num_ranks" in start else []
    if "peak_flops_per_second" in start:
        rows.append(("best matrix rate", rate(number(start["peak_flops_per_second"])) + ", as measured"))
    for software in ("python", "torch"):
        rows += [(software.capitalize(), str(start[software]))] if software in start else []
    return [(name, text) for name, text in rows if text]


def _num_parameters(model: dict[str, Any]) -> int | None:
    try:
        return num_parameters(Architecture.model_validate(model))
    except (UserError, ValueError, TypeError):
        return None


def _present(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _listed(corpora: Any) -> str:
    names = [str(name) for name in (corpora if isinstance(corpora, list) else [corpora])]
    return " and ".join("Python's standard library" if name == "python" else name for name in names)
