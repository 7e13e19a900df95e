#!/usr/bin/env bash
# PyTorch 2.13.0: redistributing a DTensor of a new shape keeps its mesh for ever. The memory of plans is keyed by a
# weak reference to the mesh, but each plan that it holds has the mesh itself; so the groups of the mesh outlive
# destroy_process_group() and the last reference that the program has, with their threads and sockets. A process
# that initialises, trains another model and destroys, again and again (tests, notebooks, elastic restarts in
# place), has more of them each time. torch.distributed.tensor.debug's clearing of what it remembers does not reach the plans; the private
# _redistribute.clear_redistribute_planner_cache() does.
#
# Seen, threads of gloo after each of three rounds that ended with destroy_process_group(): 1, 2, 3 (without the
# one redistribution: 0, 0, 0); after the memory of plans was cleared: 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat >"$folder/main.py" <<'PYTHON'
import gc
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import Replicate, Shard, _redistribute, debug, distribute_tensor, init_device_mesh

assert torch.__version__.split("+")[0] == "2.13.0", torch.__version__
warnings.filterwarnings("ignore")


def threads_of_gloo() -> int:
    gc.collect()
    return sum((t / "comm").read_text().startswith("gloo_tcp_loop") for t in Path("/proc/self/task").iterdir())


def one_round(rank: int, size: int, store: str, redistributes: bool, length: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (size,))
    sharded = distribute_tensor(torch.ones(length), mesh, [Shard(0)])
    if redistributes:
        assert sharded.redistribute(mesh, [Replicate()]).to_local().sum() == length
    dist.barrier()
    dist.destroy_process_group()


def rank_main(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    for redistributes in (False, True):
        seen = []
        for number in range(3):
            one_round(rank, size, f"{folder}/store-{redistributes}-{number}", redistributes, 8 + 2 * number)
            debug._clear_sharding_prop_cache()
            seen.append(threads_of_gloo())
        if rank == 0:
            print(f"redistributes={redistributes}: threads of gloo after each round {seen}")
        assert (seen[0] < seen[1] < seen[2]) if redistributes else not any(seen), seen
    _redistribute.clear_redistribute_planner_cache()
    _redistribute._gen_transform_infos.cache_clear()
    left = threads_of_gloo()
    if rank == 0:
        print(f"the plans forgotten: {left}")
    assert left == 0


if __name__ == "__main__":
    mp.spawn(rank_main, (2, sys.argv[1]), nprocs=2)
PYTHON
"$folder/env/bin/python" "$folder/main.py" "$folder"
