"""Makes checkpoints of what their writers have announced, in a process of its own beside training.

The first rank of each group of writers has such a process: it waits for the group and tells of it in one
file. That of rank 0 waits for the groups, commits, and deletes older checkpoints. It imports no torch, and
holds what training must not: the interpreter's lock for a list as long as there are writers.

Orders come as lines of JSON on standard input, answers go as lines to standard output. Where the process of
training ends, this one does, and commits nothing any more.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import select
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from colossus.checkpoints.announce import (
    Pause,
    announce_failure,
    announce_group,
    gather,
    gather_groups,
    listed,
    take_back,
)
from colossus.checkpoints.format import (
    COMMITTED,
    MANIFEST,
    Entry,
    Key,
    Manifest,
    Vouched,
    Writers,
    committed_line,
    group_name,
    group_size,
    is_committed,
    write_synced,
)
from colossus.checkpoints.index import Row, digest, sorted_entries
from colossus.checkpoints.manifest import encode
from colossus.checkpoints.pieces import by_rule
from colossus.checkpoints.retention import delete_empty, locked, prune
from colossus.errors import MachineError


@dataclass(frozen=True)
class Order:
    """What one process of a save is to do: as that of rank `rank`, which leads a group.

    commit: step, serial number and meta of the checkpoint, for rank 0's; None for others. tidy: `prune`'s
    arguments. take_back: delete what was announced instead.
    """

    save: str
    folder: str
    rank: int
    num_writers: int
    patience_seconds: float
    commit: tuple[int, int, dict[str, Any]] | None = None
    tidy: dict[str, Any] = field(default_factory=dict)
    take_back: bool = False


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what else is printed is no answer
    with contextlib.suppress(OSError):  # a container may forbid it
        os.nice(10)  # training comes first
    orders = Orders(sys.stdin.fileno())
    with contextlib.suppress(BrokenPipeError):  # nobody waits for the answer any more
        while (order := orders.next()) is not None:
            answers.write(json.dumps(obey(order, orders)) + "\n")
            answers.flush()


def obey(order: Order, orders: Orders) -> dict[str, Any]:
    """The answer: "bytes" of the checkpoint, perhaps with a "warning"; or the "error", or "bug", why there is
    none."""
    folder, group = Path(order.folder), order.rank // group_size(order.num_writers)
    try:
        if order.take_back:
            if not is_committed(folder):
                take_back(folder, order.save)
                delete_empty(folder)
            return {"bytes": 0}

        def pause(seconds: float) -> None:
            orders.pause(seconds, order.save)

        if order.commit is None:
            with _failure_told(folder, order, group):
                found = gather(folder, order.save, order.num_writers, group, order.patience_seconds, pause)
                announce_group(folder, group, found)
            return {"bytes": 0}
        manifest = collected(
            folder, order.save, order.num_writers, order.commit, order.patience_seconds, pause
        )
        with locked(folder.parent):
            pause(0.0)  # whoever gave the order may have ended, and another attempt have begun
            commit(folder, manifest)
            return {"bytes": manifest.num_bytes} | _tidied(order.tidy)
    except (OSError, MachineError) as error:
        return {"error": _reason(error)}
    except Exception:
        return {"bug": traceback.format_exc()}


def commit(folder: Path, manifest: Manifest) -> None:
    """Makes a checkpoint of files that are on storage. OSError: it is none."""
    data = encode(manifest)
    write_synced(folder / MANIFEST, data)
    try:
        write_synced(folder / COMMITTED, committed_line(manifest.serial, data).encode())
    except BaseException:
        if not is_committed(folder):
            with contextlib.suppress(OSError):
                (folder / MANIFEST).unlink()
        raise


def merge(entries: Iterable[Entry], held: Iterable[Key], rows: Sequence[Row]) -> dict[Key, Entry]:
    """The tensors of a checkpoint: each as its first writer says.

    Raises MachineError unless every writer followed just these rules, and what some rank holds is there. The
    parts of a rule make up their tensor, so those of the writers do.
    """
    tensors: dict[Key, Entry] = {}
    for entry in entries:
        if tensors.setdefault(entry.key, entry) is not entry:
            raise MachineError(
                f"two ranks disagree about {entry.name} ({entry.kind}): {tensors[entry.key]}, {entry}"
            )
    for name, kind in held:
        if (name, kind) not in tensors:
            raise MachineError(f"no rank wrote {name} ({kind})")
    rules = by_rule(tensors.values())
    followed: list[list[int]] = [[] for _ in rows]
    for number, (first, cuts) in enumerate(rules):
        for steps in itertools.product(*(range(0, cut.parts * cut.stride, cut.stride) for cut in cuts)):
            if (writer := first + sum(steps)) >= len(rows):
                raise MachineError(f"rank {writer} has a part to write, but there are {len(rows)} writers")
            followed[writer].append(number)
    groups, digests = [*rules.values()], dict[tuple[int, ...], int]()
    for writer, row in enumerate(rows):
        mine = tuple(followed[writer])
        if mine not in digests:
            digests[mine] = digest(sorted_entries(entry for number in mine for entry in groups[number]))
        if row.rules != digests[mine]:
            raise MachineError(f"rank {writer} wrote other tensors, or other parts, than its share of them")
    return tensors


def collected(
    folder: Path, save: str, num: int, what: tuple[int, int, dict[str, Any]], patience: float, pause: Pause
) -> Manifest:
    """The manifest of `what` (step, serial number, meta), once all of `num` writers are done; those of other
    groups tell it by way of their leaders. Raises MachineError where one has failed or does not come."""
    step, serial, meta = what
    group = gather(folder, save, num, 0, patience, pause)
    listing, held, rows = [*group.listing], {*group.held}, [*group.rows]
    if num > group_size(num):
        vouched = [_vouched(group.rows, announce_group(folder, 0, group))]
        for data, other in gather_groups(folder, save, num, patience, pause):
            listing += other.listing
            held |= {*other.held}
            rows += other.rows
            vouched.append(_vouched(other.rows, data))
    else:
        vouched = [row.vouched for row in rows]
    entries = [entry for rank in listing for entry in listed(folder, rank, rows[rank])]
    tensors = merge(entries, held, rows)
    size = group_size(num) if num > group_size(num) else 1
    return Manifest(step, serial, meta, tensors, Writers(num, size, tuple(vouched)))


def _vouched(rows: Iterable[Row], index: bytes) -> Vouched:
    return Vouched(sum(row.bytes for row in rows), hashlib.sha256(index).hexdigest())


@contextlib.contextmanager
def _failure_told(folder: Path, order: Order, group: int) -> Iterator[None]:
    try:
        yield
    except (OSError, MachineError) as error:
        announce_failure(folder, group_name(group), order.save, _reason(error))
        raise


def _tidied(arguments: dict[str, Any]) -> dict[str, str]:
    """The checkpoint is whole; what is left to do is tidying."""
    try:
        if arguments:
            prune(**arguments)
    except Exception as error:
        return {"warning": _reason(error)}
    return {}


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


class Orders:
    """Lines that come from the process of training."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._parent = os.getppid()
        self._rest = b""

    def next(self) -> Order | None:
        """The next order; None where there will be none."""
        while True:
            while b"\n" not in self._rest:
                if not self._read():
                    return None
            for tree in self._lines(1):
                if "folder" in tree:
                    return Order(**tree)

    def pause(self, seconds: float, save: str) -> None:
        """Waits, no longer than until a line comes. Raises MachineError where this save is given up, and ends
        where nobody waits for it."""
        came = select.select([self._descriptor], [], [], seconds)[0]
        if (came and not self._read()) or os.getppid() != self._parent:
            raise SystemExit
        for tree in self._lines():
            if tree.get("cancel") == save:
                raise MachineError(tree["reason"])

    def _read(self) -> bool:
        data = os.read(self._descriptor, 1 << 16)
        self._rest += data
        return bool(data)

    def _lines(self, most: int = -1) -> list[dict[str, Any]]:
        *lines, self._rest = self._rest.split(b"\n", most)
        return [json.loads(line) for line in lines]


if __name__ == "__main__":
    main()
