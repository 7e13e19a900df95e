"""A dry run as one page of HTML without anything from outside: the pipeline and memory over a step."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence

from colossus.dryrun import report
from colossus.dryrun.ranks import DryRun, Judged
from colossus.dryrun.timeline import ENDS, WAITS, Interval, intervals, ranks_of
from colossus.planner.report import STYLE, bars
from colossus.words import memory, span

WIDTH, LEFT = 900.0, 150.0  # of the time axis, and of the names beside it
ROW, PLOT = 26, 70  # heights of a rank's line, and of its memory
LEAST = 1e-3  # of a step: what takes less is left out
NAMED = 24.0  # wide enough for a number in it
COLOURS = {"F": "#3b6fb6", "B": "#6aa84f", "I": "#6aa84f", "W": "#b6893b"}
LEGEND = {"forward": "#3b6fb6", "backward": "#6aa84f", "backward of weights alone": "#b6893b",
          ENDS: "#8a5fb0", WAITS: "#e3e8ee"}  # fmt: skip


def page(found: DryRun) -> str:
    """The report, where the time of a step goes, the pipeline, and memory over time."""
    title = f"Dry run: {found.job.model.preset or 'model'} on {found.hardware.name}"
    body = [f"<h1>{html.escape(title)}</h1><pre>{html.escape(report.text(found))}</pre>"]
    if found.price is not None:
        pool = found.price.slowest
        causes = sorted(pool.causes(pool.busiest).items(), key=lambda item: -item[1])
        least = LEAST * found.price.seconds
        rows = [(report.TIMES.get(cause, cause), seconds) for cause, seconds in causes if seconds > least]
        body.append(f"<h2>Where the time of a step goes</h2>{bars(rows, span)}")
        lines = [
            (name, judged, list(intervals(pool, rank, judged.traced)))
            for name, pool, rank, judged in ranks_of(found)
        ]
        body.append(f"<h2>The pipeline</h2>{_legend()}{_pipeline(lines, found.price.seconds)}")
        body.append(f"<h2>Memory of tensors over a step</h2>{_memories(lines, found.price.seconds)}")
    uses = [(report.NAMES.get(use, use), size) for use, size in _largest(found.worst)]
    body.append(f"<h2>What lives when that is most</h2>{bars(uses, memory)}")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}body {{ max-width: 72em }}</style>{''.join(body)}</html>\n"
    )


Lines = Sequence[tuple[str, Judged, Sequence[Interval]]]


def _largest(judged: Judged) -> list[tuple[str, float]]:
    return sorted(judged.traced.peak.by_use.items(), key=lambda item: -item[1])


def _legend() -> str:
    keys = [
        f'<svg width="14" height="12"><rect width="12" height="12" fill="{colour}"/></svg> {name} &nbsp; '
        for name, colour in LEGEND.items()
    ]
    return f"<p>{''.join(keys)}</p>"


def _pipeline(lines: Lines, seconds: float) -> str:
    """A line for each rank: its passes, with the numbers of their micro batches where there is room."""
    drawn: list[str] = []
    for number, (name, _, parts) in enumerate(lines):
        top = ROW * number
        drawn.append(f'<text x="{LEFT - 8:g}" y="{top + 16}" text-anchor="end">{html.escape(name)}</text>')
        for each in parts:
            drawn.append(_part(each, top, seconds))
    return _svg(drawn, ROW * len(lines), seconds)


def _part(each: Interval, top: float, seconds: float) -> str:
    x, width = LEFT + WIDTH * each.start / seconds, WIDTH * each.seconds / seconds
    colour = LEGEND[each.name] if each.action is None else COLOURS[each.action.work]
    box = f'<rect x="{x:.2f}" y="{top}" width="{width:.2f}" height="{ROW - 4}" fill="{colour}"'
    line = ' stroke="#fff" stroke-width="0.5"' if each.name != WAITS else ""
    said = f"<title>{each.name}: {span(each.seconds)} from {span(max(each.start, 1e-9))} on</title>"
    number = ""
    if each.action is not None and width > NAMED:
        number = (
            f'<text x="{x + width / 2:.2f}" y="{top + 15}" text-anchor="middle" style="fill:#fff">'
            f"{each.action.micro_batch}</text>"
        )
    return f"{box}{line}>{said}</rect>{number}"


def _memories(lines: Lines, seconds: float) -> str:
    """Of each rank: the most that lives in each pass, and what lives between them."""
    most = max(judged.traced.peak.num_bytes for _, judged, _ in lines)
    drawn: list[str] = []
    for number, (name, judged, parts) in enumerate(lines):
        top, peak = (PLOT + 14) * number, judged.traced.peak.num_bytes
        bottom = top + PLOT
        points = " ".join(
            f"{LEFT + WIDTH * at / seconds:.1f},{bottom - (PLOT - 8) * lives / most:.1f}"
            for at, lives in _levels(judged, parts)
        )
        drawn.append(
            f'<text x="{LEFT - 8:g}" y="{top + 34}" text-anchor="end">{html.escape(name)}</text>'
            f'<text x="{LEFT - 8:g}" y="{top + 50}" text-anchor="end">{memory(peak)}</text>'
            f'<polygon points="{LEFT:g},{bottom} {points} {LEFT + WIDTH:g},{bottom}" fill="#9dbbe0"/>'
            f'<line x1="{LEFT:g}" x2="{LEFT + WIDTH:g}" y1="{bottom}" y2="{bottom}" stroke="#c3ccd6"/>'
        )
    return _svg(drawn, (PLOT + 14) * len(lines), seconds)


def _levels(judged: Judged, parts: Sequence[Interval]) -> Iterator[tuple[float, float]]:
    """(seconds, bytes), in steps."""
    lives = float(sum(judged.traced.at_rest.values()))
    for each in parts:
        if each.most is not None and each.left is not None:
            yield each.start, each.most
            yield each.start + each.seconds, each.most
            lives = each.left
        else:
            yield each.start, lives
        yield each.start + each.seconds, lives


def _svg(drawn: Sequence[str], height: float, seconds: float) -> str:
    axis = "".join(
        f'<text x="{LEFT + WIDTH * share:g}" y="{height + 16}" text-anchor="{anchor}">{words}</text>'
        for share, anchor, words in (
            (0.0, "start", "0"),
            (0.5, "middle", span(seconds / 2)),
            (1.0, "end", span(seconds)),
        )
    )
    box = f"0 0 {LEFT + WIDTH + 10:g} {height + 22:g}"
    return f'<svg viewBox="{box}" role="img">{"".join(drawn)}{axis}</svg>'
