"""The weights of a model, wherever they lie: in a checkpoint, or in published files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import nn

from colossus.architecture import Architecture
from colossus.checkpoints.load import Checkpoint
from colossus.checkpoints.shards import shard_of
from colossus.errors import UserError
from colossus.models.hf.tensors import Readable
from colossus.models.init import kept_buffers, logical_name


@dataclass(frozen=True)
class Weights:
    """A model that can be loaded. tokenizer: the folder of its tokenizer."""

    path: Path
    arch: Architecture
    tokenizer: Path
    source: Checkpoint | Mapping[str, Readable]

    def check(self, model: nn.Module) -> None:
        """Raises UserError where a parameter is missing or of another shape; reads and allocates nothing."""
        for name, parameter in model.named_parameters():
            name, shape = logical_name(name), tuple(parameter.shape)
            if isinstance(self.source, Checkpoint):
                there = self.source.shape(name)
            elif name in self.source:
                there = self.source[name].shape
            else:
                continue  # left to `load_into`
            if there != shape:
                raise UserError(f"{self.path}: {name} is {there}, not {shape}")

    def load_into(self, model: nn.Module) -> None:
        """Fills a model, whole or sharded. Buffers of training that were not kept become 0.

        Raises:
            UserError: a tensor is missing, or of another shape. MachineError: what is there is damaged.
        """
        parameters = {logical_name(name): p for name, p in model.named_parameters()}
        buffers = kept_buffers(model)
        if isinstance(self.source, Checkpoint):
            there = set(self.source.names("buffer"))
            found = {(name, "buffer"): b for name, b in buffers.items() if (name, "buffer") in there}
            self.source.load_into({(name, "weight"): p for name, p in parameters.items()} | found)
        else:
            there = {(name, "buffer") for name in self.source}
            for name, tensor in (parameters | buffers).items():
                if name in self.source:
                    _read(self.path, self.source[name], tensor)
        for name, buffer in buffers.items():
            if (name, "buffer") not in there:
                buffer.zero_()


def architecture_of(checkpoint: Checkpoint) -> Architecture:
    """What model a checkpoint is of.

    Raises:
        UserError: it does not say, or holds less than a model of so many layers has.
    """
    try:
        arch = Architecture.model_validate(checkpoint.meta.get("architecture"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("architecture", *first["loc"])))
        raise UserError(
            f"{checkpoint.path}: its manifest describes no model ({where}: {first['msg']})"
        ) from None
    if arch.num_layers > len(checkpoint.manifest.tensors):
        raise UserError(
            f"{checkpoint.path}: holds too few tensors for the {arch.num_layers} layers of its model"
        )
    return arch


def _read(path: Path, source: Readable, tensor: torch.Tensor) -> None:
    """Fills a tensor, or this rank's part of it."""
    shard = shard_of((source.name, "weight"), tensor)
    if source.shape != shard.entry.shape:
        raise UserError(f"{path}: {source.name} is {source.shape}, not {shard.entry.shape}")
    ends = [begin + size for begin, size in zip(shard.offset, shard.values.shape, strict=True)]
    with torch.no_grad():
        source.read_into(shard.values, [slice(a, b) for a, b in zip(shard.offset, ends, strict=True)])
