"""The folder of a run: its name, its job, and the lock that keeps a second process out."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from datetime import date
from itertools import count
from pathlib import Path
from typing import Any

from colossus.architecture import Architecture, num_parameters
from colossus.errors import MachineError, UserError
from colossus.events import EventLog
from colossus.job import PREDICTED, Job, load_job, save_job
from colossus.layout import AXES
from colossus.section import Section
from colossus.trainer.decisions import Decision

# Between the attempts of a run: never what it learns.
MAY_CHANGE = ("layout.", "checkpoint.", "run.threads", "run.hooks", "fleet.")
FOLLOWS_LAYOUT = ("layout.micro_batch", "layout.stages_per_rank", "layout.reshard")
BEGUN = {"lock", "tokenizer", "events.jsonl", "job.toml.part"}  # what a kill while a run is made may leave


def new_folder(job: Job, root: Path = Path("runs")) -> Path:
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
    """The job that the run in `folder` follows, with what may change between its attempts as `asked`.

    That is how it is spread, saved and watched (MAY_CHANGE); whatever else was asked for must be what the run
    was begun with.

    Raises:
        UserError: it is another job; the fields that differ are named.
    """
    job = _with_changes(folder, asked, f"run.folder={folder}: holds another job")
    return job.put({"run.folder": str(folder)}, "argument")


def followed(folder: Path, asked: Job) -> Job:
    """The job of a new run that takes the same steps as the run in `folder`; what may change is `asked`.

    Raises:
        UserError: it is another job; the fields that differ are named.
    """
    job = _with_changes(folder, asked, f"--exact: takes the steps of {folder}, which has another job")
    place = asked.run.folder
    return job.put({"run.folder": place}, "argument") if place else job.without("run.folder")


def _with_changes(folder: Path, asked: Job, refused: str) -> Job:
    kept = load_job(folder / "job.toml")
    wanted = {n: asked.get(n) for n in asked.origins if asked.asked_for(n)}
    changed = {n: v for n, v in wanted.items() if n != "run.folder" and _is_other(v, kept.get(n))}
    fixed = [n for n in changed if not n.startswith(MAY_CHANGE)]
    if fixed:
        differing = "; ".join(f"{n}: {kept.get(n)!r}, {changed[n]!r}" for n in fixed)
        raise UserError(f"{refused}; differing (there, asked): {differing}")
    spread = [*FOLLOWS_LAYOUT] if changed.keys() & {f"layout.{axis}" for axis in (*AXES, "schedule")} else []
    if any(
        name.startswith(("layout.", "fleet.")) for name in changed
    ):  # what was predicted was another layout
        kept = dataclasses.replace(kept, made={n: v for n, v in kept.made.items() if n not in PREDICTED})
        if "auto" in (kept.layout.preset, changed.get("layout.preset")):
            spread = [*FOLLOWS_LAYOUT]  # what is open is planned again, around what was asked for
    if "fleet.device" in changed:
        spread = ["layout.micro_batch", "layout.dp_shard"]
    kept = kept.without(*(name for name in spread if not kept.asked_for(name)))
    return kept.put(changed, "argument")


def _is_other(asked: Any, kept: Any) -> bool:
    """Of a table, only what was asked for counts: the rest of it is derived, as fields are."""
    if isinstance(asked, Section) and type(asked) is type(kept):
        return any(_is_other(getattr(asked, name), getattr(kept, name)) for name in asked.model_fields_set)
    return bool(asked != kept)


def make(folder: Path, job: Job, tokenizer: Path, decisions: Iterable[Decision] = ()) -> None:
    """Makes the folder of a new run with its job, tokenizer and first decisions. `job.toml` comes last: from
    then on the folder is a run.

    Raises:
        UserError: the folder holds other files or a run, or another process is training in it.
        MachineError: it cannot be written.
    """
    with _storage_errors(folder):
        if not is_run(folder) and folder.is_dir() and {path.name for path in folder.iterdir()} - BEGUN:
            raise UserError(f"run.folder={folder}: not empty, and not the folder of a run; name a new one")
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            if is_run(folder):
                raise UserError(f"run.folder={folder}: another run was begun in it meanwhile; name a new one")
            (folder / "events.jsonl").unlink(missing_ok=True)
            shutil.copytree(tokenizer, folder / "tokenizer", dirs_exist_ok=True)
            _write_decisions(folder, decisions)
            _write_job(folder, job)


def keep_job(folder: Path, job: Job) -> None:
    """Keeps the job of a run's next attempt.

    Raises:
        UserError: another process is training in the folder. MachineError: it cannot be written.
    """
    with _storage_errors(folder), locked(folder):
        _write_job(folder, job)


def _write_job(folder: Path, job: Job) -> None:
    temporary = folder / "job.toml.part"
    save_job(job, temporary)
    temporary.replace(folder / "job.toml")


def _write_decisions(folder: Path, decisions: Iterable[Decision]) -> None:
    if decisions := list(decisions):
        log = EventLog(folder)
        for decision in decisions:
            log.write("decision", step=decision.first_step, synced=True, **dataclasses.asdict(decision))
        log.close()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the run for this process; the system lets go of it when the process ends, however it ends.

    Raises:
        UserError: another process is training in the folder.
        MachineError: the lock cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with _storage_errors(folder):
            file = stack.enter_context((folder / "lock").open("a+"))
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
