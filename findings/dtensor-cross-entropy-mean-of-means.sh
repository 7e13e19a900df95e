#!/usr/bin/env bash
# PyTorch 2.13.0: F.cross_entropy of a DTensor that is sharded over its rows takes the mean of the ranks' means.
# Where targets are ignored, or classes have weights, ranks have unequal denominators: the loss that is told is
# another than one process has, and nan as soon as one rank has ignored targets alone, although others have
# targets. The gradient is that of the right loss, so training goes on while its curve is wrong.
#
# Seen: 2.3181 on two ranks in place of 1.8168; nan in place of a loss where one rank has padding alone.
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
import torch.nn.functional as F
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

assert torch.__version__.split("+")[0] == "2.13.0", torch.__version__
warnings.filterwarnings("ignore")


def rank_main(rank: int, size: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (size,))
    torch.manual_seed(0)
    logits = torch.randn(8, 4)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    cases = {
        "no target ignored": (torch.tensor([0, 1, 2, 3, 0, 0, 0, 1]), None),
        "more targets ignored on rank 1": (torch.tensor([0, 1, 2, -100, -100, -100, -100, 3]), None),
        "class weights": (torch.tensor([0, 1, 2, 3, 0, 0, 0, 1]), weights),
        "a rank of ignored targets alone": (torch.tensor([0, 1, 2, 3, -100, -100, -100, -100]), None),
    }
    for name, (targets, weight) in cases.items():
        expected = F.cross_entropy(logits, targets, weight)
        found = F.cross_entropy(
            distribute_tensor(logits, mesh, [Shard(0)]),
            distribute_tensor(targets, mesh, [Shard(0)]),
            None if weight is None else distribute_tensor(weight, mesh, [Replicate()]),
        ).full_tensor()
        if rank == 0:
            print(f"{name}: {found.item():.4f} on two ranks, {expected.item():.4f} in one process")
        same = torch.allclose(found, expected, atol=1e-5)
        assert same == (name == "no target ignored"), "this no longer holds"
        assert found.isnan() == (name == "a rank of ignored targets alone"), "this no longer holds"
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(rank_main, (2, f"{sys.argv[1]}/store"), nprocs=2)
PYTHON
"$folder/env/bin/python" "$folder/main.py" "$folder"
