"""The public functions: what `colossus.NAME` gives, and what every verb of the command line calls."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossus import job as job_module
from colossus import named
from colossus.errors import UserError, only_shown
from colossus.events import Listener
from colossus.job import Job
from colossus.layout import AXES

if TYPE_CHECKING:
    from colossus.data.tokenizer import Tokenizer
    from colossus.dryrun.compare import Comparison
    from colossus.dryrun.ranks import DryRun
    from colossus.evaluation.corpora import CorpusResult
    from colossus.evaluation.tasks import LoadedTasks, TaskResult
    from colossus.generation.arguments import Prompt
    from colossus.hardware.machine import Machine
    from colossus.launcher.started import Attempts
    from colossus.models import Decoder
    from colossus.planner.plan import Plan
    from colossus.trainer.hooks import Hook
    from colossus.trainer.run import Run


def load_job(
    path: str | Path | None = None,
    overrides: Iterable[str] = (),
    *,
    exact: bool = False,
    trust_code: bool = False,
) -> Job:
    """Reads a job.

    path: a job file; the folder of a run, to continue it; or the `job.toml` in one, to start a new run
        that follows the same job.
    overrides: `section.field=value` and `section=PRESET`, stronger than the file.
    exact: the new run takes the same steps as that of `path`, a run's `job.toml`: what was derived is kept,
        and `overrides` may only be the folder and what may change between the attempts of a run.
    trust_code: whether code that the job of a run names, and `overrides` do not, may run.

    Raises:
        UserError: naming the field, the value, what is allowed and the nearest valid choice.
    """
    overrides = list(overrides)
    path = Path(path) if path is not None else None
    if path is not None and exact:
        from colossus.trainer.folder import followed

        return followed(path.parent, job_module.load_job(None, overrides), trust_code)
    if path is not None and os.path.isdir(path):  # noqa: PTH112 - False too for a name that no file can have
        if not (path / "job.toml").is_file():
            raise UserError(f"{path}: not the folder of a run (it has no job.toml)")
        job = job_module.load_run_job(path, overrides)
        _check_trusted(path, job, trust_code)
        return job.put({"run.folder": str(path)}, "file")
    job = job_module.load_job(path, overrides)
    if job.made:
        _check_trusted(path, job, trust_code)
        changed = {override.partition("=")[0] for override in overrides}
        if "run.folder" not in changed:
            job = job.without("run.folder")
        if changed - {"run.folder"}:  # another folder changes nothing that is derived
            job = job.asked()
    return job


def _check_trusted(path: Path | None, job: Job, trust_code: bool) -> None:
    """Raises UserError where the job of a run names code that the arguments do not name."""
    own = {n: job.get(n) if job.origins.get(n) == "argument" else None for n in ("run.hooks", "data.corpus")}
    if not trust_code:
        assert path is not None, "only a run's job was made"
        code = named.code_of(job.run.hooks, job.data.corpus)
        named.check_trusted(path, code, named.code_of(own["run.hooks"], own["data.corpus"]))


def resolve(job: Job, *, exact: bool = False, dry: bool = False, trust_code: bool = False) -> Job:
    """The job with everything filled in, from this machine as measured; or, where its folder holds a run,
    the job that this run follows.

    What was derived on another processor is derived again, unless `exact`.

    dry: nothing that the job names is imported. trust_code: whether code may run that the job in the folder
        names and this one does not.

    Raises:
        UserError: what was asked for cannot be, or the folder holds another job.
    """
    from colossus.data.open import check_corpus
    from colossus.derive import derive
    from colossus.measure.machine import this_machine
    from colossus.trainer.branch import branch
    from colossus.trainer.folder import check_code, continued, is_run

    goes_on = job.run.folder is not None and is_run(Path(job.run.folder))
    if not goes_on:  # a mistake is told at once, before the machine is measured
        for corpus in job.data.corpus or ():
            check_corpus(corpus, dry=dry)
    elif not (trust_code or dry):
        check_code(Path(job.run.folder), job)
    for hook in job.run.hooks or ():
        (named.check if dry else named.find)("run.hooks", hook)
    machine = this_machine()
    if goes_on:
        job = continued(Path(job.run.folder), job)
    elif job.run.branch_from is not None and not exact:
        job = branch(job, trust_code=trust_code or dry, verified=True).job
    elif job.made and job.made.get("processor") != machine.processor and not exact:
        job = job.asked()
    job = derive(job, machine)
    return dataclasses.replace(job, made=made_on(machine.processor) | job.made)


def check_start(job: Job, *, follow: str | Path | None = None) -> None:
    """Raises what `train` would of a resolved job before it reads a text or takes a step, as far as the job
    and this machine alone tell it. Nothing is built or left, and no code of the user's is imported.

    follow: as of `train`.
    """
    from colossus.data.prepare import check_data

    builds = _check_place(job, follow)
    _check_fit(job)
    if builds:
        check_data(job)


def _check_fit(job: Job) -> Job:
    """The job with what a dry run says of its memory, where its ranks are on several nodes. Raises UserError
    where they would not fit."""
    from colossus.dryrun.check import check_fit, is_asked
    from colossus.measure.machine import this_machine

    return check_fit(job, this_machine()) if is_asked(job) else job


def _check_place(job: Job, follow: str | Path | None) -> bool:
    """Whether the data of a job is to be built. Raises UserError or MachineError where its ranks were not
    started, or its folder cannot become or go on as a run."""
    from colossus.data.prepare import is_prepared
    from colossus.launcher.started import is_rank
    from colossus.trainer import folder as folders
    from colossus.trainer.branch import check_beginning

    if is_rank():
        from colossus.parallel.world import check_size

        check_size(job.layout)
    folder = Path(job.run.folder) if job.run.folder else None
    if folder is not None and folders.is_run(folder):
        return folders.goes_on(folder, job) and not is_prepared(job)
    folders.check_new(folder)
    if follow is not None and job.run.branch_from is not None:
        check_beginning(Path(follow), job.run.branch_from)
    return job.run.branch_from is None or not is_prepared(job)


def made_on(processor: str) -> dict[str, str]:
    """What a resolved job says of its making."""
    from colossus import __version__

    return {"processor": processor, "colossus": __version__}


def train(
    job: Job,
    hooks: Sequence[Hook] = (),
    *,
    follow: str | Path | None = None,
    trust_code: bool = False,
    listeners: Iterable[Listener] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Run:
    """Trains as `job` says and returns the run; a job whose folder holds a run of it goes on with that
    (one that is finished is returned as it is).

    hooks: objects with the methods of `colossus.trainer.hooks.Hook`. Several processes have a copy each.
    follow: the folder of a run whose decisions are replayed, so that the same steps are taken.
    trust_code: whether code may run that the job in the folder names and this one does not.
    listeners: called with every event as it is written.
    progress: called while token shards are built, with bytes of text done and in all.

    Raises:
        UserError: the job cannot be; MachineError: the machine or its storage failed.
    """
    return start(lambda: (job, follow), hooks, trust_code=trust_code, listeners=listeners, progress=progress)


def start(
    load: Callable[[], tuple[Job, str | Path | None]],
    hooks: Sequence[Hook] = (),
    *,
    trust_code: bool = False,
    listeners: Iterable[Listener] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
    resolved: Callable[[Job], None] = lambda job: None,
) -> Run:
    """As `train`, of what `load` returns: a job, and the folder of a run to follow or None.

    Who starts the run loads and resolves its job, once: this process, or under torchrun the first of its
    ranks, which hands it on to the others. `load`, `progress` and `resolved` are called by it alone.

    resolved: called with the job that everything is filled in of, before anything is built.
    """
    from colossus.launcher.started import check_started, first_rank_prepares, is_first_rank
    from colossus.trainer.run import Run

    def prepare(attempts: Attempts) -> tuple[Job, Path, bool]:
        job, follow = load()  # a mistake is told before anything heavy is imported
        job, folder = _prepare(job, follow, hooks, attempts, trust_code, progress, resolved)
        return job, folder, Run(folder).outcome == "finished"

    check_started()
    with first_rank_prepares(prepare) as (job, folder, is_finished):
        from colossus.launcher.local import launch
        from colossus.monitor.log import LogText
        from colossus.monitor.report import has_report, write_report

        if not is_finished:
            launch(job, folder, hooks, [LogText(folder).show, *listeners])
        if is_first_rank() and not (is_finished and has_report(folder)):
            with only_shown(f"{folder}: the run is finished, its report is not written"):
                write_report(folder)
        return Run(folder)


def _prepare(
    job: Job,
    follow: str | Path | None,
    hooks: Sequence[Hook],
    attempts: Attempts,
    trust_code: bool,
    progress: Callable[[int, int], None],
    resolved: Callable[[Job], None],
) -> tuple[Job, Path]:
    """The job with everything filled in, its data built, and the folder of its run made or found."""
    from colossus.data.prepare import prepare_data
    from colossus.launcher.protocol import check_hooks
    from colossus.launcher.started import is_rank
    from colossus.trainer import folder as folders
    from colossus.trainer.branch import make_branch
    from colossus.trainer.decisions import to_follow
    from colossus.trainer.hooks import CALLED
    from colossus.trainer.saved import logged_decisions

    for hook in hooks:
        if isinstance(hook, type) or not all(callable(getattr(hook, name, None)) for name in CALLED):
            what = f"the class {hook.__name__}" if isinstance(hook, type) else f"a {type(hook).__name__}"
            raise UserError(f"hooks: {what}; each must be an object of a colossus.trainer.hooks.Hook")
    folder = Path(job.run.folder) if job.run.folder else attempts.folder
    if folder is not None and not job.run.folder:
        job = job.put({"run.folder": str(folder)}, "argument")
    begun = folder is not None and folders.is_run(folder)
    job = resolve(job, exact=follow is not None, trust_code=trust_code)
    builds = _check_place(job, follow)
    if job.layout.num_ranks > 1 and not is_rank():
        check_hooks(hooks)
    resolved(job)
    job = _check_fit(job)
    if builds:
        job = prepare_data(job, progress)
    if folder is not None and begun:
        if folders.goes_on(folder, job):
            folders.keep_job(folder, job)
        return job, folder
    folder = folder or attempts.name(folders.new_folder(job))
    decided = to_follow(logged_decisions(Path(follow))) if follow is not None else None
    if job.run.branch_from is not None:
        make_branch(folder, job, Path(follow) if follow is not None else None, decided or ())
    else:
        folders.make(folder, job, Path(job.data.folder) / "tokenizer", decided or ())
    return job, folder


def plan(
    job: Job, *, aim: str = "time", confirm: bool = False, say: Callable[[str], None] = lambda line: None
) -> Plan:
    """The best layout for a job's model on its fleet, and what a run costs there; needs no PyTorch.

    aim: "time", "cost" or "energy". confirm: whether dry runs of the training program, which take PyTorch and
    seconds, must fit too: the best is the quickest that does, and `plan(job, confirm=True).confirmed` says
    what they found. say: is told of them. `plan(job).best` is plain data; see `colossus.planner.plan.Plan`.

    Raises:
        UserError: the job names no model or no fleet, or contradicts itself; NothingFits (one of them): no
            legal layout fits the fleet's memory.
    """
    from colossus.derive.to_plan import with_model
    from colossus.planner.plan import make_plan

    machine = _measured() if job.fleet.accelerator is None and job.fleet.pools is None else None
    job, ask = with_model(job, machine), None
    if confirm:
        from colossus.dryrun.confirm import confirm as asks

        ask = asks(job, say)
    return make_plan(job, machine, aim, ask=ask)


def dry_run(
    job: Job,
    rank: int | None = None,
    *,
    source: Job | str | Path | None = None,
    routing: str | Path | Sequence[float] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> DryRun:
    """Runs one step of the training program as every kind of rank of a job's world, on tensors without
    numbers: what each holds, computes and says to others, and whether it fits.

    rank: this one alone. source: what the job goes on from, of which its ranks' reads are planned: a
    checkpoint or the folder of a run (its newest one), or a job (file) whose dry world would have saved.
    routing: of tokens to experts, as each expert's share, as the multiples of the mean that the busiest get,
    a file of either, or a run that has measured it; None: all get alike. say: is told what is being traced.
    What is open of a layout is the planner's choice; where nothing fits by its formulas, the simplest that
    takes the whole fleet.

    Raises:
        UserError: the job names no model or no fleet, its layout is not legal, there is no such rank, or no
            such routing; NothingFits (one of them): no layout was asked for, and none fits; the source is
            none, or of another model.
        DamagedCheckpoint: of the source.
    """
    from colossus.dryrun.mend import mended
    from colossus.dryrun.ranks import dry_run as run
    from colossus.dryrun.reads import check_source, reads_of
    from colossus.dryrun.routing import routing_of
    from colossus.hardware.fleets import hardware_of
    from colossus.planner.measured import corrections_for

    kept = None if source is None else _source(source)
    job, machine, notes = _spread(job)
    if kept is not None:
        check_source(kept, job)
    routed = None if routing is None else routing_of(routing, job.model)
    hardware = hardware_of(job.fleet, machine, ranks=job.layout.num_ranks)
    corrections = corrections_for(hardware, machine)
    found = run(job, hardware, rank, routing=routed, say=say, notes=notes, corrections=corrections)
    reads = None if kept is None else reads_of(kept, found.job, say)
    return dataclasses.replace(mended(found, rank, say=say, corrections=corrections), reads=reads)


def _spread(job: Job) -> tuple[Job, Machine | None, list[str]]:
    """The job with its model and layout, the machine that it is planned for, and what to say of that."""
    from colossus.derive.to_plan import planned, with_model
    from colossus.planner.plan import laid_out, make_plan
    from colossus.planner.search import NothingFits

    machine = _measured() if job.fleet.accelerator is None and job.fleet.pools is None else None
    job, notes = with_model(job, machine), list[str]()
    try:
        return planned(job, make_plan(job, machine)), machine, notes
    except NothingFits:
        if not any(job.asked_for(f"layout.{axis}") for axis in AXES):
            raise
        notes.append("no layout fits by the planner's formulas; what was open of this one is the simplest")
        return laid_out(job, machine), machine, notes


def _source(source: Job | str | Path) -> Path | tuple[Path, Job]:
    """A checkpoint that is there; or the job of a dry world, and what it is called."""
    from colossus.checkpoints.find import latest
    from colossus.checkpoints.format import is_committed

    if isinstance(source, Job):
        return Path("a job"), _spread(source)[0]
    path = Path(source)
    if path.is_file():
        return path, _spread(load_job(path))[0]
    if is_committed(path):
        return path
    if not (path / "job.toml").is_file():
        raise UserError(f"--from {path}: no job file, no run's folder and no checkpoint")
    newest = latest(path)
    if newest is None:
        raise UserError(f"--from {path}: this run has no checkpoint yet; of its job, {path / 'job.toml'}")
    return newest


def compare(run: str | Path, *, say: Callable[[str], None] = lambda line: None) -> Comparison:
    """What a dry run says of the job of a run, beside what that has measured: a step, tokens a second,
    memory, a checkpoint. No code that the job names is run.

    run: its folder. say: is told what is being traced.

    Raises:
        UserError: there is no run, or it has taken no step.
    """
    from colossus.dryrun.compare import compare as run_dry

    if not (Path(run) / "job.toml").is_file():
        raise UserError(f"{run}: not the folder of a run (it has no job.toml)")
    return run_dry(Path(run), load_job(run, trust_code=True), say=say)


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


def load_model(path: str | Path, type: str = "fp32", device: str = "cpu") -> tuple[Decoder, Tokenizer | None]:
    """The model and the tokenizer of a run, of one of its checkpoints, or of a Hugging Face folder; None for
    the tokenizer where the folder has weights alone.

    type: of its matrices and their products: "fp32", "bf16", or "quickest", which of them generates quicker
        on this machine, as measured.
    device: where it computes: "cpu", "cuda", or "quickest", a GPU that has room for it where there is one.

    Raises:
        UserError: there is none at `path`, or it does not load whole; or there is no such type or device.
    """
    from colossus.generation.load import load_model as load
    from colossus.precision import torch_type

    dtype = None if type == "quickest" else torch_type(type)
    return load(Path(path), dtype, None if device == "quickest" else device)


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
    model: Decoder,
    tokenizer: Tokenizer | None,
    prompts: Sequence[Prompt],
    max_tokens: int = 64,
    **sampling: Any,
) -> list[str]:
    """Continues each prompt, a text or a list of token ids or of messages, by up to `max_tokens` tokens; see
    `colossus.generation.generate`."""
    from colossus.generation import generate as continue_prompts

    return continue_prompts(model, there(tokenizer), prompts, max_tokens=max_tokens, **sampling)


def there(tokenizer: Tokenizer | None) -> Tokenizer:
    """The tokenizer of what was loaded. Raises UserError where it has none."""
    if tokenizer is None:
        raise UserError(
            "tokenizer: the model has none, so it reads no text; put tokenizer.json beside its weights"
        )
    return tokenizer


def evaluate(
    model: Decoder,
    tokenizer: Tokenizer | None,
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

    tokenizer = there(tokenizer)
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
    tokenizer: Tokenizer | None,
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
    return run_tasks(model, there(tokenizer), tasks, write, limit=limit, seq_len=seq_len, quiet=quiet)
