"""The public functions: what `colossus.NAME` gives, and what every verb of the command line calls."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossus import job as job_module
from colossus import named
from colossus.errors import UserError
from colossus.events import Listener
from colossus.job import Job

if TYPE_CHECKING:
    import torch

    from colossus.data.tokenizer import Tokenizer
    from colossus.models import Decoder
    from colossus.trainer.hooks import Hook
    from colossus.trainer.run import Run


def load_job(path: str | Path | None = None, overrides: Iterable[str] = (), *, exact: bool = False) -> Job:
    """Reads a job.

    path: a job file; the folder of a run, to continue it; or the `job.toml` in one, to start a new run
        that follows the same job.
    overrides: `section.field=value` and `section=PRESET`, stronger than the file.
    exact: the new run takes the same steps as that of `path`, a run's `job.toml`: what was derived is kept,
        and `overrides` may only be the folder and what may change between the attempts of a run.

    Raises:
        UserError: naming the field, the value, what is allowed and the nearest valid choice.
    """
    overrides = list(overrides)
    path = Path(path) if path is not None else None
    if path is not None and exact:
        from colossus.trainer.folder import followed

        return followed(path.parent, job_module.load_job(None, overrides))
    if path is not None and os.path.isdir(path):  # noqa: PTH112 - False too for a name that no file can have
        if not (path / "job.toml").is_file():
            raise UserError(f"{path}: not the folder of a run (it has no job.toml)")
        job = job_module.load_job(path / "job.toml", overrides)
        return job.put({"run.folder": str(path)}, "file")
    job = job_module.load_job(path, overrides)
    if job.made:
        changed = {override.partition("=")[0] for override in overrides}
        if "run.folder" not in changed:
            job = job.without("run.folder")
        if changed - {"run.folder"}:  # another folder changes nothing that is derived
            job = job.asked()
    return job


def resolve(job: Job, *, exact: bool = False) -> Job:
    """The job with everything filled in, from this machine as measured; or, where its folder holds a run,
    the job that this run follows.

    What was derived on another processor is derived again, unless `exact`.

    Raises:
        UserError: what was asked for cannot be, or the folder holds another job.
    """
    from colossus.data.corpus import check_corpus
    from colossus.derive import derive
    from colossus.measure.machine import this_machine
    from colossus.trainer.folder import continued, is_run

    goes_on = job.run.folder is not None and is_run(Path(job.run.folder))
    if not goes_on:  # a mistake is told at once, before the machine is measured
        for corpus in job.data.corpus or ():
            check_corpus(corpus)
    for hook in job.run.hooks or ():
        named.find("run.hooks", hook)
    machine = this_machine()
    if goes_on:
        job = continued(Path(job.run.folder), job)
    elif job.made and job.made.get("processor") != machine.processor and not exact:
        job = job.asked()
    job = derive(job, machine)
    return job if job.made else dataclasses.replace(job, made=made_on(machine.processor))


def made_on(processor: str) -> dict[str, str]:
    """What a resolved job says of its making."""
    from colossus import __version__

    return {"processor": processor, "colossus": __version__}


def train(
    job: Job,
    hooks: Sequence[Hook] = (),
    *,
    follow: str | Path | None = None,
    listeners: Iterable[Listener] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Run:
    """Trains as `job` says and returns the run; a job whose folder holds a run of it goes on with that
    (one that is finished is returned as it is).

    hooks: objects with the methods of `colossus.trainer.hooks.Hook`.
    follow: the folder of a run whose decisions are replayed, so that the same steps are taken.
    listeners: called with every event as it is written.
    progress: called while token shards are built, with bytes of text done and in all.

    Raises:
        UserError: the job cannot be; MachineError: the machine or its storage failed.
    """
    from colossus.data.prepare import is_prepared, prepare_data
    from colossus.launcher.local import first_rank_prepares, is_first_rank, launch
    from colossus.monitor.log import LogText
    from colossus.monitor.report import has_report, write_report
    from colossus.trainer import folder as folders
    from colossus.trainer.decisions import to_follow
    from colossus.trainer.run import Run

    def prepare(job: Job) -> tuple[Job, Path]:
        folder = Path(job.run.folder) if job.run.folder else None
        begun = folder is not None and folders.is_run(folder)
        job = resolve(job, exact=follow is not None)
        if folder is not None and begun:
            if Run(folder).outcome != "finished":
                job = job if is_prepared(job) else prepare_data(job, progress)
                folders.keep_job(folder, job)
            return job, folder
        job = prepare_data(job, progress)
        folder = folder or folders.new_folder(job)
        decided = to_follow(Run(Path(follow)).events("decision")) if follow is not None else []
        folders.make(folder, job, Path(job.data.folder) / "tokenizer", decided)
        return job, folder

    with first_rank_prepares(lambda: prepare(job)) as (job, folder):
        is_finished = Run(folder).outcome == "finished"
        if not is_finished:
            launch(job, folder, hooks, [LogText(folder).show, *listeners])
        if is_first_rank() and not (is_finished and has_report(folder)):
            write_report(folder)
        return Run(folder)


def load_model(path: str | Path, dtype: torch.dtype | None = None) -> tuple[Decoder, Tokenizer]:
    """The model and the tokenizer of a run, or of one of its checkpoints.

    dtype: of its matrices and their products; None: what is quickest for generation on this machine.

    Raises:
        UserError: there is none at `path`, or it does not load whole.
    """
    from colossus.generation.load import load_model as load

    return load(Path(path), dtype)


def generate(
    model: Decoder, tokenizer: Tokenizer, prompts: Sequence[str], max_tokens: int = 64, **sampling: Any
) -> list[str]:
    """Continues each prompt by up to `max_tokens` tokens; see `colossus.generation.generate`."""
    from colossus.generation import generate as continue_prompts

    return continue_prompts(model, tokenizer, prompts, max_tokens=max_tokens, **sampling)
