"""Small states to save, and checkpoints written as several ranks would."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch

from colossus.checkpoints.announce import announce
from colossus.checkpoints.commit import collected, commit
from colossus.checkpoints.format import (
    COMMITTED,
    MANIFEST,
    Entry,
    Key,
    checkpoints_folder,
    committed_line,
)
from colossus.checkpoints.shards import Shard
from colossus.checkpoints.write import write_shards
from colossus.cuts import Cut, box_at
from colossus.models.hf.header import DTYPES


def state(seed: int = 0) -> dict[Key, torch.Tensor]:
    """A tensor of every type, a scalar, empty ones, a transposed one, one of several chunks."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[Key, torch.Tensor] = {}
    for dtype, name in DTYPES.items():
        bits = torch.randint(0, 256, (3, 5, 8), dtype=torch.uint8, generator=generator)
        tensors[f"of.{name}", "buffer"] = bits % 2 == 0 if dtype == torch.bool else bits.view(dtype)
    tensors["layers.0.weight", "weight"] = torch.randn(33, 65, generator=generator)
    tensors["layers.0.weight", "exp_avg"] = torch.randn(33, 65, generator=generator)
    tensors["large", "weight"] = torch.randn(1025, 1025, generator=generator)  # two chunks
    tensors["scalar", "buffer"] = torch.tensor(float(seed))
    tensors["empty", "buffer"] = torch.zeros(0)
    tensors["empty.rows", "buffer"] = torch.zeros(4, 0, 3, dtype=torch.int64)
    tensors["transposed", "weight"] = torch.randn(7, 9, generator=generator).T
    return tensors


def zeros_like(tensors: dict[Key, torch.Tensor]) -> dict[Key, torch.Tensor]:
    return {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}


def equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Bit for bit, NaNs included."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    if not left.numel():
        return True
    bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (left, right)]
    return torch.equal(*bits)


def save_parts(
    run_folder: Path, step: int, ranks: list[list[Shard]], meta: dict[str, Any] | None = None, serial: int = 1
) -> Path:
    """Writes and commits a checkpoint of which each rank writes the given shards."""
    folder = checkpoints_folder(run_folder) / f"step-{step:08d}"
    folder.mkdir(parents=True)
    for rank, shards in enumerate(ranks):
        announce(folder, rank, write_shards(folder, shards, rank))
    commit(folder, collected(folder, "", len(ranks), (step, serial, meta or {}), 0.0, lambda seconds: None))
    return folder


def parts_of(tensor: torch.Tensor, cuts: tuple[Cut, ...], num: int) -> list[list[Shard]]:
    """What each of `num` ranks writes of a tensor `w` that is cut so."""
    entry = Entry("w", "weight", DTYPES[tensor.dtype], tuple(tensor.shape), 0, cuts)
    found: list[list[Shard]] = [[] for _ in range(num)]
    for places in itertools.product(*(range(cut.parts) for cut in cuts)):
        box = box_at(entry.shape, cuts, places)
        assert box is not None
        values = tensor[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))]
        found[entry.writer(places)].append(Shard(entry, box[0], values))
    return found


def sign(path: Path, manifest: bytes, serial: int = 1) -> None:
    """Commits a checkpoint whose manifest a test has written."""
    (path / MANIFEST).write_bytes(manifest)
    (path / COMMITTED).write_text(committed_line(serial, manifest))


def tree_of(path: Path) -> dict[str, Any]:
    """The manifest as JSON has it."""
    tree: dict[str, Any] = json.loads((path / MANIFEST).read_bytes())
    return tree
