"""What every rank of a real world does in `test_real_ranks`: FSDP2 saves, other layouts load.

RANK=r WORLD_SIZE=n MASTER_ADDR=... MASTER_PORT=... python -m tests.checkpoints.real_ranks FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from colossus.checkpoints.format import Key
from colossus.checkpoints.load import newest_whole
from colossus.checkpoints.save import Saver

STEPS = 3


class Ranks:
    """The process group, as checkpoints want it."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def broadcast(self, value: Any) -> Any:
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5, bias=False), nn.BatchNorm1d(5), nn.Linear(5, 3))  # 5 rows on 2 ranks


def state(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[Key, torch.Tensor]:
    tensors: dict[Key, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[name, "weight"] = parameter
        if optimizer is not None:
            for kind in ("exp_avg", "exp_avg_sq"):
                tensors[name, kind] = optimizer.state[parameter][kind]
    return tensors | {(name, "buffer"): buffer for name, buffer in model.named_buffers()}


def train(model: nn.Module, steps: int) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(steps):
        model(torch.randn(4, 7, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def run_rank(folder: Path) -> None:
    """Runs inside an initialised process group."""
    ranks = Ranks()
    mesh = init_device_mesh("cpu", (ranks.size,))
    model = build()
    fully_shard(model, mesh=mesh)
    saved = state(model, train(model, STEPS))
    with Saver(folder, ranks) as saver:
        saver.save(STEPS, saved, {"rank": ranks.rank})
    dist.barrier()

    fresh = build()
    fully_shard(fresh, mesh=mesh)
    zeros = {key: torch.zeros(t.shape, dtype=t.dtype) for key, t in saved.items()}
    layouts = [state(fresh, train(fresh, 1)), zeros]
    for placement in (Shard(0), Replicate()):
        layouts.append({k: distribute_tensor(t, mesh, [placement]) for k, t in zeros.items() if t.ndim})
    for tensors in layouts:
        checkpoint = newest_whole(folder, ranks)
        assert checkpoint is not None
        assert (checkpoint.step, checkpoint.meta) == (STEPS, {"rank": 0})
        checkpoint.load_into(tensors)
        for key, tensor in tensors.items():
            assert torch.equal(whole(tensor), whole(saved[key])), key


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    run_rank(Path(sys.argv[1]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
