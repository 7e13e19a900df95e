"""A plan in words: the winner, a short table, the waterfall, memory; and as one page of HTML."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

from colossus.hardware.catalogue import accelerator, accelerator_names, node, node_names
from colossus.planner.plan import BAND, Costs, Plan, size_words
from colossus.planner.search import Choice

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


def text(plan: Plan) -> str:
    """The whole report for a terminal."""
    sections = (
        _head(plan),
        _winner(plan),
        _table(plan),
        _waterfall(plan),
        _memory(plan),
        _costs(plan),
        _sensitivity(plan),
        _basis(plan),
        _tail(plan),
    )
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _head(plan: Plan) -> list[str]:
    hardware = plan.hardware
    pools = " + ".join(f"{pool.count:,} {pool.accelerator.name}" for pool in hardware.pools)
    name = plan.arch.preset or "model"
    return [
        f"{name} ({size_words(plan.arch)}) on {hardware.name}: {pools}",
        f"{plan.tokens:.3g} tokens, {plan.global_batch:,} x {plan.seq_len:,} tokens a step, "
        f"{plan.precision}; {plan.priced:,} layouts priced",
    ]


def _winner(plan: Plan) -> list[str]:
    best, per = plan.best, plan.tokens_per_second
    low, high = best.seconds * (1 - BAND), best.seconds * (1 + BAND)
    lines = [
        f"best      {best.name}",
        f"          {best.ranks:,} accelerators work, {plan.hardware.count - best.ranks:,} wait in reserve; "
        f"{best.micro_batches} micro-batches a step",
        f"step      {best.seconds:.3g} s ({low:.3g} to {high:.3g}), {per:,.0f} tokens/s, "
        f"{per / best.ranks:,.0f} an accelerator; MFU {100 * best.mfu:.1f}% ({_convention(plan)})",
    ]
    for pool in best.pools:
        lines.append(
            f"pool      {pool.accelerator}: {pool.replicas} replicas of {pool.share:,} sequences, "
            f"micro_batch={pool.micro_batch} recompute={pool.recompute}; {pool.seconds:.3g} s, "
            f"{pool.reserved / GIB:.0f} of {pool.capacity / GIB:.0f} GiB"
        )
    return [*lines, f"binds     {plan.binding}", f"next      {plan.runner_up}", f"measured  {plan.nearest}"]


def _convention(plan: Plan) -> str:
    """What MFU is divided by, and how attention counts."""
    cpu = plan.hardware.accelerator.device == "cpu"
    return f"of the {'best measured rate' if cpu else 'bf16 peak'}, causal attention half"


def _table(plan: Plan) -> list[str]:
    lines = [f"{'step s':>9}  {'MFU %':>6}  {'GiB':>6}  layout"]
    for choice in plan.table:
        lines.append(
            f"{choice.seconds:9.3f}  {100 * choice.mfu:6.1f}  {choice.reserved / GIB:6.1f}  {choice.name}"
        )
    return lines


def waterfall(plan: Plan) -> list[tuple[str, float]]:
    """(loss, points of MFU), from the peak down to goodput; they sum to 100."""
    best = plan.best
    seconds = best.seconds
    parts = [(name, value / seconds * 100) for name, value in best.parts.items() if name != "products"]
    useful = 100 * best.mfu
    products = best.parts["products"] / seconds * 100
    # What products take beyond their share at the peak: rate, recomputed attention FLOPs are counted apart.
    left = 100 - sum(value for _, value in parts)
    shape = ("products below the peak", max(0.0, left - useful) if products else 0.0)
    counted = useful - max(0.0, useful - left)
    lost = counted * (1 - plan.high.goodput.share)
    return [shape, *parts, ("failures, many", lost), ("goodput", counted - lost)]


def _waterfall(plan: Plan) -> list[str]:
    lines = ["where 100% of the peak goes"]
    for name, points in waterfall(plan):
        if points >= 0.05:
            bar = "#" * max(1, round(points / 100 * BAR * 2))
            lines.append(f"{points:7.1f}%  {name:38} {bar}")
    return lines


def _memory(plan: Plan) -> list[str]:
    best = plan.best
    capacity = min(pool.accelerator.memory for pool in plan.hardware.pools)
    lines = [f"memory of the rank that needs most: {best.reserved / GIB:.1f} GiB reserved, "
             f"{best.allocated / GIB:.1f} allocated, of {capacity / GIB:.1f}"]  # fmt: skip
    for name, size in best.memory.items():
        if size > 0.005 * best.allocated:
            lines.append(f"{size / GIB:9.2f}  {name}")
    return lines


def _costs(plan: Plan) -> list[str]:
    def row(words: str, costs: Costs) -> str:
        share = costs.goodput
        interval = "-" if math.isinf(share.interval) else f"{share.interval:,.0f} s"
        return (
            f"{words:15}{share.failures_per_day:9.1f}{100 * share.share:10.1f}{interval:>13}"
            f"{share.spare_nodes:8}{_days(costs.days):>12}{costs.energy / 1e6:9.3g}{costs.money / 1e6:10.3g}"
        )

    header = f"{'failures':15}{'a day':>9}{'goodput %':>10}{'checkpoint':>13}{'spares':>8}"
    header += f"{'run':>12}{'GWh':>9}{'million $':>10}"
    low, high = plan.hardware.failures
    return [
        header,
        row(f"few ({low:g})", plan.low),
        row(f"many ({high:g})", plan.high),
        "failures: per 1000 node-days; published values disagree by 4 times. checkpoint: seconds between two",
        f"power {plan.high.power:,.3g} MW with PUE {plan.hardware.pue:g}; "
        f"{plan.hardware.usd_per_hour:.2f} $ an accelerator and hour",
    ]  # fmt: skip


def _days(days: float) -> str:
    if days >= 1:
        return f"{days:,.1f} days"
    return f"{24 * days:.1f} h" if days * 24 >= 1 else f"{1440 * days:.1f} min"


def _sensitivity(plan: Plan) -> list[str]:
    """Days of the run if a thing is better or worse than assumed."""
    from colossus.planner.sensitivity import days_if

    if plan.hardware.count < 2:
        return []
    rows = [f"{_days(better):>12}  to {_days(worse):>12}  {what}" for what, better, worse in days_if(plan)]
    return ["the run, if", *rows]


def _basis(plan: Plan) -> list[str]:
    """What was measured, interpolated or assumed."""
    return ["the seconds rest on", *(f"  {what:13} {words}" for what, words in plan.basis)]


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
        assumed = f"; {', '.join(part.assumed)}" if part.assumed else ""
        lines.append(
            f"{name:16}{part.bf16 / 1e12:8,.0f}{part.fp8 / 1e12:8,.0f}{part.reachable:9.2f}"
            f"{part.memory / GIB:8.1f}{part.copy / 1e12:7.2f}{part.nvlink / 1e9:8.0f}{part.watts:6.0f}"
            f"  {part.kind}{assumed}"
        )
    lines += [
        "bf16, fp8: TFLOP/s, dense. of peak: the best bf16 product that was measured. TB/s: of a copy. "
        "NVLink: GB/s one way.",
        "",
        f"{'server':24}{'accelerator':16}{'size':>5}{'Gb/s each':>11}{'W':>8}  kind",
    ]  # fmt: skip
    for name in node_names():
        server = node(name)
        each = server.nics * server.nic / server.size * 8 / 1e9
        lines.append(
            f"{name:24}{server.accelerator:16}{server.size:5}{each:11.0f}{server.watts:8.0f}  {server.kind}"
        )
    lines += ["", "sources: colossus/hardware/catalogue/*.toml"]
    return "\n".join(lines)


# ---------------------------------------------------------------------- one self-contained page


def page(
    plan: Plan, pareto: Sequence[tuple[int, float, float]], sensitivity: Sequence[tuple[str, float, float]]
) -> str:
    """The report as HTML without anything from outside. pareto: (accelerators, days, million dollars);
    sensitivity: (what, days if better, days if worse)."""
    best = plan.best
    title = f"Plan: {plan.arch.preset or 'model'} on {plan.hardware.name}"
    capacity = min(pool.accelerator.memory for pool in plan.hardware.pools)
    memory = [(name, size / GIB) for name, size in best.memory.items() if size > 0]
    memory.append(("free", max(0.0, (capacity - best.reserved) / GIB)))
    rows = "".join(
        f"<tr><td>{c.seconds:.3f}</td><td>{100 * c.mfu:.1f}</td><td>{c.reserved / GIB:.1f}</td>"
        f"<td>{html.escape(c.name)}</td></tr>"
        for c in plan.table
    )
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>{STYLE}</style><h1>{html.escape(title)}</h1><pre>{html.escape(text(plan))}</pre>
<h2>Where the peak goes, %</h2>{_bars(waterfall(plan), "%")}
<h2>Memory of the rank that needs most, GiB</h2>{_bars(memory, "GiB")}
<h2>Days and money by the number of accelerators</h2>{_scatter(pareto)}
<h2>Days, if a thing is better or worse than assumed</h2>{_tornado(sensitivity)}
<h2>The best layouts</h2>
<table><tr><th>step s</th><th>MFU %</th><th>GiB</th><th>layout</th></tr>{rows}</table></html>
"""


def _bars(rows: Iterable[tuple[str, float]], unit: str) -> str:
    rows = [row for row in rows if row[1] > 0]
    most = max((value for _, value in rows), default=1.0)
    lines = []
    for i, (name, value) in enumerate(rows):
        y, width = 22 * i, 380 * value / most
        lines.append(
            f'<text x="250" y="{y + 15}" text-anchor="end">{html.escape(name)}</text>'
            f'<rect x="258" y="{y + 3}" width="{width:.1f}" height="16" fill="#3b6fb6"/>'
            f'<text x="{264 + width:.1f}" y="{y + 15}">{value:.3g} {unit}</text>'
        )
    return f'<svg viewBox="0 0 720 {22 * len(rows)}" role="img">{"".join(lines)}</svg>'


def _scatter(points: Sequence[tuple[int, float, float]]) -> str:
    if not points:
        return "<p>One size alone was planned.</p>"
    days = [math.log(max(p[1], 1e-6)) for p in points]
    money = [p[2] for p in points]
    spread_x, spread_y = max(days) - min(days) or 1.0, max(money) - min(money) or 1.0
    marks = []
    for (count, d, m), x in zip(points, days, strict=True):
        px, py = 60 + 540 * (x - min(days)) / spread_x, 20 + 180 * (1 - (m - min(money)) / spread_y)
        marks.append(
            f'<circle cx="{px:.0f}" cy="{py:.0f}" r="5" fill="#b6483b"/>'
            f'<text x="{px + 8:.0f}" y="{py + 4:.0f}">'
            f"{count:,}: {d:.3g} d, {m:.3g} M$</text>"
        )
    return f'<svg viewBox="0 0 800 220" role="img">{"".join(marks)}</svg>'


def _tornado(rows: Sequence[tuple[str, float, float]]) -> str:
    cells = "".join(
        f"<tr><td>{better:.3g}</td><td>{worse:.3g}</td><td>{html.escape(what)}</td></tr>"
        for what, better, worse in rows
    )
    return f"<table><tr><th>days if better</th><th>if worse</th><th>what</th></tr>{cells}</table>"


__all__ = ["Choice", "hardware_text", "page", "text", "waterfall"]
