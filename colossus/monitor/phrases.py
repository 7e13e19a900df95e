"""Events in words: one line each, the same in a terminal, a log and the report."""

from __future__ import annotations

from typing import Any

from colossus.events import number
from colossus.words import count, duration, plural, size

YARDSTICKS = (("gzip", "gzip -9"), ("bz2", "bz2 -9"), ("xz", "xz -9e"))


def of(event: dict[str, Any]) -> str | None:
    """The line that is worth a person's while; none for most kinds."""
    phrase = _PHRASES.get(event["kind"])
    try:
        return phrase(event) if phrase else None
    except (KeyError, TypeError, ValueError):  # of another version: what it lacks isn't said
        return None


def decision(name: str, value: Any) -> str:
    """What was decided, in a sentence."""
    if name == "decay":
        return f"the learning rate falls from step {value['begin_step']:,} to {value['end_step']:,}, the last"
    if name == "machine":
        compiled = "blocks compiled" if value["compile"] else "nothing compiled"
        return f"products in {value['type']}, {plural(value['threads'], 'thread')}, {compiled}"
    if name == "phases":
        return f"samples of {value[0]['seq_len']:,} tokens" + (
            f", in {len(value)} phases" if len(value) > 1 else ""
        )
    if name == "shares":
        return f"of {sum(value):,} samples the replicas take {', '.join(f'{share:,}' for share in value)}"
    if name in ("validation_documents", "final_documents"):
        which = "each" if name == "validation_documents" else "the last"
        return f"{which} validation takes {held_out(value)}"
    known = {
        "follow": "the decisions of another run are followed: {}",
    }
    text = {True: "yes", False: "no"}.get(value) if isinstance(value, bool) else None
    return known.get(name, f"{name.replace('_', ' ')}: {{}}").format(text or value)


def held_out(number: int, whole: bool = False) -> str:
    """Which documents a validation takes."""
    if number == 1:
        return f"the {'only' if whole else 'first'} held-out document"
    return f"{'all' if whole else 'the first'} {plural(number, 'held-out document')}"


def _validation(event: dict[str, Any]) -> str:
    beside = ", ".join(f"{tool} {number(event[f'{key}_bits_per_byte']):.3f}" for key, tool in YARDSTICKS)
    return (
        f"step {event['step']:,}: {number(event['bits_per_byte']):.3f} bits per byte on "
        f"{held_out(event['num_documents'], event.get('whole', False))} ({beside}), "
        f"loss {number(event['loss']):.3f}, in {duration(number(event['seconds']))}"
    )


def _eval(event: dict[str, Any]) -> str:
    return f"step {event['step']:,}: {subject(event)}: {figures(event)}"


def subject(event: dict[str, Any]) -> str:
    """The corpus or the task of an evaluation."""
    if "task" in event:
        limit = event.get("limit")
        return f"{event['task']}" + (f", the first {plural(limit, 'example')}" if limit else "")
    return f"{event['corpus']}, {plural(event['num_documents'], 'document')}"


def figures(event: dict[str, Any]) -> str:
    """What an evaluation found."""
    if "task" in event:
        return ", ".join(f"{name} {number(value):.4g}" for name, value in event["metrics"].items())
    return f"{number(event['bits_per_byte']):.3f} bits per byte, loss {number(event['loss']):.3f}"


def _checkpoint(event: dict[str, Any]) -> str:
    return (
        f"step {event['step']:,}: saved {event['path']}, {size(event['bytes'])} in "
        f"{duration(number(event['seconds']))}; training stood still for "
        f"{duration(number(event['blocked_seconds']))}"
    )


def _decision(event: dict[str, Any]) -> str:
    return f"step {event['first_step']:,}: decided: {decision(event['name'], event['value'])}"


def _start(event: dict[str, Any]) -> str:
    begin = "training" if event["kind"] == "start" else f"going on from step {event['step']:,}"
    ranks = event.get("num_ranks", 1)
    return f"{begin} on {event['processor']}" + (f", {plural(ranks, 'rank')}" if ranks > 1 else "")


def _data(event: dict[str, Any]) -> str:
    lines = []
    for corpus in event["corpora"]:
        lines += corpus["notes"]
        learned, held_out = corpus["documents"], corpus["held_out_documents"]
        lines.append(
            f"{corpus['corpus']}: {count(corpus['tokens'])} tokens of {plural(learned, 'document')} "
            f"({size(corpus['bytes'])}) to learn from, "
            f"{plural(held_out, 'document')} ({size(corpus['held_out_bytes'])}) held out"
        )
    return "\n".join(lines)


def _plan(event: dict[str, Any]) -> str:
    seconds, memory = (number(event[f"predicted_{name}"]) for name in ("step_seconds", "bytes"))
    return f"the layout was planned: predicted {duration(seconds)} a step, {size(memory)} on a rank"


def _note(event: dict[str, Any]) -> str:
    return f"step {event['step']:,}: {event['text']}"


def _end(event: dict[str, Any]) -> str:
    after = f"after {plural(event['step'], 'step')}"
    if event["reason"] == "finished":
        return f"finished {after} and {duration(number(event['run_seconds']))}"
    return f"stopped by {event['reason']} {after}; what was learned is saved, running again goes on"


_PHRASES = {
    "start": _start,
    "data": _data,
    "resume": _start,
    "validation": _validation,
    "eval": _eval,
    "checkpoint": _checkpoint,
    "decision": _decision,
    "note": _note,
    "plan": _plan,
    "end": _end,
}
