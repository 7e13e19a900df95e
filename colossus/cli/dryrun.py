"""`colossus dryrun`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from colossus.cli.files import check_writable, write
from colossus.cli.output import one_line
from colossus.cli.words import Words, split
from colossus.errors import UserError

DOES_NOT_FIT = 1


def dryrun(
    words: Words = None,
    rank: Annotated[
        int | None, typer.Option("--rank", metavar="N", help="This one alone; else one of each kind.")
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="What its start reads: of a checkpoint, of a run's newest, or of what the world of a job "
            "file would save.",
        ),
    ] = None,
    routing: Annotated[
        str | None,
        typer.Option(
            "--routing",
            metavar="NUMBERS|FILE|RUN",
            help="Of tokens to experts: each one's share, or multiples of the mean of the busiest.",
        ),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option("--compare", metavar="RUN", help="Of a run's job, beside what the run measured."),
    ] = None,
    timeline: Annotated[
        Path | None,
        typer.Option("--timeline", metavar="FILE", help="Write a step in time, for Perfetto and Chrome."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write the report as one page.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> int:
    """Run the training program as any rank of a world that is not there.

    What it holds in memory, computes and says to others, to the byte, on tensors without numbers:
    colossus dryrun model=llama3.1-405b fleet=colossus-100k layout.tp=8 layout.pp=16 layout.dp_shard=128
    """
    check_writable("--timeline", timeline)
    check_writable("--html", html)
    from colossus import api
    from colossus.dryrun import compare as comparison
    from colossus.dryrun import report
    from colossus.dryrun.host import host_of
    from colossus.dryrun.page import page
    from colossus.dryrun.timeline import trace

    if compare is not None:
        if words or any(option is not None for option in (rank, source, routing, timeline, html)):
            raise UserError(f"--compare {compare}: takes the run's own job, and no other words or options")
        with one_line() as show:
            made = api.compare(compare, say=show)
        print(json.dumps(made.to_dict(), indent=1) if as_json else comparison.text(made))
        return 0

    path, overrides = split(words)
    job = api.load_job(path, overrides)
    with one_line() as show:
        found = api.dry_run(job, rank, source=source, routing=routing, say=show)
    if timeline is not None:
        if found.price is None:
            needed = "every stage of the pipeline, and of it the rank that others wait for"
            raise UserError(f"--timeline {timeline}: needs {needed}; leave --rank out")
        write(timeline, trace(found).to_json())
    if html is not None:
        write(html, page(found))
    if as_json:
        print(json.dumps(found.to_dict() | {"node": host_of(found).to_dict()}, indent=1))
    else:
        print(report.text(found))
    return 0 if found.fits else DOES_NOT_FIT
