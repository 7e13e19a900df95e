"""Saves a run's logical state without holding up training for more than a copy in memory."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any, Self

import torch

from colossus.checkpoints.announce import announce, announce_failure
from colossus.checkpoints.claims import committed, warn
from colossus.checkpoints.commit import Order
from colossus.checkpoints.committer import Committer, Ended
from colossus.checkpoints.find import latest
from colossus.checkpoints.format import (
    Key,
    checkpoints_folder,
    folder_name,
    group_size,
    index_name,
    is_committed,
    is_ours,
    pieces_name,
    read_serial,
    sync_folder,
)
from colossus.checkpoints.index import Index
from colossus.checkpoints.manifest import read_claim
from colossus.checkpoints.ranks import OneRank, Ranks
from colossus.checkpoints.retention import delete_empty, delete_leftovers, locked
from colossus.checkpoints.shards import Shard, Snapshot, shards_to_write
from colossus.checkpoints.write import write_shards
from colossus.errors import MachineError, UserError

FAREWELL_SECONDS = 30.0
CLEANING_SECONDS = 60.0  # of leftovers at the start, while the other ranks wait
LOOK_SECONDS = 0.02  # between two looks at what is waited for
LOOKED_AT = 8  # files of a folder that is there already, to know whose it is


@dataclass(frozen=True, slots=True)
class Saved:
    """A save that is finished. On ranks other than 0: this rank's part of it."""

    step: int
    path: Path
    num_bytes: int
    blocked_seconds: float  # that training stood still
    seconds: float  # from the call to the last byte on storage


@dataclass(slots=True)
class _Save:
    """A save under way."""

    step: int
    folder: Path
    id: str
    serial: int
    meta: dict[str, Any]
    shards: list[Shard]  # that this rank writes
    held: list[Key]  # see `Index`
    began: float
    copied: bool
    blocked_seconds: float = 0.0
    thread: threading.Thread | None = None
    made: list[Path] = field(default_factory=list)  # files of this rank that are on storage
    cancelled: threading.Event = field(default_factory=threading.Event)
    unwanted: bool = False  # rank 0 has given it up
    ended: bool = False
    error: BaseException | None = None
    saved: Saved | None = None


class Saver:
    """Writes checkpoints of a run to `run_folder/checkpoints`; every rank has one, made at the same time.

    `save` copies the state in memory and returns; a thread writes it. One save is under way at a time: the
    next one waits for it. No collectives are used after construction, but while all ranks stand still for a
    save without a copy: the ranks of one replica write what they hold, and a process beside rank 0 waits
    until all parts are on storage and commits (see `commit`).

    A save that fails (no space, no permission) deletes what it wrote itself and nothing else, leaves the
    earlier checkpoints as they were, and raises MachineError at the next `save`, `poll` or `wait`. What is
    committed is never taken back: errors of tidying are warnings.

    A folder is never written twice. What killed attempts left uncommitted is deleted here, at the start,
    while no rank writes yet; a save of a step whose folder exists (the run fell back behind a damaged
    checkpoint, or a save of that step failed) goes to `step-00000100.2`, which every rank concludes from the
    same list of names.

    Args:
        run_folder: of the run; a second Saver of another process does no harm, but may find its steps taken.
        world: rank, size and broadcast; None is a world of one.
        keep: the newest so many checkpoints stay.
        keep_every: those of every so many steps stay for good; 0: none do.
        patience_seconds: how long one writer's part is waited for once those before it are there.
        damaged: checkpoints that were read and are not whole, and do not count.

    Raises:
        MachineError: the folder cannot be made, read or cleaned, on any rank.
    """

    def __init__(
        self,
        run_folder: str | Path,
        world: Ranks | None = None,
        keep: int = 2,
        keep_every: int = 0,
        patience_seconds: float = 600.0,
        damaged: Iterable[Path] = (),
    ) -> None:
        self._run_folder = Path(run_folder)
        self._folder = checkpoints_folder(run_folder)
        self._world = world if world is not None else OneRank()
        self._keep = keep
        self._keep_every = keep_every
        self._patience = patience_seconds
        self._snapshot = Snapshot()
        self._preparing: threading.Thread | None = None
        self._current: _Save | None = None
        self._finished: list[Saved] = []
        self.num_saves = 0  # begun
        self._last: _Save | None = None
        self._lock = threading.Lock()
        self._damaged = sorted(path.name for path in damaged)
        self._committer = Committer()
        self.before: int | None = None  # see `prune`; whoever saves may set it, and `first`
        self.first: int | None = None

        start = self._world.broadcast(self._clean() if self._world.rank == 0 else None)
        if isinstance(start, str):
            raise MachineError(start)
        self._attempt, names, self._first_serial = start
        self._names = set(names)

    def prepare(self, tensors: Mapping[Key, torch.Tensor]) -> None:
        """Touches the memory that a save of these will need, in a thread, and starts the process that
        commits: the first save is quick, too."""
        if self._leads:
            with contextlib.suppress(MachineError):  # which the save will tell
                self._committer.start()
        shards, _ = self._own_shards(tensors)
        self._preparing = threading.Thread(target=self._snapshot.reserve, args=(shards,), daemon=True)
        self._preparing.start()

    def copy_bytes(self, tensors: Mapping[Key, torch.Tensor]) -> int:
        """Memory that a copy of what this rank writes of these takes."""
        return sum(shard.num_bytes for shard in self._own_shards(tensors)[0])

    def save(
        self,
        step: int,
        tensors: Mapping[Key, torch.Tensor],
        meta: dict[str, Any],
        asynchronous: bool = True,
        together: bool = True,
    ) -> float:
        """Saves the state of a run after `step`; returns the seconds that the caller stood still.

        Every rank calls this for the same steps, in the same order.

        Args:
            step: the last step whose update is in `tensors`.
            tensors: by (name, kind), of any layout; a plain tensor is equal on all ranks of the world, while
                of DTensors each rank gives those whose meshes it is in.
            meta: plain JSON; rank 0's is kept.
            asynchronous: False writes straight from `tensors`, without a copy in memory, and returns when
                the checkpoint is whole; all ranks wait for that together.
            together: False: each rank waits only for its own part then, and rank 0 for the commit.

        Raises:
            MachineError: the save before this one failed (this one isn't begun), or this one did.
            ValueError, TypeError: `meta` is not plain JSON.
        """
        began = time.perf_counter()
        number, self.num_saves = self.num_saves, self.num_saves + 1
        folder = self._folder / self._new_name(step)  # counted even if we raise: all ranks count alike
        self._finish()
        shards, held = self._own_shards(tensors)
        save = self._current = self._last = _Save(
            step=step,
            folder=folder,
            id=f"{self._attempt}-{number}",
            serial=self._first_serial + number,
            meta=json.loads(json.dumps(meta, allow_nan=False)) if self._world.rank == 0 else {},
            shards=shards,
            held=held,
            began=began,
            copied=asynchronous,
        )
        if asynchronous:
            if self._preparing is not None:
                self._preparing.join()
                self._preparing = None
            save.shards = self._snapshot.take(shards)
            save.blocked_seconds = time.perf_counter() - began
        if self._writes:
            save.thread = threading.Thread(target=self._run, args=(save,), daemon=True)
            save.thread.start()
        else:
            save.saved, save.ended = Saved(step, folder, 0, 0.0, 0.0), True
        if not asynchronous:
            if together:
                self.wait_together()
            self._finish()
        return time.perf_counter() - began

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Lets the save under way finish. If training failed, its error is the one that is raised."""
        try:
            if error is None:
                self.wait()
            elif self._current is not None and self._current.thread is not None:
                alone = self._world.size == 1  # else the parts of ranks that are gone would be waited for
                self._current.thread.join(None if alone else FAREWELL_SECONDS)
        finally:
            self._committer.close()

    def poll(self) -> list[Saved]:
        """The saves that finished since the last call, without waiting. Raises MachineError if one failed."""
        if not self.busy:
            self._finish()
        finished, self._finished = self._finished, []
        return finished

    def wait(self) -> float:
        """Waits until no save is under way; returns the seconds. Raises MachineError if it failed."""
        began = time.perf_counter()
        self._finish()
        return time.perf_counter() - began

    @property
    def busy(self) -> bool:
        """Whether this rank's part of a save is still under way."""
        thread = self._current.thread if self._current is not None else None
        return thread is not None and thread.is_alive()

    def wait_together(self) -> None:
        """Waits until no rank is busy. Every rank calls this; none waits long for another in a collective,
        and rank 0 learns of the failure of another."""
        pause = LOOK_SECONDS
        while self._world.any(self.busy):
            if self._world.any(self._last is not None and self._last.error is not None):
                self.cancel()
            if self._current is not None and self._current.thread is not None:
                self._current.thread.join(pause)
            else:
                time.sleep(pause)
            pause = min(1.5 * pause, 0.5)

    def cancel(self) -> None:
        """Lets rank 0 wait no longer for parts of the save under way: some rank has failed."""
        if self._current is not None:
            self._current.cancelled.set()
            self._committer.cancel(self._current.id)

    def take_back(self) -> None:
        """Deletes what this rank wrote of its last save: rank 0 said that it gave it up."""
        save = self._last
        if save is None:
            return
        with self._lock:
            save.unwanted = True
            if save.ended:
                self._delete_made(save)

    def _clean(self) -> tuple[str, list[str], int] | str:
        """Rank 0, once: an id of this attempt, the names that are taken, the next serial number."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            sync_folder(self._folder.parent)
            try:
                delete_leftovers(self._run_folder, CLEANING_SECONDS)
            except OSError as error:
                warn(f"cannot tidy {self._folder}: {error.strerror}")
            newest = next(iter(committed(self._run_folder, say=lambda message: None)), None)
            serial = read_serial(newest) + 1 if newest is not None else 1
            return uuid.uuid4().hex, [path.name for path in self._folder.iterdir()], serial
        except OSError as error:
            return f"cannot save to {self._folder}: {error.strerror}"
        except UserError as error:
            return f"cannot save to {self._folder}: {error}"

    @property
    def _writes(self) -> bool:
        """Whether this rank is of the replica that writes."""
        return self._world.rank < self._world.num_writers

    @property
    def _leads(self) -> bool:
        """Whether it waits for others: each first rank of a group does, in a process of its own."""
        return self._writes and self._world.rank % group_size(self._world.num_writers) == 0

    def _own_shards(self, tensors: Mapping[Key, torch.Tensor]) -> tuple[list[Shard], list[Key]]:
        return shards_to_write(tensors, self._world.rank, self._world.num_writers)

    def _new_name(self, step: int) -> str:
        name = next(name for n in count(1) if (name := folder_name(step, n)) not in self._names)
        self._names.add(name)
        return name

    def _finish(self) -> None:
        """Waits for the save under way; keeps its outcome, or raises it."""
        save, self._current = self._current, None
        if save is None:
            return
        if save.thread is not None:
            save.thread.join()
        if save.error is not None:
            raise save.error
        if save.saved is not None:
            self._finished.append(save.saved)

    def _run(self, save: _Save) -> None:
        """Everything after the copy, in a thread. What goes wrong is kept for the next call."""
        if save.copied and sys.platform == "linux":
            with contextlib.suppress(OSError):  # a container may forbid it
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)  # training comes first
        try:
            num_bytes = self._write(save)
            seconds = time.perf_counter() - save.began
            blocked = save.blocked_seconds if save.copied else seconds
            save.saved = Saved(save.step, save.folder, num_bytes, blocked, seconds)
        except (OSError, MachineError) as error:
            save.error = MachineError(self._give_up(save, error))
            save.error.__cause__ = error
        except BaseException as error:
            self._give_up(save, error)
            save.error = error
        finally:
            save.shards = []
            with self._lock:
                save.ended = True
                if save.unwanted:
                    self._delete_made(save)

    def _write(self, save: _Save) -> int:
        """Writes this rank's part, and waits for the commit where this is rank 0. Returns the bytes that this
        rank vouches for."""
        if not self._leads:
            return self._write_part(save).file.bytes
        with locked(self._folder) if self._world.rank == 0 else contextlib.nullcontext():
            self._committer.begin(self._order(save))
            if save.cancelled.is_set():
                self._committer.cancel(save.id)
            try:
                index = self._write_part(save)
            except BaseException as error:
                self._committer.cancel(save.id, f"rank {self._world.rank}: {_reason(error)}")
                with contextlib.suppress(MachineError):
                    self._committer.answer()
                raise
            self._committer.look()
            if self._world.rank != 0:
                with contextlib.suppress(MachineError):  # rank 0 tells what is wrong with the group
                    self._committer.answer()
                return index.file.bytes
            return self._committed(save)

    def _order(self, save: _Save) -> Order:
        tidy = {
            "run_folder": str(self._run_folder),
            "keep": self._keep,
            "keep_every": self._keep_every,
            "damaged": self._damaged,
            "before": self.before,
            "first": self.first,
        }
        is_first, world = self._world.rank == 0, self._world
        return Order(
            save=save.id,
            folder=str(save.folder),
            rank=world.rank,
            num_writers=world.num_writers,
            patience_seconds=self._patience,
            commit=(save.step, save.serial, save.meta) if is_first else None,
            tidy=tidy if is_first else {},
        )

    def _committed(self, save: _Save) -> int:
        """Waits for the commit; returns the bytes of the checkpoint."""
        try:
            answer = self._committer.answer()
        except Ended:
            # Perhaps between the commit and its answer. Another saver's commit is not ours.
            if not is_committed(save.folder) or read_serial(save.folder) != save.serial:
                raise
            answer = {"bytes": read_claim(save.folder).num_bytes}
        save.made = []  # what is committed is nobody's to take back
        if "warning" in answer:
            warn(f"cannot tidy {self._folder}: {answer['warning']}")
        num_bytes: int = answer["bytes"]
        return num_bytes

    def _write_part(self, save: _Save) -> Index:
        """Writes what this rank holds, to a folder of this save alone, and tells of it."""
        try:
            save.folder.mkdir()
        except FileExistsError:  # another rank was here before; a user, or another saver, may have been
            if self._world.size == 1 or not _is_ours(save.folder):
                raise
        sync_folder(self._folder)
        rank = self._world.rank
        index = write_shards(save.folder, save.shards, rank, save.id, save.held)
        save.made.append(save.folder / pieces_name(rank))
        announce(save.folder, rank, index)
        save.made.append(save.folder / index_name(rank))
        return index

    def _give_up(self, save: _Save, error: BaseException) -> str:
        """Takes back what this save wrote; returns what to tell the user."""
        reason = _reason(error)
        rank = self._world.rank
        if rank == 0:
            with contextlib.suppress(MachineError):
                self._committer.begin(dataclasses.replace(self._order(save), take_back=True))
                self._committer.answer()
        # Once a rank was about to announce its part, it may have been read, and only rank 0 knows whether it
        # is committed.
        if rank == 0 or not save.made:
            self._delete_made(save)
        if rank != 0:
            announce_failure(save.folder, index_name(rank), save.id, reason)
        return f"cannot save step {save.step} to {save.folder}: {reason}; {self._what_is_saved()}"

    def _delete_made(self, save: _Save) -> None:
        """Deletes what this rank wrote of a save that will never be committed."""
        if is_committed(save.folder):  # by another saver, or its marker could neither be synced nor deleted
            return
        with contextlib.suppress(OSError):  # without its commit it is nothing, and the next start deletes it
            for path in save.made:
                path.unlink(missing_ok=True)
            delete_empty(save.folder)

    def _what_is_saved(self) -> str:
        try:
            path = latest(self._run_folder, say=lambda message: None)
        except (MachineError, UserError):
            path = None
        return f"{path.name} is saved whole" if path is not None else "nothing of this run is saved yet"


def _reason(error: BaseException) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _is_ours(folder: Path) -> bool:
    """Whether a save made the first files of a folder that are listed."""
    with os.scandir(folder) as files:
        return all(is_ours(file.name) for file in islice(files, LOOKED_AT))
