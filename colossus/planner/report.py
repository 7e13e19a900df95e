"""A plan in words: the winner, a short table, the waterfall, memory; and as one page of HTML."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence

from colossus.hardware.catalogue import accelerator, accelerator_names, node, node_names
from colossus.planner.batch import critical_batch_tokens
from colossus.planner.losses import losses
from colossus.planner.plan import Costs, Plan, size_words
from colossus.planner.search import Choice
from colossus.planner.sensitivity import by_batch, days_if
from colossus.words import count, dollars, duration, energy, memory, plural, power, span

GIB = 2**30
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }
body { color: #1c2430 }
h1 { font-size: 1.5em } h2 { font-size: 1.1em; margin-top: 2em } table { border-collapse: collapse }
td, th { padding: .2em .8em; text-align: right; border-bottom: 1px solid #dde3ea }
td:last-child, th:last-child { text-align: left } svg { max-width: 100% }
svg text { font: 12px system-ui, sans-serif; fill: #1c2430 }
pre { background: #f4f6f9; padding: 1em; overflow: auto }
"""
BAR = 24  # characters of a bar
LEAST_POINTS = 0.05  # of the waterfall, that are shown


def text(plan: Plan) -> str:
    """The whole report for a terminal."""
    sections = (
        _head(plan),
        _winner(plan),
        _table(plan),
        _waterfall(plan),
        _memory(plan),
        _costs(plan),
        _batches(plan),
        _sensitivity(plan),
        _basis(plan),
        _tail(plan),
    )
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _head(plan: Plan) -> list[str]:
    hardware = plan.hardware
    pools = " + ".join(f"{pool.count:,} {pool.accelerator.name}" for pool in hardware.pools)
    if _on_processor(plan):
        pools = f"{plural(hardware.count, 'rank')} of {hardware.accelerator.title}"
    name = plan.arch.preset or "model"
    return [
        f"{name} ({size_words(plan.arch)}) on {hardware.name}: {pools}",
        f"{count(plan.tokens)} tokens, {plan.global_batch:,} x {plan.seq_len:,} tokens a step, "
        f"{plan.precision}; {plan.priced:,} layout{'' if plan.priced == 1 else 's'} priced"
        + ("" if plan.complete else ", then time ran out: the best so far"),
    ]


def _winner(plan: Plan) -> list[str]:
    best, per = plan.best, plan.tokens_per_second
    low, high = (best.seconds * (1 + sign * plan.band.share) for sign in (-1, 1))
    lines = [
        f"best      {best.name}",
        f"          {plan.use()}; {plural(best.micro_batches, 'micro-batch')} a step",
        f"step      {span(best.seconds)} ({span(low)} to {span(high)}), {per:,.0f} tokens/s, "
        f"{per / best.ranks:,.0f} {'a rank' if _on_processor(plan) else 'an accelerator'}; "
        f"MFU {100 * best.mfu:.1f}% ({_convention(plan)})",
    ]
    for pool in best.pools:
        lines.append(
            f"pool      {pool.accelerator}: {plural(pool.replicas, 'replica')} of "
            f"{plural(pool.share, 'sequence')}, micro_batch={pool.micro_batch} "
            f"recompute={pool.recompute}; {span(pool.seconds)}, "
            f"{memory(pool.reserved)} of {memory(pool.capacity)}"
        )
    lines += _confirmed(plan)
    lines += [f"binds     {plan.binding}", f"next      {plan.runner_up}"]
    return lines if _on_processor(plan) else [*lines, f"measured  {plan.nearest}"]


def _confirmed(plan: Plan) -> list[str]:
    """Whether the program itself fits, and which quicker layouts it would not fit with."""
    asked = plan.confirmed
    lines = []
    if asked.best is not None:
        most = f"{memory(asked.best.reserved)} of {memory(asked.best.capacity)}"
        if asked.best.fused:
            most += f", {memory(asked.best.fused)} less for what compiling fuses, by formulas"
        lines.append(f"fits      dry runs of {plural(asked.best.ranks, 'kind')} of ranks: {most}")
    elif asked.why is not None:
        lines.append(f"fits      by formulas alone: {asked.why}")
    elif asked.none_fits:
        lines.append("fits      by formulas alone: dry runs of the program need more than there is")
    for answer in asked.refused:
        lines.append(f"refused   {answer.choice.name}: {memory(answer.reserved)} by a dry run")
    return lines


def _on_processor(plan: Plan) -> bool:
    return plan.hardware.accelerator.device == "cpu"


def _convention(plan: Plan) -> str:
    """What MFU is divided by, and how attention counts."""
    peak = "best measured rate" if _on_processor(plan) else "bf16 peak"
    return f"of the {peak}, causal attention half"


def _table(plan: Plan) -> list[str]:
    lines = [f"{'step':>9}  {'MFU':>6}  {'memory':>9}  layout"]
    for choice in plan.table:
        mfu = f"{100 * choice.mfu:.1f}%"
        lines.append(f"{span(choice.seconds):>9}  {mfu:>6}  {memory(choice.reserved):>9}  {choice.name}")
    return lines


def waterfall(plan: Plan) -> list[tuple[str, float]]:
    """(loss, points of MFU), from the peak down to goodput; they sum to 100."""
    found = losses(plan.best, plan.arch, plan.seq_len)
    useful = 100 - sum(found.values())
    lost = useful * (1 - plan.high.goodput.share)
    return [*found.items(), ("failures, where many", lost), ("goodput", useful - lost)]


def _waterfall(plan: Plan) -> list[str]:
    lines = ["where 100% of the peak goes"]
    for name, points in waterfall(plan):
        if points >= LEAST_POINTS:
            bar = "#" * max(1, round(points / 100 * BAR * 2))
            lines.append(f"{points:7.1f}%  {name:38} {bar}")
    return lines


def _memory(plan: Plan) -> list[str]:
    best = plan.best
    capacity = min(pool.accelerator.memory for pool in plan.hardware.pools)
    lines = [f"memory of the rank that needs most: {memory(best.reserved)} reserved, "
             f"{memory(best.allocated)} allocated, of {memory(capacity)}; by formulas"]  # fmt: skip
    if (answer := plan.confirmed.best) is not None:
        lines[0] += f", and {memory(answer.reserved)} by dry runs of the program"
    for name, size in best.memory.items():
        if size > 0.005 * best.allocated:
            lines.append(f"{memory(size):>11}  {name}")
    return lines


def _costs(plan: Plan) -> list[str]:
    """Of the run, where failures are few and where they are many; what is free or never fails is left out."""
    hardware = plan.hardware
    low, high = hardware.failures
    has_spares = hardware.count > hardware.server
    known = {"energy": hardware.watts > 0, "money": hardware.usd_per_hour > 0}

    def row(words: str, costs: Costs) -> str:
        share = costs.goodput
        cells = []
        if high > 0:
            interval = "never" if math.isinf(share.interval) else duration(share.interval)
            cells = [_failures(share.failures_per_day), f"{100 * share.share:.1f}%", interval]
            cells += [f"{share.spare_nodes}"] if has_spares else []
        cells.append(_days(costs.days))
        cells += [energy(costs.energy)] if known["energy"] else []
        cells += [dollars(costs.money)] if known["money"] else []
        return f"{words:14}" + "".join(f"{cell:>16}" for cell in cells)

    names = ["failures", "goodput", "checkpoint"] if high > 0 else []
    names += ["spare servers"] if high > 0 and has_spares else []
    names += ["run", *(name for name, is_known in known.items() if is_known)]
    lines = [" " * 14 + "".join(f"{name:>16}" for name in names)]
    if high > 0:
        lines += [row(f"few ({low:g})", plan.low), row(f"many ({high:g})", plan.high)]
        lines.append(
            "failures: per 1000 days of a server of 8; published values disagree by 4 times. "
            "checkpoint: time between two"
        )
    else:
        lines.append(row("", plan.low))
    facts = [f"power {power(1e6 * plan.high.power)} with PUE {hardware.pue:g}"] if known["energy"] else []
    facts += [f"${hardware.usd_per_hour:.2f} an accelerator and hour"] if known["money"] else []
    return [*lines, "; ".join(facts)] if facts else lines


def _failures(a_day: float) -> str:
    """How often: 2.5 a day, one in 64 days."""
    if a_day <= 0:
        return "none"
    return f"{a_day:.1f} a day" if a_day >= 0.95 else f"1 in {1 / a_day:,.0f} days"


def _days(days: float) -> str:
    if days >= 1:
        return f"{days:,.1f} days"
    hours = 24 * days
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{60 * hours:.1f} min" if 60 * hours >= 1 else f"{3600 * hours:.2g} s"


def _batches(plan: Plan) -> list[str]:
    """Time against batch, and what each batch costs in tokens."""
    rows = by_batch(plan)
    if len(rows) < 2:
        return []
    critical = count(critical_batch_tokens(plan.tokens))
    run = "tokens/s" if plan.by_clock else "run"
    lines = [f"batch; critical for {count(plan.tokens)} tokens are {critical} a step (arXiv 2410.21676)"]
    lines.append(
        f"{'sequences':>10}{'tokens':>9}{'step':>10}{run:>14}{'at work':>9}{'for the same loss':>24}"
    )
    for row in rows:
        tokens = row.sequences * plan.seq_len
        cells = [f"{row.sequences:,}".rjust(10), count(tokens).rjust(9), span(row.seconds).rjust(10)]
        cells.append((count(tokens / row.seconds) if plan.by_clock else _days(row.days)).rjust(14))
        cells.append(f"{100 * row.share:.0f}%".rjust(9))
        cells.append(f"about {100 * row.more:.0f}% more tokens".rjust(24))
        lines.append("".join(cells) + ("  this plan" if row.sequences == plan.global_batch else ""))
    return lines


def _sensitivity(plan: Plan) -> list[str]:
    """Time of the run if a thing is better or worse than assumed, where that shows."""
    rows = [(_days(better), _days(worse), what) for what, better, worse in days_if(plan)]
    rows = [row for row in rows if row[0] != row[1]]
    return (
        ["the run, if", *(f"{better:>12}  to {worse:>12}  {what}" for better, worse, what in rows)]
        if rows
        else []
    )


def _basis(plan: Plan) -> list[str]:
    """What was measured, interpolated or assumed."""
    lines = ["the seconds rest on", *(f"  {what:13} {words}" for what, words in plan.basis)]
    return [*lines, f"  {'so the band':13} {plan.band.share:.0%} either way: {plan.band.why}"]


def _tail(plan: Plan) -> list[str]:
    if not plan.assumptions:
        return []
    return ["assumed", *(f"  {words}" for words in plan.assumptions)]


def hardware_text() -> str:
    """The catalogue as a table."""
    lines = [
        f"{'accelerator':16}{'bf16':>8}{'fp8':>8}{'of peak':>9}{'GiB':>8}{'TB/s':>7}{'NVLink':>8}{'W':>6}"
        f"  kind; assumed"
    ]
    for name in accelerator_names():
        part = accelerator(name)
        guessed = [words.partition(", from parts")[0].partition(":")[0] for words in part.assumed]
        assumed = f"; {', '.join(guessed)}" if guessed else ""
        fp8 = "?" if math.isnan(part.fp8) else f"{part.fp8 / 1e12:,.0f}"
        lines.append(
            f"{name:16}{part.bf16 / 1e12:8,.0f}{fp8:>8}{part.reachable:9.2f}"
            f"{part.memory / GIB:8.1f}{part.copy / 1e12:7.2f}{part.nvlink / 1e9:8.0f}{part.watts:6.0f}"
            f"  {part.kind}{assumed}"
        )
    lines += [
        "bf16, fp8: TFLOP/s, dense. of peak: the best bf16 product that was measured. GiB: as the device "
        "reports it to PyTorch. TB/s: of a copy. NVLink: GB/s one way, of AMD's parts xGMI. ?: not "
        "published.",
        "",
        f"{'server':24}{'accelerator':16}{'size':>5}{'Gb/s each':>11}{'W':>8}  kind; assumed",
    ]  # fmt: skip
    for name in node_names():
        server = node(name)
        each = server.nics * server.nic / server.size * 8 / 1e9
        nic, watts = (f"{value:,.0f}" if value else "?" for value in (each, server.watts))
        lines.append(
            f"{name:24}{server.accelerator:16}{server.size:5}{nic:>11}{watts:>8}"
            f"  {server.kind}{'; W' if server.assumed else ''}"
        )
    lines += ["", "sources: colossus/hardware/catalogue/*.toml"]
    return "\n".join(lines)


# ---------------------------------------------------------------------- one self-contained page


def page(
    plan: Plan,
    said: str,
    pareto: Sequence[tuple[int, float, float]],
    sensitivity: Sequence[tuple[str, float, float]],
) -> str:
    """The report as HTML without anything from outside. said: its `text`; pareto: (accelerators, days,
    dollars); sensitivity: (what, days if better, days if worse)."""
    best = plan.best
    title = f"Plan: {plan.arch.preset or 'model'} on {plan.hardware.name}"
    capacity = min(pool.accelerator.memory for pool in plan.hardware.pools)
    uses = [(name, size) for name, size in best.memory.items() if size > 0]
    uses.append(("free", max(0.0, capacity - best.reserved)))
    points = [(name, points) for name, points in waterfall(plan) if points >= LEAST_POINTS]
    rows = "".join(
        f"<tr><td>{span(c.seconds)}</td><td>{100 * c.mfu:.1f}%</td><td>{memory(c.reserved)}</td>"
        f"<td>{html.escape(c.name)}</td></tr>"
        for c in plan.table
    )
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>{STYLE}</style><h1>{html.escape(title)}</h1><pre>{html.escape(said)}</pre>
<h2>Where the peak goes</h2>{bars(points, lambda value: f"{value:.1f}%")}
<h2>Memory of the rank that needs most</h2>{bars(uses, memory)}
{_scatter(pareto)}{_tornado(sensitivity)}
<h2>The best layouts</h2>
<table><tr><th>step</th><th>MFU</th><th>memory</th><th>layout</th></tr>{rows}</table></html>
"""


def bars(rows: Iterable[tuple[str, float]], words: Callable[[float], str]) -> str:
    """A bar for each (name, value) above 0, as SVG. words: a value in words."""
    rows = [row for row in rows if row[1] > 0]
    most = max((value for _, value in rows), default=1.0)
    lines = []
    for i, (name, value) in enumerate(rows):
        y, width = 22 * i, 380 * value / most
        lines.append(
            f'<text x="250" y="{y + 15}" text-anchor="end">{html.escape(name)}</text>'
            f'<rect x="258" y="{y + 3}" width="{width:.1f}" height="16" fill="#3b6fb6"/>'
            f'<text x="{264 + width:.1f}" y="{y + 15}">{words(value)}</text>'
        )
    return f'<svg viewBox="0 0 720 {22 * len(rows)}" role="img">{"".join(lines)}</svg>'


def _scatter(points: Sequence[tuple[int, float, float]]) -> str:
    """Time against money by the number of accelerators; nothing where one size alone was planned."""
    if len(points) < 2:
        return ""
    days = [math.log(max(p[1], 1e-6)) for p in points]
    spread, dearest = max(days) - min(days) or 1.0, max(p[2] for p in points) or 1.0
    marks = []
    for (size, d, m), x in zip(points, days, strict=True):
        px, py = 60 + 540 * (x - min(days)) / spread, 20 + 180 * (1 - m / dearest)
        marks.append(
            f'<circle cx="{px:.0f}" cy="{py:.0f}" r="5" fill="#b6483b"/>'
            f'<text x="{px + 8:.0f}" y="{py + 4:.0f}">'
            f"{size:,}: {_days(d)}{', ' + dollars(m) if m > 0 else ''}</text>"
        )
    return (
        "<h2>Time and money by the number of accelerators</h2>"
        f'<svg viewBox="0 0 800 220" role="img">{"".join(marks)}</svg>'
    )


def _tornado(rows: Sequence[tuple[str, float, float]]) -> str:
    words = [(what, _days(better), _days(worse)) for what, better, worse in rows]
    cells = "".join(
        f"<tr><td>{better}</td><td>{worse}</td><td>{html.escape(what)}</td></tr>"
        for what, better, worse in words
        if better != worse
    )
    if not cells:
        return ""
    return (
        "<h2>The run, if a thing is better or worse than assumed</h2>"
        f"<table><tr><th>if better</th><th>if worse</th><th>what</th></tr>{cells}</table>"
    )


__all__ = ["STYLE", "Choice", "bars", "hardware_text", "page", "text", "waterfall"]
