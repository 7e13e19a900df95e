"""`colossus train`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from colossus.cli.words import Words, split
from colossus.errors import UserError

EXIT_CODES = {"finished": 0, "SIGINT": 130, "SIGTERM": 143}


def train(
    words: Words = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Follow the decisions of the run whose job.toml is given, too.")
    ] = False,
    dry: Annotated[
        bool, typer.Option("--dry", help="Fill in the job, print it as a job file, and stop.")
    ] = False,
) -> int:
    """Train a model.

    Without arguments a small one, on the sources of Python's standard library, for 5 minutes. The folder of
    a run goes on with it; the job.toml in one starts a new run that follows the same job.
    """
    path, overrides = split(words)
    follow = path.parent if exact and path is not None and path.name == "job.toml" else None
    if exact and follow is None:
        raise UserError("--exact: name the job.toml of the run to follow, as in runs/NAME/job.toml")

    from colossus import api
    from colossus.cli.brief import brief
    from colossus.cli.progress import BuildProgress
    from colossus.launcher.local import is_first_rank

    job = api.resolve(api.load_job(path, overrides, exact=exact), exact=exact)
    if dry:
        from colossus.job import to_toml

        print(to_toml(job), end="")
        return 0

    from colossus.monitor import LiveView, Quiet, summary

    out = Quiet(sys.stdout)
    print(brief(job), file=out, flush=True)
    view = LiveView(out)
    try:
        with BuildProgress(out) as build:
            run = api.train(job, follow=follow, listeners=[view.show], progress=build.show)
    finally:
        view.close()
    if not is_first_rank():  # which writes how the run ended, and may not have done so yet
        return 0
    print("\n" + summary(run.folder), end="", file=out)
    return EXIT_CODES.get(run.outcome, 3)
