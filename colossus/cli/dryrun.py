"""`colossus dryrun`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from colossus.cli.output import one_line
from colossus.cli.words import Words, split

DOES_NOT_FIT = 1


def dryrun(
    words: Words = None,
    rank: Annotated[
        int | None, typer.Option("--rank", metavar="N", help="This one alone; else one of each kind.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> int:
    """Run the training program as any rank of a world that is not there.

    What it holds in memory, computes and says to others, to the byte, on tensors without numbers:
    colossus dryrun model=llama3.1-405b fleet=colossus-100k layout.tp=8 layout.pp=16 layout.dp_shard=128
    """
    from colossus import api
    from colossus.dryrun import report

    path, overrides = split(words)
    job = api.load_job(path, overrides)
    with one_line() as show:
        found = api.dry_run(job, rank, say=show)
    print(json.dumps(found.to_dict(), indent=1) if as_json else report.text(found))
    return 0 if found.fits else DOES_NOT_FIT
