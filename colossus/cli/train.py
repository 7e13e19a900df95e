"""`colossus train`."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from colossus.cli.output import nobody_reads_on
from colossus.cli.words import Words, split
from colossus.errors import MachineError, UserError, only_shown

if TYPE_CHECKING:
    from colossus.job import Job

STOPPED = {"SIGINT": 130, "SIGTERM": 143, "asked": 0}  # by a hook: nothing failed
EXIT_CODES = {"finished": 0} | STOPPED


def train(
    words: Words = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Follow the decisions of the run whose job.toml is given, too.")
    ] = False,
    dry: Annotated[
        bool, typer.Option("--dry", help="Fill in the job, print it as a job file, and stop.")
    ] = False,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Run the code that the job of a run's folder names, too.")
    ] = False,
) -> int:
    """Train a model.

    Without arguments a small one, on the sources of Python's standard library, for 5 minutes. The folder of
    a run goes on with it; the job.toml in one starts a new run that follows the same job.
    """
    from colossus import api
    from colossus.cli.brief import brief
    from colossus.cli.progress import BuildProgress
    from colossus.launcher.started import check_started, is_first_rank
    from colossus.monitor import LiveView, Quiet, summary

    def load() -> tuple[Job, Path | None]:
        path, overrides = split(words)
        follow = path.parent if exact and path is not None and path.name == "job.toml" else None
        if exact and follow is None:
            raise UserError("--exact: name the job.toml of the run to follow, as in runs/NAME/job.toml")
        return api.load_job(path, overrides, exact=exact, trust_code=trust_code or dry), follow

    if dry:
        from colossus.job import to_toml

        check_started()
        if is_first_rank():
            job, follow = load()
            job = api.resolve(job, exact=exact, dry=True, trust_code=trust_code)
            api.check_start(job, follow=follow)
            print(to_toml(job), end="")
        return 0

    out = Quiet(sys.stdout)
    view = LiveView(out)
    try:
        with _interrupted_without_saving(), BuildProgress(out) as build:
            run = api.start(
                load,
                trust_code=trust_code,
                listeners=[view.show],
                progress=build.show,
                resolved=lambda job: print(brief(job), file=out, flush=True),
            )
    finally:
        view.close()
    if not is_first_rank():  # which writes how the run ended, and may not have done so yet
        return 0
    with only_shown(f"{run.folder}: its summary cannot be shown"):
        print("\n" + summary(run.folder), end="", file=out, flush=True)
    if out.is_silent:
        nobody_reads_on()
    if run.outcome in STOPPED and not run.is_saved:
        raise MachineError(f"{run.folder}: ended ({run.outcome}) before it was saved; running again goes on")
    return EXIT_CODES.get(run.outcome, 3)


@contextlib.contextmanager
def _interrupted_without_saving() -> Iterator[None]:
    """While training takes signals for the wish to save, none arrives here. Before and after it, and where a
    second Ctrl-C ended it, there is nothing of which 130 or 143 would tell.

    Raises:
        MachineError: a signal ended what is within.
    """
    process, got = os.getpid(), signal.SIGINT

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal got
        if os.getpid() != process:  # a process that was forked from this one
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        got = signal.SIGTERM
        raise KeyboardInterrupt

    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, end) if in_main else None
    try:
        yield
    except KeyboardInterrupt:
        from colossus.launcher.started import is_first_rank

        error = MachineError(f"stopped by {got.name} without saving; what was saved before is whole")
        error.told = not is_first_rank()
        raise error from None
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
