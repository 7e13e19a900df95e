"""What a dry run of large worlds costs: seconds and memory of a rank, and seconds of all kinds of ranks.

A rank's seconds are from after the imports until its step is known (of many micro batches, of two shorter
ones), on one core; its bytes are the most that its process had resident. The whole is
`colossus.dry_run`, with the planner's search where the layout is open, on as many cores as there are.

    python -m benchmarks.dryrun_speed [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path

import torch

import colossus
from colossus.dryrun.rank import trace
from colossus.dryrun.ranks import DryRun, rows_of
from colossus.job import Job, load_job
from colossus.measure.machine import this_machine
from colossus.perf.receipts import Figure, print_figures, write_receipt

OF_405B = ["model=llama3.1-405b", "layout.tp=8", "layout.pp=16", "layout.micro_batch=1"]
WORLDS = {
    "405B on 16,384": [*OF_405B, "layout.dp_shard=128", "layout.recompute=full", "layout.schedule=1f1b",
                       "layout.stages_per_rank=1", "run.global_batch=2048", "fleet.accelerator=h100-sxm",
                       "fleet.count=16384"],
    "405B on 131,072": [*OF_405B, "layout.dp_shard=128", "layout.dp_replicate=8", "layout.recompute=full",
                        "layout.schedule=1f1b", "layout.stages_per_rank=1", "run.global_batch=16384",
                        "fleet.accelerator=h100-sxm", "fleet.count=131072"],
    "405B on 200,000 mixed": ["model=llama3.1-405b", "fleet=colossus-200k"],
    "DeepSeek-V3, ep=64": ["model=deepseek-v3", "fleet=deepseek-2k", "layout.ep=64", "layout.pp=16",
                           "layout.tp=1", "layout.cp=1", "layout.micro_batch=1", "run.global_batch=15360"],
}  # fmt: skip


QUICK = ["model=llama3.2-1b", "fleet=dgx-h100-1", "layout.pp=2", "layout.tp=2", "run.global_batch=16"]


def alone(found: DryRun) -> tuple[float, int]:
    """(seconds, the most bytes that are resident) of the slowest kind, in a process of its own."""
    slowest = max(found.ranks, key=lambda judged: judged.traced.seconds)
    seq_len = max(length for _, _, length in found.job.shapes())
    steps = [(found.job, slowest.kind.rank, rows, seq_len) for rows in rows_of(found.job, slowest.kind)]
    # Not a child of this one, whose memory Linux would count too.
    with get_context("forkserver").Pool(1) as processes:
        return processes.apply(_traced, (steps,))


def _traced(steps: Sequence[tuple[Job, int, int, int]]) -> tuple[float, int]:
    torch.set_num_threads(1)
    seconds = sum(trace(*step).seconds for step in steps)
    status = Path("/proc/self/status").read_text()
    return seconds, int(
        next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    ) << 10


def of_world(name: str, words: Sequence[str]) -> list[Figure]:
    began = time.perf_counter()
    found = colossus.dry_run(load_job(None, words))
    seconds = time.perf_counter() - began
    each = [judged.traced.seconds for judged in found.ranks]
    print(f"{name}: {found.job.layout.num_ranks:,} ranks, {len(each)} kinds, fits: {found.fits}", flush=True)
    slowest, most = alone(found)
    return [
        Figure(f"{name}: the slowest of {len(each)} kinds of ranks, alone", slowest, "s", "<= 5"),
        Figure(f"{name}: its resident memory", most / 1e6, "MB", "<= 500"),
        Figure(f"{name}: the mean of them, as many at once as there are cores", sum(each) / len(each), "s"),
        Figure(f"{name}: all of them", seconds, "s", "<= 120"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one small world")
    parser.add_argument("--out", help="the receipt")
    arguments = parser.parse_args()
    worlds = {"1B on 8": QUICK} if arguments.quick else WORLDS
    figures = [figure for name, words in worlds.items() for figure in of_world(name, words)]
    print_figures(figures)
    write_receipt("dryrun_speed", figures, arguments.out, this_machine().to_dict())


if __name__ == "__main__":
    main()
