"""One page about a run: `report.html`, made from its event log alone; opens offline."""

from __future__ import annotations

import contextlib
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from colossus.errors import MachineError
from colossus.events import number
from colossus.monitor import curves, phrases
from colossus.monitor.subject import Subject
from colossus.monitor.summary import verdict, yardsticks
from colossus.monitor.view import RunView
from colossus.words import count, duration, percent, rate, size

UNCOMPRESSED = 8.0


def write_report(run_folder: str | Path) -> Path:
    """Writes `report.html` into a run's folder, whole or not at all, and returns its path.

    Raises:
        MachineError: it cannot be written.
    """
    path = _path(run_folder)
    part = path.with_suffix(".html.part")
    page = render(RunView.read(run_folder))
    try:
        part.unlink(missing_ok=True)  # what a kill left, or a link or pipe that somebody put there
        with part.open("x", encoding="utf-8") as stream:
            stream.write(page)
        part.replace(path)
    except OSError as error:
        for file in (part, path):  # what is there tells of an earlier attempt
            with contextlib.suppress(OSError):
                file.unlink()
        raise MachineError(
            f"{path}: cannot be written ({error.strerror}); the run itself is saved, and running the same "
            "command again writes its report"
        ) from error
    return path


def has_report(run_folder: str | Path) -> bool:
    """Whether `report.html` is in a run's folder."""
    return _path(run_folder).is_file()


def _path(run_folder: str | Path) -> Path:
    return Path(run_folder) / "report.html"


def render(view: RunView) -> str:
    """The page. Whatever the log lacks is left out of it."""
    subject = Subject.of(view)
    body = [
        _head(view, subject),
        _yardstick(view),
        _tiles(view, subject),
        _section("Learning curves", curves.learning(view)),
        _section("Where the time went", _time(view)),
        _section("What it writes", _sample(view)),
        _section("The job", _job(subject)),
        _section("What happened", _history(view)),
        _section("Where everything lies", _places(view, subject)),
    ]
    files = resources.files("colossus.monitor")
    css, script = (files.joinpath(f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_e(subject.title)}</title><style>\n{css}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n<footer>Drawn by Colossus from events.jsonl.</footer></main>\n"
        f"<script>\n{script}</script></body></html>\n"
    )


def _head(view: RunView, subject: Subject) -> str:
    outcome = view.outcome
    kind = "good" if outcome == "finished" else "" if outcome.startswith(("running", "not")) else "bad"
    said = outcome if kind != "bad" else f"stopped by {phrases.stopper(outcome)}"
    return (
        f'<header><div class="top"><span>{_e(view.folder.name)}</span>'
        f'<span class="badge {kind}">{_e(said)}</span>'
        f"<span>{_e(subject.when)}</span></div><h1>{_e(subject.title)}</h1>"
        f'<p class="lead">{_e(subject.lead)}</p></header>'
    )


def _yardstick(view: RunView) -> str:
    final = view.final
    if final is None:
        return ""
    ours = number(final["bits_per_byte"])
    known = final["bits_per_byte"] is not None
    rows = yardsticks(view, final)
    finite = [value for _, value in rows if value < float("inf")]
    longest = max(finite, default=1.0)
    bars = []
    for name, value in sorted(rows, key=lambda row: row[1]):
        width = 100 * value / longest if value < float("inf") else 0
        own = " ours" if name == "this model" else ""
        bars.append(
            f'<div class="bar{own}"><span>{_e(name)}</span><div class="track">'
            f'<i style="--w:{width:.1f}%"></i><b>{value:.3f}</b></div></div>'
        )
    which = phrases.held_out(final["num_documents"], final.get("whole", False))
    documents = f"{which} ({size(final['num_bytes'])})"
    return (
        f'<section class="card hero"><div><div class="big">{f"{ours:.2f}" if known else "no"}</div>'
        '<div class="of">bits per byte</div>'
        f'<p class="soft">{_e(verdict(view))}</p></div><div class="bars">{"".join(bars)}'
        f'<p class="note">Bits to store a byte of {_e(documents)}; plain text takes {UNCOMPRESSED:.0f}, '
        "less is better. A model that predicts text well could store it in few bits.</p></div></section>"
    )


def _tiles(view: RunView, subject: Subject) -> str:
    if not view.steps:
        return '<section class="card">No step was taken yet.</section>'
    on_from = f", on from step {view.first_step:,}" if view.first_step else ""
    steps = (count(view.num_steps - view.first_step), f"steps{on_from}")
    tiles = [(duration(view.run_seconds), "of training"), steps]
    is_tuned = bool(on_from) or "init_from" in subject.job.get("model", {})  # they saw more
    per = ""
    if subject.num_parameters and not is_tuned:
        per = f", {view.num_tokens / subject.num_parameters:.1f} a parameter"
    tiles.append((count(view.num_tokens), f"tokens{per}"))
    if (loss := view.last("loss")) is not None:
        tiles.append((f"{loss:.3f}", "training loss of the last step, nats a token"))
    if speed := view.typical("tokens_per_second"):
        tiles.append((count(speed), "tokens/s, the median"))
    if mfu := view.mfu:
        peak = view.peak_flops_per_second
        tiles.append((percent(mfu), "MFU" + (f", of {rate(peak)}" if peak else "")))
    if (step := view.typical("step_seconds")) and (predicted := view.predicted_step_seconds):
        tiles.append((duration(step), f"a step, the median; {duration(predicted)} was predicted"))
    if load := view.typical("expert_load"):
        tiles.append((f"{load:.2f}", "visits of the busiest expert over the mean, the median"))
    cells = "".join(
        f'<div class="tile"><b>{_e(value)}</b><span>{_e(name)}</span></div>' for value, name in tiles
    )
    return f'<section class="card tiles">{cells}</section>'


def _time(view: RunView) -> str:
    shares, total = view.time_ledger(), view.run_seconds
    if not shares or not total:
        return ""
    colours = {name: f"c{i}" for i, name in enumerate(view.LEDGER)}
    stack = "".join(
        f'<i class="{colours[s.name]}" style="flex:{s.seconds / total:.5f}" title="{_e(s.name)}"></i>'
        for s in shares
    )
    rows = "".join(
        f'<tr><td><i class="swatch {colours[s.name]}"></i>{_e(s.name)}</td>'
        f'<td class="n">{_e(duration(s.seconds))}</td><td class="n">{percent(s.seconds / total)}</td></tr>'
        for s in shares
    )
    down = view.downtime_seconds
    note = (
        f'<p class="note">Between attempts it stood still for {duration(down)}; not counted.</p>'
        if down > 1
        else ""
    )
    return f'<div class="card"><div class="stack">{stack}</div><table>{rows}</table>{note}</div>'


def _sample(view: RunView) -> str:
    blocks = [
        f'<div class="card" style="padding:0"><pre><mark>{_e(s["prompt"])}</mark>{_e(s["text"])}</pre></div>'
        for s in view.of("sample")[-3:]
    ]
    if not blocks:
        return ""
    return (
        "".join(blocks)
        + '<p class="note" style="margin-top:8px">What it was given is marked; the rest is its own.</p>'
    )


def _job(subject: Subject) -> str:
    if not subject.job:
        return ""
    sections = []
    for section, fields in subject.job.items():
        rows = []
        for name, value in fields.items():
            origin = subject.origins.get(f"{section}.{name}", "derived")
            asked = "" if origin == "derived" else f' class="asked" data-origin="{_e(origin)}"'
            rows.append(f"<dt>{_e(name)}</dt><dd{asked}>{_e(_value(value))}</dd>")
        if rows:
            sections.append(f"<section><h3>{_e(section)}</h3><dl>{''.join(rows)}</dl></section>")
    return (
        '<div class="card"><p class="note">In blue, with where it came from: what was asked for or '
        f'planned. The rest was derived.</p><div class="fields">{"".join(sections)}</div></div>'
    )


def _history(view: RunView) -> str:
    parts = []
    if view.decisions:
        rows = "".join(
            f'<tr><td class="n">{e["first_step"]:,}</td>'
            f"<td>{_e(phrases.decision(e['name'], e['value']))}</td></tr>"
            for e in view.decisions
        )
        parts.append(_table("Decisions", [("from step", True), ("", False)], rows))
    newest = {phrases.subject(e): e for e in view.evaluated if phrases.of(e)}
    if newest:
        rows = "".join(
            f'<tr><td class="n">{e["step"]:,}</td><td>{_e(name)}</td><td>{_e(phrases.figures(e))}</td></tr>'
            for name, e in newest.items()
        )
        parts.append(_table("Evaluated on", [("step", True), ("", False), ("", False)], rows))
    checkpoints = view.of("checkpoint")
    if checkpoints:
        rows = "".join(
            f'<tr><td class="n">{e["step"]:,}</td><td><code>{_e(e["path"])}</code></td>'
            f'<td class="n">{size(e.get("bytes", 0))}</td></tr>'
            for e in checkpoints[-8:]
        )
        shown = f" (the last 8 of {len(checkpoints)})" if len(checkpoints) > 8 else ""
        parts.append(_table(f"Checkpoints written{shown}", [("step", True), ("", False), ("", True)], rows))
    if len(view.starts) > 1:
        rows = "".join(
            f'<tr><td class="n">{i + 1}</td><td>from step {e.get("step") or 0:,}</td>'
            f'<td class="n">after {_e(duration(number(e["run_seconds"])))}</td></tr>'
            for i, e in enumerate(view.starts)
        )
        parts.append(_table("Attempts", [("", True), ("", False), ("", True)], rows))
    return f'<div class="two-columns">{"".join(parts)}</div>' if parts else ""


def _places(view: RunView, subject: Subject) -> str:
    checkpoints = view.of("checkpoint")
    rows = [("run folder", str(view.folder.resolve())), ("events", "events.jsonl"), ("job", "job.toml")]
    rows += [("newest checkpoint", checkpoints[-1]["path"])] if checkpoints else []
    rows += [("continue or sample", f"colossus train {view.folder}\ncolossus generate {view.folder} PROMPT")]
    files = _pairs([(name, f'<code style="white-space:pre-wrap">{_e(text)}</code>') for name, text in rows])
    machine = _pairs([(name, _e(text)) for name, text in subject.machine])
    second = f'<div class="card"><h3>The machine</h3>{machine}</div>' if machine else ""
    return (
        f'<div class="two-columns"><div class="card"><h3>Files and commands</h3>{files}</div>{second}</div>'
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_e(title)}</h2>\n{content}</section>" if content else ""


def _table(title: str, columns: list[tuple[str, bool]], rows: str) -> str:
    head = "".join(f"<th{' class=n' if right else ''}>{_e(name)}</th>" for name, right in columns)
    head = f"<tr>{head}</tr>" if any(name for name, _ in columns) else ""
    return (
        f'<div class="card"><h3>{_e(title)}</h3><div class="scroll"><table>{head}{rows}</table></div></div>'
    )


def _pairs(rows: list[tuple[str, str]]) -> str:
    cells = "".join(f"<dt>{_e(name)}</dt><dd>{html}</dd>" for name, html in rows)
    return f'<dl class="pairs">{cells}</dl>' if cells else ""


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if value >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_value(item) for item in value) or "none"
    return str(value)


def _e(text: Any) -> str:
    return escape(str(text), quote=True)
