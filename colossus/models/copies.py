"""Packed copies of a model's matrices, which serve only while they are known to be equal to them.

Weights change in ways that PyTorch does not count: through `.data`, through numpy, by another parameter or
module in the old one's place (merged adapters, averages). So whoever generates asks `refresh` first, which
compares checksums of all that was copied, and lets the copies serve for its own passes alone.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from colossus.models.attention import Attention
from colossus.models.decoder import Decoder
from colossus.models.linear import Embedding, Linear
from colossus.models.mlp import MLP
from colossus.models.packed import Packed, pack

Owners = tuple[Linear | Embedding, ...]


@dataclass(frozen=True)
class _Copy:
    checksum: tuple[int, ...]
    packed: Packed


class Copies:
    """Of all matrices that `owners_of` names, in one type."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._of: dict[Owners, _Copy] = {}

    def __reduce__(self) -> tuple[type[Copies], tuple[torch.dtype]]:
        """A model that was copied or sent makes its own."""
        return Copies, (self.dtype,)

    def refresh(self, model: Decoder) -> None:
        """Makes them equal to the model's matrices as they are now: reads each once, packs what changed."""
        groups = [owners for owners in owners_of(model) if owners[0].weight.device.type == "cpu"]
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            checksums = list(pool.map(_checksum, groups))
        before, self._of = self._of, {}
        for owners, checksum in zip(groups, checksums, strict=True):
            copy = before.pop(owners, None)
            if copy is None or copy.checksum != checksum:
                copy = None  # its memory, before the next is made
                copy = _Copy(checksum, _pack(owners, self.dtype))
            self._of[owners] = copy

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Products take the copies within."""
        try:
            for owners, copy in self._of.items():
                _give(owners, copy.packed)
            yield
        finally:
            for owners in self._of:
                _give(owners, None)


def owners_of(model: Decoder) -> list[Owners]:
    """Matrices that take the same input together, the others by themselves, the output's too."""
    together: list[Owners] = []
    alone: list[Linear | Embedding] = []
    for module in model.modules():
        if isinstance(module, Attention):
            together.append((module.wq, module.wk, module.wv))
        elif isinstance(module, MLP) and module.w_gate is not None:
            together.append((module.w_gate, module.w_up))
        elif isinstance(module, Linear):
            alone.append(module)
    together = [owners for owners in together if all(isinstance(owner, Linear) for owner in owners)]
    if model.head is None and isinstance(model.embedding, Embedding):
        alone.append(model.embedding)
    grouped = {owner for owners in together for owner in owners}
    return together + [(owner,) for owner in alone if owner not in grouped]


def _tensors(owners: Owners) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    return [owner.weight for owner in owners], [getattr(owner, "bias", None) for owner in owners]


def _pack(owners: Owners, dtype: torch.dtype) -> Packed:
    return pack(*_tensors(owners), dtype)


def _give(owners: Owners, packed: Packed | None) -> None:
    if len(owners) > 1:
        assert isinstance(owners[0], Linear)
        owners[0].fused = packed
    else:
        owners[0].packed = packed


def _checksum(owners: Owners) -> tuple[int, ...]:
    """Of every byte of their matrices and biases."""
    weights, biases = _tensors(owners)
    tensors = [*weights, *(bias for bias in biases if bias is not None)]
    flat = (tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in tensors)
    return tuple(zlib.crc32(bytes_N.numpy().data) for bytes_N in flat)
