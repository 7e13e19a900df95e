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
    from colossus.data.tokenizer import Tokenizer
    from colossus.evaluation.corpora import CorpusResult
    from colossus.evaluation.tasks import LoadedTasks, TaskResult
    from colossus.hardware.machine import Machine
    from colossus.models import Decoder
    from colossus.planner.plan import Plan
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
    return dataclasses.replace(job, made=made_on(machine.processor) | job.made)


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
    from colossus.parallel.world import check_started
    from colossus.trainer import folder as folders
    from colossus.trainer.decisions import to_follow
    from colossus.trainer.run import Run

    def prepare(job: Job) -> tuple[Job, Path]:
        folder = Path(job.run.folder) if job.run.folder else None
        begun = folder is not None and folders.is_run(folder)
        job = resolve(job, exact=follow is not None)
        if "RANK" in os.environ:  # else the launcher starts as many as it takes
            check_started(job.layout)
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


def plan(job: Job, *, aim: str = "time") -> Plan:
    """The best layout for a job's model on its fleet, and what a run costs there; needs no PyTorch.

    aim: "time", "cost" or "energy". `plan(job).best` is plain data; see `colossus.planner.plan.Plan`.

    Raises:
        UserError: the job names no model or no fleet, or contradicts itself; NothingFits (one of them): no
            legal layout fits the fleet's memory.
    """
    from colossus.planner.plan import make_plan

    return make_plan(
        job, _measured() if job.fleet.accelerator is None and job.fleet.pools is None else None, aim
    )


def _measured() -> Machine | None:
    """This machine as measured; None where PyTorch, which measures it, is missing."""
    try:
        from colossus.measure.machine import this_machine
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return None
    return this_machine()


def calibrate(say: Callable[[str], None] = lambda line: None) -> str:
    """Times the operations of training on this machine, some minutes long, and keeps the table, which `plan`
    reads from then on. Returns what was done, in words.

    say: is told what is being timed.
    """
    from colossus.hardware.calibration import keep
    from colossus.measure.calibrate import calibrate, in_words
    from colossus.measure.machine import this_machine

    machine = this_machine()
    made = calibrate(machine, say)
    return f"{in_words(made)}\nkept in {keep(made, machine)}"


def planned(job: Job, plan: Plan) -> Job:
    """The job with what a plan found where it was open: layout, batch and length."""
    values: dict[str, Any] = {f"layout.{name}": value for name, value in plan.layout().items()}
    values |= {"run.global_batch": plan.global_batch, "data.seq_len": plan.seq_len}
    if job.run.minutes is None and job.run.steps is None and job.run.tokens is None:
        values["run.tokens"] = int(plan.tokens)
    return job.derive("planned", **values)


def load_model(path: str | Path, type: str = "fp32") -> tuple[Decoder, Tokenizer]:
    """The model and the tokenizer of a run, of one of its checkpoints, or of a Hugging Face folder.

    type: of its matrices and their products: "fp32", "bf16", or "quickest", which of them generates quicker
        on this machine, as measured.

    Raises:
        UserError: there is none at `path`, or it does not load whole; or there is no such type.
    """
    from colossus.generation.load import load_model as load
    from colossus.precision import torch_type

    return load(Path(path), None if type == "quickest" else torch_type(type))


def import_model(
    path: str | Path, out: str | Path | None = None, *, say: Callable[[str], None] | None = None
) -> Path:
    """Makes of a Hugging Face folder a folder of ours with one checkpoint; returns it.

    out: a new folder; `runs/<name of path>` where it is left out.
    say: is told in a line what is left out or remarkable; the log is where it is left out.

    Raises:
        UserError: the family is unknown, what is there does not belong together, or `out` is not free.
        MachineError: a file is damaged, or the storage failed; nothing is left of what was written.
    """
    from colossus import interchange
    from colossus.models.hf.published import warn

    return interchange.import_model(path, out, say or warn)


def export_model(
    path: str | Path,
    out: str | Path,
    type: str | None = None,
    *,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Writes the model of a run, a checkpoint or a Hugging Face folder as `transformers` loads it.

    type: of the weights, "fp32" or "bf16"; as they are stored where it is left out.

    Raises:
        UserError: there is none, no published family has all its parts, or `out` is not free.
        MachineError: the storage failed, or what is there is damaged; nothing is left of what was written.
    """
    from colossus import interchange
    from colossus.models.hf.published import warn

    return interchange.export_model(path, out, type, say or warn)


def generate(
    model: Decoder, tokenizer: Tokenizer, prompts: Sequence[str], max_tokens: int = 64, **sampling: Any
) -> list[str]:
    """Continues each prompt by up to `max_tokens` tokens; see `colossus.generation.generate`."""
    from colossus.generation import generate as continue_prompts

    return continue_prompts(model, tokenizer, prompts, max_tokens=max_tokens, **sampling)


def evaluate(
    model: Decoder,
    tokenizer: Tokenizer,
    corpus: str | Path | None = None,
    *,
    held_out_of: str | Path | None = None,
    seq_len: int | None = None,
    documents: int | None = None,
    megabytes: float | None = None,
    text_field: str = "text",
) -> CorpusResult:
    """Loss and bits per byte of a model on a corpus (`python`, a path, `hf:NAME`, `package.module:Name`), or
    on what a run held out (`held_out_of`, its folder or one of its checkpoints).

    It computes in the model's own type, where the model is. Of a corpus, documents up to `megabytes` of
    text are scored, by default 1; of what was held out, all. The choice is the same every time.

    Raises:
        UserError: there is no such corpus or run, it holds no text, or the window is too long.
    """
    from colossus.evaluation.corpora import evaluate_corpus, evaluate_held_out

    if (corpus is None) == (held_out_of is None):
        raise UserError("evaluate: name either a corpus or, as held_out_of, a run")
    if held_out_of is not None:
        return evaluate_held_out(
            model, tokenizer, held_out_of, seq_len=seq_len, documents=documents, megabytes=megabytes
        )
    return evaluate_corpus(
        model,
        tokenizer,
        str(corpus),
        seq_len=seq_len,
        documents=documents,
        megabytes=megabytes,
        text_field=text_field,
    )


def load_tasks(
    names: Sequence[str], *, include_path: str | Path | None = None, shots: int | None = None
) -> LoadedTasks:
    """Tasks of the standard harness with their data; see `colossus.evaluation.tasks.load_tasks`."""
    from colossus.evaluation.tasks import load_tasks as load

    return load(names, include_path=include_path, shots=shots)


def evaluate_tasks(
    model: Decoder,
    tokenizer: Tokenizer,
    tasks: Sequence[str] | LoadedTasks,
    *,
    include_path: str | Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    seq_len: int | None = None,
    quiet: bool = True,
) -> list[TaskResult]:
    """Figures of a model in tasks of lm-eval, the standard harness (the extra `eval`).

    tasks: names of tasks, groups or tags; `include_path` holds definitions of one's own.
    shots: examples before each question, by default as each task says. limit: examples of each task.

    Raises:
        UserError: the extra is not installed, there is no such task, or its data cannot be had.
    """
    from colossus.evaluation.tasks import LoadedTasks, run_tasks
    from colossus.generation import generate as write

    if isinstance(tasks, str):
        raise UserError.field("tasks", tasks, "expected a list of names; write [name]")
    if not isinstance(tasks, LoadedTasks):
        tasks = load_tasks(tasks, include_path=include_path, shots=shots)
    return run_tasks(model, tokenizer, tasks, write, limit=limit, seq_len=seq_len, quiet=quiet)
