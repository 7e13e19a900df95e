"""`colossus plan`."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from colossus.cli.files import check_writable, write
from colossus.cli.output import one_line
from colossus.cli.words import Words, split
from colossus.errors import UserError

DOES_NOT_FIT = 1


def plan(
    words: Words = None,
    aim: Annotated[
        str, typer.Option("--for", metavar="AIM", help="time (default), cost or energy.", show_default=False)
    ] = "time",
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write one page that opens offline.")
    ] = None,
    job_file: Annotated[
        Path | None, typer.Option("--job", metavar="FILE", help="Write the job that train and launch take.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    formulas: Annotated[
        bool, typer.Option("--formulas", help="Formulas alone: seconds less, and no dry runs of the best.")
    ] = False,
    hardware: Annotated[bool, typer.Option("--hardware", help="List accelerators and servers.")] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Time this machine for its plans; some minutes.")
    ] = False,
) -> int:
    """Find the best layout for a model on a fleet.

    Step time, memory, days, energy, money, and what failures cost, before a machine is touched:
    colossus plan model=llama3.1-405b fleet=colossus-100k run.tokens=15e12
    """
    if hardware:
        from colossus.planner.report import hardware_text

        print(hardware_text())
        return 0

    check_writable("--html", html)
    check_writable("--job", job_file)
    if html is not None and job_file is not None and html.absolute() == job_file.absolute():
        raise UserError(f"--html and --job: both write {html}; name two files")

    from colossus import api
    from colossus.derive.to_plan import planned
    from colossus.job import to_toml
    from colossus.planner import report
    from colossus.planner.search import NothingFits

    path, overrides = split(words)
    job = api.load_job(path, overrides)
    if calibrate:
        if words:  # a mistake in them is told before minutes of timing
            with contextlib.suppress(NothingFits):
                api.plan(job, aim=aim)
        print(api.calibrate(lambda line: print(line, file=sys.stderr)))
        if not words:
            return 0
        print()
    confirm = not formulas and importlib.util.find_spec("torch") is not None
    try:
        with one_line() as show:
            made = api.plan(job, aim=aim, confirm=confirm, say=lambda line: show(f"dry run: {line}"))
    except NothingFits as error:
        print(f"no: {error}", file=sys.stderr)
        return DOES_NOT_FIT
    said = "" if as_json and html is None else report.text(made)
    print(json.dumps(made.to_dict(), indent=1) if as_json else said)
    if html is not None:
        from colossus.planner.sensitivity import days_by_count, days_if

        write(html, report.page(made, said, days_by_count(made), days_if(made)))
        print(f"\nwrote {html}", file=sys.stderr if as_json else None)
    if job_file is not None:
        write(job_file, to_toml(planned(job, made)))
        print(f"\nwrote {job_file}", file=sys.stderr if as_json else None)
    return DOES_NOT_FIT if made.confirmed.none_fits else 0
