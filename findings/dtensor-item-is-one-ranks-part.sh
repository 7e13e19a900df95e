#!/usr/bin/env bash
# PyTorch 2.13.0: .item() and float() of a DTensor that waits for its sum give this rank's part, without an error
# and without a collective, so that ranks see different numbers; so do bool() of `any` and the mean and the largest
# of a sharded tensor. .tolist() of the same tensor is refused. A loss that is logged by .item(), or a
# branch on it, is another one on every rank.
#
# Seen: the sum of 0 to 7 over two ranks is 6.0 on one and 22.0 on the other; full_tensor() gives 28.0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat >"$folder/main.py" <<'PYTHON'
import sys
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

assert torch.__version__.split("+")[0] == "2.13.0", torch.__version__
warnings.filterwarnings("ignore")


def rank_main(rank: int, size: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (size,))
    sharded = distribute_tensor(torch.arange(8.0), mesh, [Shard(0)])
    total = sharded.sum()
    seen = torch.tensor([total.item(), float(total), sharded.mean().item(), sharded.max().item(), bool((sharded > 6).any())])
    full = torch.tensor([total.full_tensor().item()])
    everyone = [torch.zeros_like(seen) for _ in range(size)]
    dist.all_gather(everyone, seen)
    if rank == 0:
        for other, values in enumerate(everyone):
            print(f"rank {other}: item, float, mean, max, any = {values.tolist()}; full_tensor {full.item()}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(rank_main, (2, f"{sys.argv[1]}/store"), nprocs=2)
PYTHON
"$folder/env/bin/python" "$folder/main.py" "$folder"
