"""Times collectives between the ranks of one machine: processes of their own, as training has them.

Run as a program it is one rank: `python -m colossus.measure.loopback DEVICE FILE`, with RANK and WORLD_SIZE.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from colossus.hardware.calibration import Timing

KINDS = ("all_gather", "reduce_scatter", "all_reduce")
# of the full tensor
BYTES = {"cpu": (2**14, 2**18, 2**21, 2**24, 2**26), "cuda": (2**16, 2**20, 2**24, 2**28)}
RUNS, REPEATS = 5, 3
TIMEOUT_SECONDS = 120.0


def message_timings(device: str, num_ranks: int) -> list[Timing]:
    """Seconds of each collective over `num_ranks` ranks of this machine; of a processor, with one thread each
    of its cores' share. Empty where there is one, or they could not be started."""
    if num_ranks < 2:
        return []
    with tempfile.TemporaryDirectory(prefix="loopback-") as folder:
        out = Path(folder) / "timings.json"
        command = [sys.executable, "-m", "colossus.measure.loopback", device, str(out)]
        environment = os.environ | {"WORLD_SIZE": str(num_ranks), "STORE": str(Path(folder) / "store")}
        ranks = [
            subprocess.Popen(command, env=environment | {"RANK": str(rank)}, stderr=subprocess.DEVNULL)
            for rank in range(num_ranks)
        ]
        try:
            codes = [rank.wait(TIMEOUT_SECONDS) for rank in ranks]
        except subprocess.TimeoutExpired:
            codes = [1]
        for rank in ranks:
            rank.kill()
        if any(codes) or not out.is_file():
            return []
        rows = json.loads(out.read_text())
    return [Timing(kind, "", "", "", (float(num_ranks), float(size)), max(s, 1e-9)) for kind, size, s in rows]


def main(device: str, out: str) -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    store = FileStore(os.environ["STORE"], size)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT_SECONDS)
    )
    rows = [(kind, full, _seconds(kind, full, size, device)) for kind in KINDS for full in BYTES[device]]
    if rank == 0:
        Path(out).write_text(json.dumps(rows))
    dist.destroy_process_group()


def _seconds(kind: str, full: int, size: int, device: str) -> float:
    """The quickest of a few rows of runs, as the slowest rank sees it."""
    whole = torch.ones(full // 4 // size * size, device=device)
    part = whole.chunk(size)[0].clone()

    def act() -> None:
        if kind == "all_gather":
            dist.all_gather_into_tensor(whole, part)
        elif kind == "reduce_scatter":
            dist.reduce_scatter_tensor(part, whole)
        else:
            dist.all_reduce(whole)

    act()
    best = float("inf")
    for _ in range(REPEATS):
        dist.barrier()
        began = time.perf_counter()
        for _ in range(RUNS):
            act()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - began) / RUNS)
    return best


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
