"""Tensors that are never whole in memory: into a checkpoint, and out of one, band by band."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from colossus.checkpoints.announce import announce
from colossus.checkpoints.commit import collected, commit
from colossus.checkpoints.format import Entry, Key, checkpoints_folder, folder_name, sync_folder
from colossus.checkpoints.load import Checkpoint
from colossus.checkpoints.write import write_shards
from colossus.models.hf.header import DTYPES, TYPES
from colossus.models.hf.tensors import Box, Readable, bands, bytes_of, sizes_of, within

SPAN_BYTES = 4 << 20  # of a checkpoint at once: what its checksums are for


def save_streamed(
    run_folder: str | Path, step: int, tensors: Mapping[Key, Readable], meta: dict[str, Any]
) -> Path:
    """Writes the first checkpoint of a run that has none; returns its folder.

    Raises:
        OSError: the storage failed. MachineError: a tensor could not be read. What was written is left.
    """
    folder = checkpoints_folder(run_folder) / folder_name(step)
    folder.mkdir(parents=True)
    sync_folder(folder.parent)
    shards = [_Stream(Entry(*key, DTYPES[t.dtype], tuple(t.shape)), t) for key, t in tensors.items()]
    index = write_shards(folder, shards, 0)
    announce(folder, 0, index)
    commit(folder, collected(folder, index.save, 1, (step, 1, meta), 0.0, lambda seconds: None))
    return folder


@dataclass(frozen=True)
class _Stream:
    """A whole tensor as `write_shards` takes it."""

    entry: Entry
    tensor: Readable

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def num_bytes(self) -> int:
        return self.tensor.num_bytes

    def parts(self) -> Iterator[memoryview]:
        for band in bands(self.tensor.shape, self.tensor.dtype.itemsize):
            yield bytes_of(self.tensor.read(band))


@dataclass(frozen=True, slots=True)
class CheckpointTensor(Readable):
    """A tensor of a checkpoint; whatever is read of it is compared with its checksums."""

    checkpoint: Checkpoint
    kind: str

    @classmethod
    def of(cls, checkpoint: Checkpoint, name: str, kind: str = "weight") -> CheckpointTensor:
        """Raises UserError where there is no such tensor."""
        shape = checkpoint.shape(name, kind)
        dtype = TYPES[checkpoint.manifest.tensors[name, kind].dtype]
        return cls(name, shape, dtype, checkpoint, kind)

    def fill(self, out: torch.Tensor, box: Box) -> None:
        for band in bands(sizes_of(box), self.dtype.itemsize, SPAN_BYTES):
            here = within(box, band)
            spans = [slice(r.start, r[-1] + 1) for r in here]
            values = self.checkpoint.read(self.name, self.kind, spans)
            out[tuple(band)].copy_(values[tuple(slice(None, None, r.step) for r in here)])
