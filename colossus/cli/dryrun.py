"""`colossus dryrun`."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

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
    shows = sys.stderr.isatty()
    found = api.dry_run(job, rank, say=lambda line: _show(line) if shows else None)
    if shows:
        _show("")
    print(json.dumps(found.to_dict(), indent=1) if as_json else report.text(found))
    return 0 if found.fits else DOES_NOT_FIT


def _show(line: str) -> None:
    """In place of the line before."""
    print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
