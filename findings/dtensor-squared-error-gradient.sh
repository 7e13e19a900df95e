#!/usr/bin/env bash
# PyTorch 2.13.0: F.mse_loss, F.smooth_l1_loss and F.huber_loss of a DTensor that is sharded over its rows give the
# right loss and a gradient that is too large by the number of ranks: the backward pass divides by the elements of
# one rank, not of all. F.l1_loss beside them is right. AdamW hides it; a clipped or plain gradient does not, and
# beside another loss its weight grows with every rank that is added.
#
# Seen: equal shards of 12 rows; 2.000 times the gradient on 2 ranks, 3.000 times on 3, and 1.000 for l1_loss.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat >"$folder/main.py" <<'PYTHON'
import os
import sys
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

assert torch.__version__.split("+")[0] == "2.13.0", torch.__version__
warnings.filterwarnings("ignore")


def rank_main(rank: int, size: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (size,))
    torch.manual_seed(0)
    x, target = torch.randn(12, 4), torch.randn(12, 4)
    for loss in (F.mse_loss, F.smooth_l1_loss, F.huber_loss, F.l1_loss):
        plain = x.clone().requires_grad_()
        expected = loss(plain, target)
        expected.backward()
        sharded = distribute_tensor(x.clone(), mesh, [Shard(0)]).requires_grad_()
        found = loss(sharded, distribute_tensor(target, mesh, [Shard(0)]))
        found.backward()
        value = found.full_tensor()
        ratio = (sharded.grad.full_tensor() / plain.grad).median().item()
        assert torch.allclose(value, expected, atol=1e-6), "the loss itself is right"
        if rank == 0:
            print(f"{loss.__name__}, {size} ranks: loss right, gradient {ratio:.3f} times what one process has")
        wrong = loss is not F.l1_loss
        assert abs(ratio - (size if wrong else 1)) < 1e-3, "this no longer holds"
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    for size in (2, 3):
        mp.spawn(rank_main, (size, f"{sys.argv[1]}/store-{size}"), nprocs=size)
PYTHON
"$folder/env/bin/python" "$folder/main.py" "$folder"
