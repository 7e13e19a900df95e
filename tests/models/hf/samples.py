"""Small published checkpoints, and the bits of tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from colossus.models.hf.header import DTYPES


def random(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Any bits, NaNs among them."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    return bits[..., 0] % 2 == 0 if dtype == torch.bool else bits.view(dtype).view(shape)


def of_every_type() -> dict[str, torch.Tensor]:
    """A tensor of each type with odd sizes, a scalar, empty ones, one of several bands."""
    tensors = {f"of.{name}": random((3, 5, 7), dtype) for dtype, name in DTYPES.items()}
    tensors["scalar"] = torch.tensor(2.5)
    tensors["empty"] = torch.zeros(0)
    tensors["empty.rows"] = torch.zeros(4, 0, 3, dtype=torch.int64)
    tensors["large"] = random((1025, 1025), torch.float64)
    return tensors


def bits(values: torch.Tensor) -> torch.Tensor:
    flat = values.clone(memory_format=torch.contiguous_format).reshape(-1)
    return flat.view(torch.uint8) if flat.numel() else torch.zeros(0)


def equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Bit for bit, NaNs included."""
    return (left.dtype, left.shape) == (right.dtype, right.shape) and torch.equal(bits(left), bits(right))


def publish(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> Path:
    """A checkpoint of one file, written by the safetensors library."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


def publish_sharded(folder: Path, shards: list[dict[str, torch.Tensor]]) -> Path:
    folder.mkdir(parents=True)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
