"""What each rank of a world reads of the checkpoint that it goes on from, by the rules that loading follows.

A rank reads its share of headers, and of the tensors that it holds those whose turn it is, from the pieces in
which they lie; to others that hold the same it passes them on. All is counted for every rank of the world:
ranks that hold parts of one tensor differ by places on its axes alone, so that numpy adds up many at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from colossus.checkpoints.format import ITEM_BYTES, Entry
from colossus.checkpoints.load import entry_for
from colossus.checkpoints.manifest import read_claim
from colossus.checkpoints.spans import overlap, span
from colossus.checkpoints.spread import Spread
from colossus.cuts import Cut, box_at, parts_within
from colossus.dryrun.held import Held, held
from colossus.dryrun.source import Sizes, Source
from colossus.dryrun.worker import answers
from colossus.job import Job
from colossus.layout import Layout
from colossus.trainer.state import check_model, meta_of


@dataclass(frozen=True)
class Reads:
    """By rank: bytes that it reads from storage, `data` of them of tensors; files that it opens; bytes of
    tensors that others pass on to it.

    state: bytes of the checkpoint's tensors. layout: of the world that reads.
    """

    source: Source
    layout: Layout
    storage: Sizes
    data: Sizes
    files: Sizes
    received: Sizes

    @property
    def state(self) -> int:
        return sum(entry.num_bytes for entry in self.source.manifest.tensors.values())

    @property
    def most(self) -> int:
        """The rank that reads most from storage."""
        return int(self.storage.argmax())

    def of_kind(self, replica: int, stage: int, count: int) -> dict[str, Any]:
        """Of the `count` ranks of a stage from replica `replica` on: the mean, and who reads most."""
        layout = self.layout
        ranks = np.arange(layout.num_ranks).reshape(layout.dp_replicate, layout.pp, -1)
        alike = ranks[replica : replica + count // ranks.shape[-1], stage].ravel()
        most = int(alike[self.storage[alike].argmax()])
        return {"mean_storage_bytes": float(self.storage[alike].mean()), "most": self.of_rank(most)}

    def of_rank(self, rank: int) -> dict[str, int]:
        """In plain words."""
        return {
            "rank": rank,
            "storage_bytes": int(self.storage[rank]),
            "data_bytes": int(self.data[rank]),
            "files": int(self.files[rank]),
            "received_bytes": int(self.received[rank]),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data, of the whole world."""
        return {
            "from": str(self.source.path),
            "from_is_there": self.source.is_there,
            "writers": self.source.writers.num,
            "state_bytes": self.state,
            "storage_bytes": int(self.storage.sum()),
            "data_bytes": int(self.data.sum()),
            "files": int(self.files.sum()),
            "received_bytes": int(self.received.sum()),
            "most": self.of_rank(self.most),
        }


def check_source(source: Path | tuple[Path, Job], job: Job) -> None:
    """Raises UserError where what a job is to go on from is of another model."""
    if isinstance(source, Path):
        check_model(source, read_claim(source).meta, job.model)
    else:
        check_model(source[0], meta_of(source[1].model), job.model)


def reads_of(
    source: Path | tuple[Path, Job], job: Job, say: Callable[[str], None] = lambda line: None
) -> Reads:
    """What the ranks of a job read at its start.

    source: a checkpoint; or the job that a dry world follows, and what that is called.

    Raises:
        UserError: it is of another model, or of another optimizer. DamagedCheckpoint.
    """
    worlds = [job] if isinstance(source, Path) else [job, source[1]]
    asked = [(each, rank) for each in worlds for rank in _first_ranks(each.layout)]
    found = answers(held, asked, lambda n: say(f"what ranks hold ({n + 1} of {len(asked)} stages)"))
    here, there = found[: job.layout.pp], found[job.layout.pp :]
    known = Source.at(source) if isinstance(source, Path) else Source.of(*source, there)
    return planned(known, here, job.layout)


def _first_ranks(layout: Layout) -> range:
    """Of each stage of the first replica."""
    each = layout.num_ranks // layout.dp_replicate
    return range(0, each, each // layout.pp)


def planned(source: Source, stages: Iterable[Held], layout: Layout) -> Reads:
    """What the ranks of `layout` read. stages: what a rank of each stage holds.

    Raises:
        UserError: the checkpoint has no such tensor, or one of another shape or type.
    """
    ranks, num = layout.num_ranks, source.writers.num
    data, received = (np.zeros(ranks, dtype=np.int64) for _ in range(2))
    # Pairs of a rank and a writer of whose file it reads, each as one number.
    writers = np.arange(num)
    pairs = [(writers % ranks) * num + writers]  # whose header it looks at
    storage = np.bincount(writers % ranks, source.headers, ranks).astype(np.int64)
    boxes = cache(_boxes)
    for stage in stages:
        found = [pairs[0][:0]]
        for spread in stage.loaded:
            wanted = Entry(*spread.key, spread.dtype, spread.shape)
            entry = entry_for(wanted, source.manifest, source.path)
            part = boxes(
                spread.shape, spread.cuts, entry.cuts, ITEM_BYTES[entry.dtype], source.manifest.chunk_bytes
            )
            readers = spread.reader + part.steps
            data[readers] += part.read
            found.append(readers[part.which] * num + entry.first + part.writers)
            own = part.elements * ITEM_BYTES[spread.dtype]
            received[_holders(spread, part.steps)] += own
            received[readers] -= own
        pairs.append(np.unique(np.concatenate(found)))
    together = np.unique(np.concatenate(pairs))
    rank, writer = np.divmod(together, num)
    storage += data + np.bincount(rank, source.indexes[writer], ranks).astype(np.int64)
    files = 2 * np.bincount(rank, minlength=ranks)  # an index, and what it is of
    if (size := source.writers.group) > 1:
        num_groups = len(source.groups)
        rank, group = np.divmod(np.unique(rank * num_groups + writer // size), num_groups)
        storage += np.bincount(rank, source.groups[group], ranks).astype(np.int64)
        files += np.bincount(rank, minlength=ranks)
    storage[0] += source.claim  # which it tells the others
    files[0] += 2
    return Reads(source, layout, storage, data, files, received)


@dataclass(frozen=True)
class _Boxes:
    """The parts of a tensor, in the order of places on the axes that cut it: of each the step from the first
    rank to the one that has it, its elements, and the bytes that are read for it. which, writers: of each
    piece that a part lies in, the number of the part, and the step from the first writer."""

    steps: Sizes
    elements: Sizes
    read: Sizes
    which: Sizes
    writers: Sizes


def _boxes(
    shape: tuple[int, ...], cuts: tuple[Cut, ...], written: tuple[Cut, ...], item: int, chunk: int
) -> _Boxes:
    """Of a tensor that is cut by `cuts` and was `written` as other cuts say."""
    steps, elements, read, which, writers = (list[int]() for _ in range(5))
    for number, places in enumerate(itertools.product(*(range(cut.parts) for cut in cuts))):
        box = box_at(shape, cuts, places)
        assert box is not None, "what a rank holds is a box"
        low, sizes = box
        high = [a + n for a, n in zip(low, sizes, strict=True)]
        num_bytes = 0
        for there, piece in parts_within(shape, written, low, high):
            assert piece is not None, "what a writer has is a box"
            where = span(piece[1], item, *overlap(*piece, low, high), chunk)
            num_bytes += where.end - where.begin
            which.append(number)
            writers.append(sum(p * cut.stride for p, cut in zip(there, written, strict=True)))
        steps.append(sum(p * cut.stride for p, cut in zip(places, cuts, strict=True)))
        elements.append(int(np.prod(sizes)))
        read.append(num_bytes)
    return _Boxes(*(np.array(each, dtype=np.int64) for each in (steps, elements, read, which, writers)))


def _holders(spread: Spread, steps: Sizes) -> Sizes:
    """The ranks that hold the parts at these steps, a row for each that holds the same."""
    first = np.array([spread.first])
    for axis in spread.copies:
        first = (first[:, None] + np.arange(axis.size) * axis.stride).ravel()
    return first[:, None] + steps
