"""What it costs one rank to find its place among 131,072 and 200,000, and 64 real processes to meet.

Fake ranks: one process that is told it is some rank of so many (PyTorch's "fake" process group) makes its
meshes and groups, and builds its part of the model on the meta device with every transform; of the first
world also with memory and initial values. Each world has a process of its own; memory is private and above
that after the imports.

Real ranks: processes, forked from one that has imported PyTorch, make the groups of a layout of all axes over
gloo and a TCPStore. Operations of the store are the calls of its methods, counted by a store that passes them
on. The peer is PyTorch's default, by which every rank of a group connects with every other at once.

    python -m benchmarks.world_setup [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.memory import private_bytes
from benchmarks.tree_memory import TreeMemory
from colossus.job import Job, load_job
from colossus.layout import Layout
from colossus.measure.machine import this_machine
from colossus.parallel.apply import build
from colossus.parallel.mesh import Meshes
from colossus.parallel.world import World
from colossus.perf.receipts import Figure, print_figures, write_receipt
from colossus.sections import Data, Precision, RunSection

GIB = 2**30
SECONDS = 300.0  # until real ranks have answered
REPEATS = 20


@dataclass(frozen=True)
class Fake:
    """A world of which one rank is measured: its model, and its axes."""

    model: str
    axes: tuple[tuple[str, int], ...]

    @property
    def layout(self) -> Layout:
        values: dict[str, Any] = dict(self.axes)
        return Layout(micro_batch=1, recompute="full", **values).filled()

    @property
    def name(self) -> str:
        return f"{self.model}, {self.layout.num_ranks:,} ranks ({' '.join(f'{a}={n}' for a, n in self.axes)})"

    def job(self) -> Job:
        layout = self.layout
        return Job(
            model=load_job(None, [f"model={self.model}", "model.initializer_range=0.02"]).model,
            data=Data(seq_len=8192),
            layout=layout,
            precision=Precision(type="bf16"),
            run=RunSection(seed=0, global_batch=layout.dp * (layout.pp or 1)),
        )


def _axes(**axes: int) -> tuple[tuple[str, int], ...]:
    return tuple(axes.items())


FAKES = (
    Fake("llama3.1-405b", _axes(tp=8, pp=16, dp_shard=128, dp_replicate=8)),
    Fake("llama3.1-405b", _axes(tp=8, pp=16, cp=16, dp_shard=8, dp_replicate=8)),
    Fake("llama3.1-405b", _axes(tp=8, pp=8, dp_shard=125, dp_replicate=25)),
    Fake("llama3.1-70b", _axes(tp=8, dp_shard=100, dp_replicate=250)),
    Fake("deepseek-v3", _axes(pp=16, ep=64, dp_shard=64, dp_replicate=128)),
    Fake("deepseek-v3", _axes(pp=5, ep=64, dp_shard=64, dp_replicate=625)),
)
REAL = Layout(dp_replicate=2, dp_shard=4, tp=2, pp=2, cp=2, ep=8).filled()
QUICK_REAL = Layout(dp_shard=2, tp=2, pp=2, cp=2, ep=4).filled()


def as_fake_rank(fake: Fake, device: str) -> dict[str, float]:
    """Seconds and bytes of one rank; device: of its part of the model."""
    torch.set_num_threads(1)
    job = fake.job()
    ranks = job.layout.num_ranks
    rank = 2 * ranks // 3 + 5  # none of a corner
    before = private_bytes(os.getpid())
    with TreeMemory(os.getpid()) as memory:
        start = time.perf_counter()
        dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
        meshes = Meshes.build(job.layout, "cpu", experts=job.model.experts is not None, rank=rank)
        met = time.perf_counter()
        world = World(rank, ranks, torch.device(device), meshes, job.layout)
        model = build(job, world)
        built = time.perf_counter()
        held = private_bytes(os.getpid())
    shard = sum(p.to_local().nbytes for p in model.parameters())  # type: ignore[attr-defined]
    return {
        "meshes": met - start,
        "build": built - met,
        "bytes": max(memory.peak, held) - before,
        "shard": shard,
    }


def of_fake_ranks(fakes: tuple[Fake, ...]) -> list[Figure]:
    figures = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as processes:
        for fake in fakes:
            found = processes.apply(as_fake_rank, (fake, "meta"))
            figures += [
                Figure(f"{fake.name}: meshes and groups", found["meshes"], "s", "< 5"),
                Figure("  and its part of the model on meta", found["build"], "s", "< 5"),
                Figure("  memory of both", found["bytes"] / GIB, "GiB", "< 1"),
            ]
        found = processes.apply(as_fake_rank, (fakes[0], "cpu"))
        share = found["bytes"] / found["shard"]
    return [
        *figures,
        Figure(f"{fakes[0].name}: its part of the model with initial values", found["build"], "s"),
        Figure("  weights of this rank", found["shard"] / GIB, "GiB"),
        Figure("  memory of all, in these weights", share, "times", "< 2"),
    ]


class CountingStore(Store):
    """Passes everything on to another store, and counts."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store = store
        self.operations = 0

    def _pass(self, name: str, *arguments: Any) -> Any:
        self.operations += 1
        return getattr(self._store, name)(*arguments)

    def set(self, key: str, value: Any) -> None:
        self._pass("set", key, value)

    def get(self, key: str) -> bytes:
        return self._pass("get", key)  # type: ignore[no-any-return]

    def add(self, key: str, amount: int) -> int:
        return self._pass("add", key, amount)  # type: ignore[no-any-return]

    def check(self, keys: list[str]) -> bool:
        return self._pass("check", keys)  # type: ignore[no-any-return]

    def wait(self, keys: list[str], *timeout: timedelta) -> None:
        self._pass("wait", keys, *timeout)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return self._pass("multi_get", keys)  # type: ignore[no-any-return]

    def multi_set(self, keys: list[str], values: list[Any]) -> None:
        self._pass("multi_set", keys, values)

    def has_extended_api(self) -> bool:
        return bool(self._store.has_extended_api())  # type: ignore[attr-defined]


def as_real_rank(pipe: Connection, rank: int, layout: Layout, port: int, lazy: bool) -> None:
    """Answers seconds and operations, once when it is ready and once when it has done."""
    torch.set_num_threads(1)
    os.environ["TORCH_GLOO_LAZY_INIT"] = str(int(lazy))
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    ranks = layout.num_ranks
    limit = timedelta(seconds=SECONDS)
    store = CountingStore(
        TCPStore("127.0.0.1", port, ranks, rank == 0, timeout=limit, wait_for_workers=False)
    )
    pipe.send(None)
    pipe.recv()
    start = time.perf_counter()
    dist.init_process_group("gloo", rank=rank, world_size=ranks, store=store, timeout=limit)
    meshes = Meshes.build(layout, "cpu", experts=True, rank=rank)
    met = time.perf_counter()
    operations = store.operations
    world = World(rank, ranks, torch.device("cpu"), meshes, layout)
    assert world.sum([1.0]) == [ranks]
    first = time.perf_counter()
    each = _seconds_each(lambda: world.sum([1.0]))
    pipe.send({"meet": met - start, "first": first - met, "operations": operations, "sum": each})
    pipe.recv()
    dist.destroy_process_group()


def _seconds_each(act: Callable[[], Any]) -> float:
    act()
    start = time.perf_counter()
    for _ in range(REPEATS):
        act()
    return (time.perf_counter() - start) / REPEATS


def meet(layout: Layout, lazy: bool) -> list[dict[str, float]]:
    """What each of so many real processes measured."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["benchmarks.memory", "benchmarks.tree_memory", "colossus.parallel.apply"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes, pipes = [], []
    try:
        for rank in range(layout.num_ranks):
            here, there = server.Pipe()
            process = server.Process(target=as_real_rank, args=(there, rank, layout, port, lazy))
            process.start()
            there.close()
            processes.append(process)
            pipes.append(here)
        _answers(pipes)
        for pipe in pipes:
            pipe.send("go")
        found = _answers(pipes)
        for pipe in pipes:
            pipe.send("leave")
        for process in processes:
            process.join(SECONDS)
        return found
    finally:
        for process in processes:
            process.kill()


def _answers(pipes: list[Connection]) -> list[Any]:
    answers: dict[int, Any] = {}
    end = time.monotonic() + SECONDS
    while len(answers) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in answers]
        ready = wait(waiting, max(0.0, end - time.monotonic()))
        assert ready, f"{len(waiting)} ranks did not answer in {SECONDS:g} s"
        for pipe in ready:
            assert isinstance(pipe, Connection)
            answers[pipes.index(pipe)] = pipe.recv()
    return [answers[rank] for rank in range(len(pipes))]


def of_real_ranks(layout: Layout) -> list[Figure]:
    ours, peer = meet(layout, lazy=True), meet(layout, lazy=False)

    def figure(name: str, unit: str, key: str, goal: str | None = None) -> Figure:
        value, theirs = (max(rank[key] for rank in found) for found in (ours, peer))
        return Figure(name, value, unit, goal, theirs, value / theirs)

    return [
        figure(f"{layout.num_ranks} real processes: meshes and groups, slowest", "s", "meet", goal="< 5"),
        figure("  operations of the store, of the rank with most", "operations", "operations"),
        figure("  the first sum over all ranks, which connects them", "s", "first"),
        figure("  a later sum over all ranks", "s", "sum"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one fake world, 16 processes")
    parser.add_argument("--out", help="the receipt")
    arguments = parser.parse_args()
    figures = of_fake_ranks(FAKES[:1] if arguments.quick else FAKES)
    for layout in [QUICK_REAL] if arguments.quick else [QUICK_REAL, REAL]:
        figures += of_real_ranks(layout)
    print_figures(figures)
    write_receipt("world_setup", figures, arguments.out, this_machine().to_dict())


if __name__ == "__main__":
    main()
