"""What a layout costs on this machine: tokens/s of ranks of one thread against one process of two threads.

A model of 12M parameters takes whole steps on the same global batch of 8 sequences of 512 tokens, in the type
that is quickest here: FSDP2, tensor and pipeline parallelism over two ranks, and HSDP over four (which share
two cores). All are built once, and take steps in turns with the one process, so that a busy machine is so for
both; figures are medians over the turns.

    python -m benchmarks.overhead [--quick] [--out FILE] [--turns N] [--compile]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.ranks import Ranks
from colossus.architecture import Architecture, num_parameters
from colossus.data.loader import Batch
from colossus.job import Job
from colossus.layout import Layout
from colossus.measure.machine import this_machine
from colossus.parallel.world import World
from colossus.perf.receipts import Figure, print_figures, write_receipt
from colossus.sections import Data, Optimizer, Precision, RunSection
from colossus.trainer.state import TrainState
from colossus.trainer.step import train_step

BATCH = 8
STEPS = 2  # of a turn
LAYOUTS: dict[str, dict[str, Any]] = {
    "FSDP2 over 2 ranks": {"dp_shard": 2, "micro_batch": 4, "zero": 1},
    "tensor parallel over 2 ranks": {"tp": 2, "micro_batch": 8},
    "pipeline (1F1B) over 2 ranks": {"pp": 2, "micro_batch": 1, "zero": 1},
    "HSDP over 2 x 2 ranks": {"dp_replicate": 2, "dp_shard": 2, "micro_batch": 2, "zero": 1},
}
GOAL = "> 0.95"


def job_of(quick: bool, kind: str, compiled: bool, layout: dict[str, Any]) -> Job:
    width, layers, seq_len = (64, 2, 64) if quick else (384, 6, 512)
    arch = Architecture(
        vocab_size=512 if quick else 4096,
        hidden_size=width,
        num_layers=layers,
        num_heads=width // 32,
        num_kv_heads=width // 32,
        head_dim=32,
        intermediate_size=8 * width // 3 // 16 * 16,
        max_seq_len=seq_len,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        tie_embeddings=True,
        qk_norm=False,
        base_width=width,
        initializer_range=0.02,
    )
    optimizer = Optimizer(
        name="adamw", lr=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8, grad_clip=1.0, z_loss=0.0
    )
    return Job(
        model=arch,
        data=Data(seq_len=seq_len),
        optimizer=optimizer,
        layout=Layout(**layout, compile=compiled).filled(),
        precision=Precision(type=kind),
        run=RunSection(seed=0, global_batch=BATCH),
    )


@contextlib.contextmanager
def rank(job: Job, threads: int) -> Iterator[Callable[[int], tuple[float, float]]]:
    """In a process: gives what takes so many steps; (seconds, loss of the last) is its answer."""
    torch.set_num_threads(threads)
    with World.join(job.layout, "cpu") as world:
        state = TrainState.build(job, world)
        batch = _batch(job, world)

        def act(steps: int) -> tuple[float, float]:
            world.sum([0.0])  # all begin together
            began = time.perf_counter()
            for _ in range(steps):
                result = train_step(state, batch, BATCH * job.data.seq_len, 1.0, job, world)
            assert result.loss is not None
            return time.perf_counter() - began, result.loss

        yield act


def _batch(job: Job, world: World) -> Batch:
    """This rank's rows of one batch that is taken again and again."""
    ids = torch.randint(
        job.model.vocab_size, (BATCH, job.data.seq_len + 1), generator=torch.Generator().manual_seed(0)
    )
    mine = ids.chunk(world.data.size)[world.data.rank]
    return Batch(
        0,
        0,
        mine[:, :-1].contiguous(),
        mine[:, 1:].contiguous(),
        None,
        mine[:, 1:].numel(),
        ids[:, 1:].numel(),
    )


def measure(quick: bool, turns: int, compiled: bool) -> list[Figure]:
    kind = this_machine().best.type
    alone_job = job_of(quick, kind, compiled, {"micro_batch": BATCH})
    figures = [Figure("parameters", num_parameters(alone_job.model), "parameters")]
    tokens = STEPS * BATCH * alone_job.data.seq_len
    with Ranks(1, rank, alone_job, 2) as alone:
        for name, layout in LAYOUTS.items():
            job = job_of(quick, kind, compiled, layout)
            with Ranks(job.layout.num_ranks, rank, job, 1) as ranks:
                alone.all(STEPS), ranks.all(STEPS)  # the first compiles, and finds its memory
                pairs = [
                    tuple(max(seconds for seconds, _ in group.all(STEPS)) for group in (ranks, alone))
                    for _ in range(turns)
                ]
            ours, theirs = (tokens / statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(there / here for here, there in pairs)
            goal = GOAL if name.startswith("FSDP2") else None
            figures.append(Figure(name, ours, f"tokens/s, {kind}", None, theirs, ratio))
            figures.append(Figure(f"{name}: of one process of 2 threads", ratio, "of its tokens/s", goal))
            print_figures(figures[-2:])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a small model, few turns")
    parser.add_argument("--out", help="the receipt")
    parser.add_argument("--turns", type=int, help="of each layout; by default 15, quick 3")
    parser.add_argument("--compile", action="store_true", help="layer by layer")
    arguments = parser.parse_args()
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as the command line sets it
    turns = arguments.turns or (3 if arguments.quick else 15)
    figures = measure(arguments.quick, turns, arguments.compile)
    print()
    print_figures(figures)
    write_receipt("overhead", figures, arguments.out, this_machine().to_dict())


if __name__ == "__main__":
    main()
