"""Events in words: one line each, the same in a terminal, a log and the report."""

from __future__ import annotations

from typing import Any

from colossus.data.compressors import have_work
from colossus.events import number
from colossus.words import count, duration, percent, plural, size

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
        if "compiled_gain" in value and value["compiled_gain"] is None:
            compiled += " (as is expected to be quicker: other programs disturbed the trial)"
        elif "compiled_gain" in value:
            compiled += f" (compiling gave {value['compiled_gain']:.2f} times the speed)"
        elif "eager_step_seconds" in value:
            compiled += " on trial"
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
    if name == "change":
        return changed(value)
    if name == "branch":
        return f"branched from {value['path']} at step {value['step']:,}"
    known = {
        "follow": "the decisions of another run are followed: {}",
    }
    text = {True: "yes", False: "no"}.get(value) if isinstance(value, bool) else None
    return known.get(name, f"{name.replace('_', ' ')}: {{}}").format(text or value)


def from_step(event: dict[str, Any]) -> str:
    """A change or a branch with its step, as it stands in a line by itself."""
    said = decision(event["name"], event["value"])
    return said if event["name"] == "branch" else f"from step {event['first_step']:,} on: {said}"


def changed(value: dict[str, Any]) -> str:
    """What a user changed of a run, in a sentence."""
    before, after = value["before"], value["after"]
    lengths = ("run.minutes", "run.steps", "run.tokens")
    parts = [f"{n} {_said(before[n])} to {_said(after[n])}" for n in after if n not in lengths]
    was, now = ([f"{n} {_said(v[n])}" for n in lengths if v.get(n) is not None] for v in (before, after))
    if was or now:
        same = was and now and was[0].split()[0] == now[0].split()[0]
        parts.insert(0, f"{was[0]} to {now[0].split()[1] if same else now[0]}")
    how = "; the rate had fallen and rises anew" if value["rewarm"] else ""
    return ", ".join(parts) + how


def _said(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else f"{value}"


def held_out(number: int, whole: bool = False) -> str:
    """Which documents a validation takes."""
    if number == 1:
        return f"the {'only' if whole else 'first'} held-out document"
    return f"{'all' if whole else 'the first'} {plural(number, 'held-out document')}"


def is_compressible(event: dict[str, Any]) -> bool:
    """Whether a validation can be held against compressors; also one that does not say of how much text."""
    documents, text = event.get("num_documents"), event.get("num_bytes")
    return not documents or text is None or have_work(documents, text)


def _validation(event: dict[str, Any]) -> str:
    tools = ", ".join(f"{tool} {number(event[f'{key}_bits_per_byte']):.3f}" for key, tool in YARDSTICKS)
    beside = f" ({tools})" if is_compressible(event) else ""
    return (
        f"step {event['step']:,}: {bits_per_byte(event)} on "
        f"{held_out(event['num_documents'], event.get('whole', False))}{beside}, "
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
    return f"{bits_per_byte(event)}, loss {number(event['loss']):.3f}"


def bits_per_byte(event: dict[str, Any]) -> str:
    """Of a validation or an evaluation; withheld where the tokenizer loses too much of the text."""
    if event["bits_per_byte"] is None:
        return f"no bits per byte ({lost(event)})"
    said = f"{number(event['bits_per_byte']):.3f} bits per byte"
    return f"{said} ({lost(event)})" if event.get("lost") else said


def lost(event: dict[str, Any]) -> str:
    """What of the text a tokenizer loses."""
    return f"the tokenizer loses {percent(number(event['lost']))} of the text"


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
    first = f"{begin} on {event['processor']}" + (f", {plural(ranks, 'rank')}" if ranks > 1 else "")
    changes = event.get("changes", [])
    return "\n".join([first, *(from_step(change) for change in changes)])


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


def _dry_run(event: dict[str, Any]) -> str:
    needed, there = (size(number(event[f"{name}_bytes"])) for name in ("predicted", "memory"))
    seconds = duration(number(event["dry_run_seconds"]))
    return f"a dry run says in {seconds}: it fits, the largest rank takes {needed} of {there}"


def _note(event: dict[str, Any]) -> str:
    return f"step {event['step']:,}: {event['text']}"


def _fault(event: dict[str, Any]) -> str:
    then = f"going on {event['why']}" if event["goes_on"] else f"not going on: {event['why']}"
    return f"{event['text']}; {then}"


def stopper(reason: str) -> str:
    """What stopped a run, of the reason of its end."""
    return "a hook" if reason == "asked" else reason


def _end(event: dict[str, Any]) -> str:
    after = f"after {plural(event['step'], 'step')}"
    if event["reason"] == "finished":
        return f"finished {after} and {duration(number(event['run_seconds']))}"
    return f"stopped by {stopper(event['reason'])} {after}; what was learned is saved, running again goes on"


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
    "dry_run": _dry_run,
    "fault": _fault,
    "end": _end,
}
