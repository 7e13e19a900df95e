"""A checkpoint's metadata where 196,608 ranks save Llama 3.1 405B: tp 8, pp 16, 128 shards, 12 replicas.

The 16,384 ranks of one replica write. Here are all their files: indexes as they would be, headers and data as
holes of the right length. The rules are those of the DTensors that the program makes for a rank of
each stage of that world. Measured is what one rank does to save beside writing its data; what the processes
do that commit, first those of 127 groups in turns, then rank 0's; and what one rank reads and parses before
it reads data, in the same layout and in another one (tp 4, pp 8, 64 shards). Bytes are those of the files
that it opens, memory is the most that Python allocated meanwhile.

    python -m benchmarks.checkpoint_scale [--quick] [--out FILE] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import tracemalloc
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from colossus.checkpoints.commit import Order
from colossus.checkpoints.committer import Committer
from colossus.checkpoints.foreseen import SAVE, Foreseen
from colossus.checkpoints.format import (
    CHUNK_BYTES,
    COMMITTED,
    MANIFEST,
    File,
    Key,
    group_size,
    index_name,
    pieces_name,
)
from colossus.checkpoints.index import DONE, Index, digest, encode_index, sorted_entries
from colossus.checkpoints.manifest import read_claim
from colossus.checkpoints.pieces import pieces_of
from colossus.checkpoints.retention import delete
from colossus.checkpoints.shards import Grids, shard_of, shards_to_write
from colossus.checkpoints.spread import Spread
from colossus.dryrun.fake import fake_world
from colossus.job import Job, load_job
from colossus.measure.machine import this_machine
from colossus.models.init import logical_name
from colossus.parallel.apply import transformed
from colossus.perf.receipts import Figure, print_figures, write_receipt

KINDS = ("weight", "exp_avg", "exp_avg_sq")
SAVES = {"tp": 8, "pp": 16, "dp_shard": 128, "dp_replicate": 12}
LOADS = {"tp": 4, "pp": 8, "dp_shard": 64, "dp_replicate": 12}
QUICK_SAVES = {"tp": 2, "pp": 4, "dp_shard": 16, "dp_replicate": 3}
QUICK_LOADS = {"tp": 4, "pp": 2, "dp_shard": 4, "dp_replicate": 3}
OWN, ALL = "< 1e6", "< 50e6"  # bytes that a rank reads and parses; of all that describes a checkpoint


def job_of(layout: Mapping[str, int]) -> Job:
    words = [f"layout.{name}={value}" for name, value in layout.items()]
    settings = ["layout.compile=false", "data.seq_len=8192", "precision.type=bf16"]
    job = load_job(None, ["model=llama3.1-405b", *settings, *words])
    return replace(job, layout=job.layout.filled())


def state_of(job: Job, rank: int) -> tuple[dict[Key, torch.Tensor], int]:
    """The tensors of a rank, without values, and how many ranks write."""
    with fake_world(job, rank) as world:
        named = [(logical_name(n), p.detach()) for n, p in transformed(job, world).named_parameters()]
        return {(name, kind): p for name, p in named for kind in KINDS}, world.num_writers


class Writers:
    """Makes what the writers of a checkpoint make."""

    def __init__(self, folder: Path, foreseen: Foreseen) -> None:
        self._folder, self._foreseen = folder, foreseen
        self.header_bytes = self.index_bytes = 0

    def write(self, rank: int) -> None:
        index = self._foreseen.index(rank)
        with (self._folder / pieces_name(rank)).open("wb") as file:
            file.truncate(index.file.bytes)
        data = encode_index(index)
        (self._folder / index_name(rank)).write_bytes(data + DONE)
        self.header_bytes += index.file.header_bytes
        self.index_bytes += len(data)


class Opened:
    """The bytes of the files that this process opens in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.num_bytes, self.files = str(folder), 0, 0
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and str(arguments[0]).startswith(self._folder):
            self.num_bytes += os.stat(str(arguments[0])).st_size  # noqa: PTH116
            self.files += 1


def measured(act: Callable[[], object]) -> tuple[float, int]:
    """Seconds, and bytes that Python allocated at most: in a second turn, which is slower for it."""
    began = time.perf_counter()
    act()
    seconds = time.perf_counter() - began
    tracemalloc.start()
    act()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return seconds, peak


def to_save(job: Job, rank: int, num_writers: int) -> Iterator[Figure]:
    tensors, _ = state_of(job, rank)

    def describe() -> bytes:
        shards, held = shards_to_write(tensors, rank, num_writers)
        entries = sorted_entries(shard.entry for shard in shards)
        num = sum(-(-shard.num_bytes // CHUNK_BYTES) for shard in shards)
        listed = tuple(entry for entry in entries if entry.first == rank)
        index = Index(SAVE, File(1, 1, 1), digest(entries), listed, tuple(held), array("I", range(num)))
        return encode_index(index)

    seconds, peak = measured(describe)
    title = "a rank that saves" if rank else "the first rank, which saves"
    yield Figure(f"{title}: tensors", len(tensors), "tensors")
    yield Figure(f"{title}: writes beside data", len(describe()), "bytes", OWN)
    yield Figure(f"{title}: reads", 0, "bytes", OWN)
    yield Figure(f"{title}: rules and index", seconds, "s")
    yield Figure(f"{title}: peak memory", peak, "bytes")


def to_load(title: str, folder: Path, job: Job, rank: int, opened: Opened) -> Iterator[Figure]:
    tensors, _ = state_of(job, rank)
    shards = [shard_of(key, tensor) for key, tensor in tensors.items()]
    num_pieces = 0

    def find() -> None:
        nonlocal num_pieces
        manifest = read_claim(folder)
        pieces = pieces_of(folder, manifest)
        num_pieces = 0
        for shard in shards:
            ends = [begin + size for begin, size in zip(shard.offset, shard.sizes, strict=True)]
            num_pieces += len(list(pieces.within(manifest.tensors[shard.entry.key], shard.offset, ends)))

    opened.num_bytes = opened.files = 0
    find()
    num_bytes, files = opened.num_bytes, opened.files
    seconds, peak = measured(find)
    yield Figure(f"{title}: pieces that it needs", num_pieces, "pieces")
    yield Figure(f"{title}: reads and parses beside data", num_bytes, "bytes", OWN)
    yield Figure(f"{title}: files of that", files, "files")
    yield Figure(f"{title}: until each piece is found", seconds, "s")
    yield Figure(f"{title}: peak memory", peak, "bytes")


def measure(folder: Path, saves: Mapping[str, int], loads: Mapping[str, int]) -> Iterator[Figure]:
    job = job_of(saves)
    per_stage = saves["tp"] * saves["dp_shard"]
    spreads = list[Spread]()
    for stage in range(saves["pp"]):
        tensors, num_writers = state_of(job, stage * per_stage)
        grids = Grids()  # of one world
        spreads += [grids.spread(key, tensor) for key, tensor in tensors.items()]
    foreseen = Foreseen.of(spreads, num_writers)
    yield Figure("ranks", job.layout.num_ranks, "ranks")
    yield Figure("writers", num_writers, "writers")
    yield Figure("state", sum(entry.num_bytes for entry in foreseen.entries.values()), "bytes")
    for rank in (0, num_writers // 2 + 5):
        yield from to_save(job, rank, num_writers)

    writers = Writers(folder, foreseen)
    for rank in range(num_writers):
        writers.write(rank)
    seconds, leader = list[float](), Committer()
    for rank in range(group_size(num_writers), num_writers, group_size(num_writers)):
        began = time.perf_counter()
        leader.begin(Order(SAVE, str(folder), rank, num_writers, 60.0))
        leader.answer()
        seconds.append(time.perf_counter() - began)
    leader_bytes = resident(leader)
    leader.close()
    yield Figure("the processes of groups: files that one waits for", group_size(num_writers), "files")
    yield Figure("the processes of groups: median", statistics.median(seconds), "s")
    yield Figure("the processes of groups: longest", max(seconds), "s")
    yield Figure("the processes of groups: resident", leader_bytes, "bytes")
    first, began = Committer(), time.perf_counter()
    first.begin(Order(SAVE, str(folder), 0, num_writers, 60.0, (1, 1, {})))
    first.answer()
    took = time.perf_counter() - began
    first_bytes = resident(first)
    first.close()
    num_groups = -(-num_writers // group_size(num_writers))
    yield Figure("the commit: files that it waits for", group_size(num_writers) + num_groups - 1, "files")
    yield Figure("the commit: from its start to COMMITTED", took, "s")
    yield Figure("the commit: resident", first_bytes, "bytes")

    groups = sum(path.stat().st_size for path in folder.glob("group-*"))
    rest = sum((folder / name).stat().st_size for name in (MANIFEST, COMMITTED))
    yield Figure("the manifest", (folder / MANIFEST).stat().st_size, "bytes")
    yield Figure("all metadata", writers.index_bytes + groups + rest, "bytes", ALL)
    yield Figure("headers of safetensors, which loading does not need", writers.header_bytes, "bytes")

    opened = Opened(folder)
    rank = num_writers // 2 + 5
    yield from to_load("the same layout", folder, job, rank, opened)
    other = job_of(loads)
    yield from to_load("another layout", folder, other, other.layout.num_ranks // 3, opened)
    began = time.perf_counter()
    delete(folder)
    yield Figure("deleting it, beside training", time.perf_counter() - began, "s")


def resident(committer: Committer) -> int:
    """The most memory that the process has had."""
    assert committer._process is not None
    status = Path(f"/proc/{committer._process.pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) << 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="384 ranks, of which 128 write")
    parser.add_argument("--out", help="the receipt")
    parser.add_argument("--folder", default=".", help="where to write")
    arguments = parser.parse_args()
    layouts = (QUICK_SAVES, QUICK_LOADS) if arguments.quick else (SAVES, LOADS)
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix=".checkpoint-scale-") as place:
        folder = Path(place).resolve() / "checkpoints" / "step-00000001"
        folder.mkdir(parents=True)
        figures = list(measure(folder, *layouts))
    print_figures(figures)
    write_receipt("checkpoint_scale", figures, arguments.out, this_machine().to_dict())


if __name__ == "__main__":
    main()
