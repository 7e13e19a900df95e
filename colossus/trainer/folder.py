"""The folder of a run: its name, its job, and the lock that keeps a second process out."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from datetime import date
from itertools import count
from pathlib import Path

from colossus import named
from colossus.architecture import Architecture, num_parameters
from colossus.checkpoints.copy import copy_checkpoint
from colossus.data.shards import replace_synced, try_to_write
from colossus.errors import MachineError, UserError
from colossus.events import read_events
from colossus.generation.load import tokenizer_folder
from colossus.interchange.files import read_kept
from colossus.job import Job, load_run_job, to_toml
from colossus.trainer import going_on
from colossus.trainer.decisions import BRANCH, Decision, Decisions
from colossus.trainer.run import Run
from colossus.untrusted import clear, open_to_append

RUNS = Path("runs")  # where runs lie that nobody has named
BEGUN = {"lock", "tokenizer", "events.jsonl", "job.toml.part"}  # what a kill while a run is made may leave


def new_folder(job: Job, root: Path = RUNS) -> Path:
    """`runs/<model>-<date>-<n>` with the first n that is free, made: from now on it is nobody else's.

    Raises:
        MachineError: it cannot be written.
    """
    stem = f"{model_name(job.model)}-{date.today().isoformat()}"
    with _storage_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        for n in count(1):
            with contextlib.suppress(FileExistsError):
                (folder := root / f"{stem}-{n}").mkdir()
                return folder
    raise AssertionError("numbers end")


def model_name(arch: Architecture) -> str:
    """The preset's name, or the family with its size: `llama-1.3m`."""
    if arch.preset:
        return arch.preset
    size, units = float(num_parameters(arch)), ["", "k", "m", "b", "t"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{arch.family}-{size:.3g}{units[0]}"


def is_run(path: Path) -> bool:
    """Whether `path` is the folder of a run."""
    return os.path.isfile(path / "job.toml")  # noqa: PTH113 - False too for a name that no file can have


def continued(folder: Path, asked: Job) -> Job:
    """The job that the run in `folder` follows from now on, with what is changed of it as `asked`.

    How it is spread, saved and watched may change between its attempts, and its length, rates, batch and data
    from a step on (see `trainer.going_on`); whatever else was asked for must be what the run was begun with.

    Raises:
        UserError: it is another job; the fields that differ are named. Or what was asked for cannot be.
    """
    job = going_on.plan(folder, asked, f"run.folder={folder}: holds another job").job
    return job.put({"run.folder": str(folder)}, "argument")


def check_code(folder: Path, asked: Job) -> None:
    """Raises UserError where the job in `folder` would run code that `asked` neither names nor replaces."""
    kept = load_run_job(folder)
    corpora = kept.data.corpus
    hooks = asked.run.hooks if asked.asked_for("run.hooks") else kept.run.hooks
    own = named.code_of(asked.run.hooks, asked.data.corpus)
    named.check_trusted(folder, named.code_of(hooks, corpora), own)


def followed(folder: Path, asked: Job, trust_code: bool = False) -> Job:
    """The job of a new run that takes the same steps as the run in `folder`; what may change is `asked`.

    Raises:
        UserError: it is another job; the fields that differ are named.
    """
    if not trust_code:
        check_code(folder, asked)
    kept = going_on.Standing.of(folder).job
    changed = going_on.asked_anew(kept, asked, kept)
    refused = f"--exact: takes the steps of {folder}, which has another job"
    going_on.check_fixed(changed, going_on.MAY_CHANGE, kept, refused, "")
    job, place = going_on.spread(kept, changed), asked.run.folder
    return job.put({"run.folder": place}, "argument") if place else job.without("run.folder")


def goes_on(folder: Path, job: Job) -> bool:
    """Whether the run in `folder` has something left to do under `job`."""
    return Run(folder).outcome != "finished" or going_on.plan(folder, job, "").change is not None


def make(
    folder: Path,
    job: Job,
    tokenizer: Path,
    decisions: Iterable[Decision] = (),
    checkpoint: Path | None = None,
) -> None:
    """Makes the folder of a new run with its job, tokenizer and first decisions. `job.toml` comes last: from
    then on the folder is a run.

    checkpoint: of another run, that it begins from.

    Raises:
        UserError: the folder holds other files or a run, or another process is training in it.
        MachineError: it cannot be written.
    """
    with _storage_errors(folder):
        _check_free(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            if is_run(folder):
                raise UserError(f"run.folder={folder}: another run was begun in it meanwhile; name a new one")
            if _is_begun_branch(folder):
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            (folder / "events.jsonl").unlink(missing_ok=True)
            clear(folder / "tokenizer")
            shutil.copytree(tokenizer, folder / "tokenizer")
            if job.model.init_from is not None:
                _keep_beside_tokenizer(folder / "tokenizer", Path(job.model.init_from))
            decisions = list(decisions)
            going_on.write_decisions(folder, decisions)
            if checkpoint is not None:
                copy_checkpoint(checkpoint, folder, {"decisions": Decisions(decisions).to_list()})
            _write_job(folder, job)


def check_new(folder: Path | None) -> None:
    """Raises what `make` would of the folder of a new run (None: one in RUNS, that is yet to be named).
    Nothing is left there."""
    with _storage_errors(folder or RUNS):
        if folder is not None:
            _check_free(folder)
        try_to_write(folder or RUNS)


def _check_free(folder: Path) -> None:
    begun = BEGUN | ({"checkpoints"} if _is_begun_branch(folder) else set())
    if not is_run(folder) and folder.is_dir() and {path.name for path in folder.iterdir()} - begun:
        raise UserError(f"run.folder={folder}: not empty, and not the folder of a run; name a new one")


def _is_begun_branch(folder: Path) -> bool:
    """Whether a kill left a branch here while it was made: it has not trained yet."""
    events = read_events(folder)
    decided = {event.get("name") for event in events if event["kind"] == "decision"}
    return BRANCH in decided and not any(event["kind"] in ("start", "resume") for event in events)


def _keep_beside_tokenizer(tokenizer: Path, origin: Path) -> None:
    """What was published beside the tokenizer of the model that a run begins with, and that its shards lack:
    how it generates, other forms of its vocabulary. An export gives it out again."""
    for name, data in read_kept(tokenizer_folder(origin)).items():
        if not (tokenizer / name).exists():
            (tokenizer / name).parent.mkdir(exist_ok=True)
            (tokenizer / name).write_bytes(data)


def keep_job(folder: Path, job: Job) -> None:
    """Keeps the job of a run's next attempt; what it changes of the run's course becomes a decision.

    Raises:
        UserError: another process is training in the folder, or it went on meanwhile. MachineError: it cannot
            be written.
    """
    with _storage_errors(folder), locked(folder):
        refused = f"run.folder={folder}: holds another job"
        going_on.record(folder, going_on.plan(folder, job, refused, logging.getLogger(__name__).warning))
        _write_job(folder, job)


def _write_job(folder: Path, job: Job) -> None:
    replace_synced(folder / "job.toml", to_toml(job).encode())


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the run for this process; the system lets go of it when the process ends, however it ends.

    Raises:
        UserError: another process is training in the folder.
        MachineError: the lock cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with _storage_errors(folder):
            file = stack.enter_context(os.fdopen(open_to_append(folder / "lock"), "a+"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise UserError(
                    f"run.folder={folder}: process {holder} is training in it; wait for it or stop it"
                ) from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield


@contextlib.contextmanager
def _storage_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"run.folder={folder}: a part of this path is a file, not a folder") from error
    except OSError as error:
        raise MachineError(f"run.folder={folder}: cannot be written ({error.strerror or error})") from error
