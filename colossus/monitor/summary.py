"""What is printed when a run ends."""

from __future__ import annotations

import shlex
from pathlib import Path

from colossus.events import number
from colossus.monitor import phrases
from colossus.monitor.view import Event, RunView, beats, compressors
from colossus.words import count, duration, percent, plural

BAR_WIDTH = 32
SAMPLE_LINES = 12


def summary(run_folder: str | Path) -> str:
    """The outcome of a run in a screenful: what it reached, what it took, a sample, where things lie."""
    view = RunView.read(run_folder)
    folder = shlex.quote(str(run_folder))
    blocks = [_yardstick(view), _figures(view), _sample(view), _places(view, folder)]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def verdict(view: RunView) -> str:
    """One sentence on what the bits per byte mean."""
    if view.final is None:
        return ""
    ours, beaten, tools = number(view.final["bits_per_byte"]), beats(view.final), compressors(view.final)
    if view.final["bits_per_byte"] is None:
        return f"No bits per byte: {phrases.lost(view.final)}, so that they would say nothing."
    if not ours < float("inf"):
        return "The model's predictions are not finite: the training went wrong."
    if view.before is not None and (before := number(view.before["bits_per_byte"])) < float("inf"):
        way = f"{percent(1 - ours / before)} fewer" if ours < before else f"{percent(ours / before - 1)} more"
        return f"{way} bits than before tuning, on text that the model never saw."
    if not tools:
        return "The documents are too short for a compressor to be held against."
    if len(beaten) == len(tools):
        saved = percent(1 - ours / min(bits for _, bits in tools))
        return f"{saved} fewer bits than the best compressor needs, on text that the model never saw."
    if beaten:
        return f"On text that it never saw, the model does better than {' and '.join(reversed(beaten))}."
    return "On text that it never saw, the compressors still do better: the model wants more training."


def yardsticks(view: RunView, final: Event) -> list[tuple[str, float]]:
    """(name, bits per byte) of the model, unless they are withheld, and of what it is held against."""
    models = (("this model", final), ("before tuning", view.before))
    known = [(name, event) for name, event in models if event and event["bits_per_byte"] is not None]
    return [*((name, number(event["bits_per_byte"])) for name, event in known), *compressors(final)]


def _yardstick(view: RunView) -> list[str]:
    final = view.final
    if final is None:
        return []
    rows = yardsticks(view, final)
    if not rows:
        return [verdict(view)]
    finite = [value for _, value in rows if value < float("inf")]
    longest, width = max(finite, default=1.0), max([11, *(len(name) + 1 for name, _ in rows)])
    documents = phrases.held_out(final["num_documents"], final.get("whole", False))
    lines = [f"Bits per byte on {documents}, less is better:", ""]
    for name, value in sorted(rows, key=lambda row: row[1]):
        bar = "█" * round(BAR_WIDTH * value / longest) if value < float("inf") else ""
        mark = ">" if name == "this model" else " "
        lines.append(f"  {mark} {name:<{width}}{value:6.3f}  {bar}")
    return [*lines, "", verdict(view)]


def _figures(view: RunView) -> list[str]:
    if not view.steps:
        return ["No step was taken."]
    speed, mfu = view.typical("tokens_per_second"), view.mfu
    own = plural(view.num_steps - view.first_step, "step")
    own += f" on from step {view.first_step:,}" if view.first_step else ""
    parts = [f"{own}, {count(view.num_tokens)} tokens in {duration(view.run_seconds)}"]
    if (last := view.last("loss")) is not None:
        parts.append(f"loss {last:.3f}")
    parts += [f"{count(speed)} tokens/s"] if speed else []
    of = "the most that it has reached" if view.last("peak_flops_per_second") else "the measured matrix rate"
    parts += [f"MFU {percent(mfu)} of {of}"] if mfu else []
    lines = [", ".join(parts)]
    if (measured := view.typical("step_seconds")) and (predicted := view.predicted_step_seconds):
        lines.append(
            f"A step took {duration(measured)} (the median); the plan predicted {duration(predicted)}."
        )
    for event in view.changes:
        said = phrases.from_step(event)
        lines.append(f"{said[:1].upper()}{said[1:]}.")
    if view.outcome not in ("finished",):
        said = "stopped by a hook" if view.outcome == "asked" else view.outcome
        lines.append(f"Not finished ({said}).")
    return lines


def _sample(view: RunView) -> list[str]:
    samples = view.of("sample")
    if not samples:
        return []
    text = (samples[-1]["prompt"] + samples[-1]["text"]).splitlines()
    lines = ["A sample of what it writes:", "", *(f"  | {line}" for line in text[:SAMPLE_LINES])]
    return lines + (["  | ..."] if len(text) > SAMPLE_LINES else [])


def _places(view: RunView, folder: str) -> list[str]:
    prompt = shlex.quote(((view.start.get("job") or {}).get("run") or {}).get("prompt", "Once"))
    answers = any(sample.get("is_answer") for sample in view.of("sample"))
    checkpoints = view.of("checkpoint")
    rows = [("report", f"{folder}/report.html"), ("events", f"{folder}/events.jsonl")]
    rows += [("checkpoint", f"{folder}/{checkpoints[-1]['path']}")] if checkpoints else []
    if view.outcome == "finished":
        rows.append(("try", f"colossus generate {folder} {'--chat' if answers else prompt}"))
    else:
        rows.append(("go on", f"colossus train {folder}"))
    return [f"{name:<11}{value}" for name, value in rows]
