"""`colossus doctor`."""

from __future__ import annotations

from typing import Annotated

import typer


def doctor(
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again, and keep that.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The measured table as JSON.")] = False,
) -> None:
    """Show what this machine has and lacks, as measured."""
    from colossus import api
    from colossus.measure.doctor import report
    from colossus.measure.machine import measure_again, this_machine
    from colossus.measure.training import forget_timings

    if refresh:
        forget_timings()
    machine = measure_again() if refresh else this_machine()
    print(machine.to_json() if as_json else report(machine, api.resolve(api.load_job())))
