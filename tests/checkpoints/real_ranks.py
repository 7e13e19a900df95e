"""What every rank of a real world does in `test_real_ranks`: FSDP2 saves, other layouts load."""

from __future__ import annotations

import io
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from colossus.checkpoints import load, reading
from colossus.checkpoints.format import Key
from colossus.checkpoints.load import newest_whole
from colossus.checkpoints.passing import pass_on
from colossus.checkpoints.save import Saver
from colossus.layout import Layout
from colossus.parallel.placements import replicated
from colossus.parallel.world import World

STEPS = 3


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


def save_and_load(folder: Path) -> None:
    """Runs in each of several ranks."""
    with World.join(Layout(dp_replicate=1, dp_shard=2), "cpu") as world:
        assert world.meshes is not None
        mesh = world.meshes.dense
        model = build()
        fully_shard(model, mesh=mesh["fsdp"])
        saved = state(model, train(model, STEPS))
        with Saver(folder, world) as saver:
            saver.save(STEPS, saved, {"rank": world.rank})
        dist.barrier()

        fresh = build()
        fully_shard(fresh, mesh=mesh["fsdp"])
        zeros = {key: torch.zeros(t.shape, dtype=t.dtype) for key, t in saved.items()}
        layouts = [state(fresh, train(fresh, 1)), zeros]
        for placement in (Shard(0), Replicate()):
            layouts.append(
                {k: distribute_tensor(t, mesh["fsdp"], [placement]) for k, t in zeros.items() if t.ndim}
            )
        for tensors in layouts:
            checkpoint = newest_whole(folder, world)
            assert checkpoint is not None
            assert (checkpoint.step, checkpoint.meta) == (STEPS, {"rank": 0})
            checkpoint.load_into(tensors)
            for key, tensor in tensors.items():
                assert torch.equal(whole(tensor), whole(saved[key])), key


def pass_on_in_replicas(folder: Path) -> tuple[int, bool]:
    """Runs in each of 4 ranks, two replicas of two: saves, loads what it reads once, and looks for damage.

    Returns the bytes that this rank has read of tensors, and whether it agreed that the damaged one is whole.
    """
    read = 0
    real = reading.read_exactly

    def counted(stream: io.FileIO, out: memoryview, begin: int) -> int:
        nonlocal read
        read += len(out)
        return real(stream, out, begin)

    reading.read_exactly = counted  # type: ignore[attr-defined]
    with World.join(Layout(dp_replicate=2, dp_shard=2), "cpu") as world:
        assert world.meshes is not None
        mesh = world.meshes.dense
        model = build()
        fully_shard(model, mesh=mesh["dp_replicate", "fsdp"])
        saved = state(model, train(model, STEPS))
        saved |= {key: replicated(t, mesh) for key, t in saved.items() if key[1] == "buffer"}
        with Saver(folder, world) as saver:
            saver.save(STEPS, saved, {}, asynchronous=False)
        dist.barrier()
        fresh = {key: torch.zeros_like(tensor) for key, tensor in saved.items()}
        for checkpoint in load.candidates(folder, world):
            assert load.load_agreed(checkpoint, lambda c: c.load_into(fresh, share=True), world)
            pass_on(fresh.items())
            break
        for key, tensor in fresh.items():
            assert torch.equal(whole(tensor), whole(saved[key])), key
        if world.rank == 0:
            pieces = folder / "checkpoints" / f"step-{STEPS:08d}" / "pieces-00001.safetensors"
            data = pieces.read_bytes()
            pieces.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        dist.barrier()
        checkpoint = next(iter(load.candidates(folder, world)))
        return read, load.load_agreed(checkpoint, lambda c: c.load_into(fresh, share=True), world)
