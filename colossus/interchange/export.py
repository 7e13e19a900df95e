"""A model of ours as a folder that `transformers` loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from colossus.architecture import Architecture, Parameter, parameter_table
from colossus.checkpoints.load import open_checkpoint
from colossus.checkpoints.stream import CheckpointTensor
from colossus.checkpoints.weights import architecture_of
from colossus.errors import UserError
from colossus.generation.load import find_checkpoint, is_published
from colossus.interchange.files import Say, as_json, files_of, ids_of, open_tokenizer
from colossus.models.hf.published import fitting_family, open_published, publish, warn
from colossus.models.hf.tensors import Box, Readable
from colossus.models.hf.writing import write_checkpoint
from colossus.untrusted import check_folder

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export_model(path: str | Path, out: str | Path, type: str | None = None, say: Say = warn) -> Path:
    """Writes `config.json`, weights in shards, the tokenizer's files and `generation_config.json`.

    Args:
        path: a run (its newest whole checkpoint), a checkpoint, or a Hugging Face folder.
        out: a new folder.
        type: of the weights: "fp32" or "bf16"; as they are stored where it is left out.
        say: is told in a line what is remarkable.

    Raises:
        UserError: there is no model at `path`; no published family has what it has; `out` is not free.
        MachineError: the storage failed, or what is there is damaged; nothing is left of what was written.
    """
    if type is not None and type not in TYPES:
        raise UserError.field("type", type, f"one of {', '.join(TYPES)}", TYPES)
    arch, tensors, kept, folder = _opened(Path(path), say)
    family = fitting_family(arch)
    if family.name != arch.family:
        say(f"{path}: exported as {family.name}, which has this model's parts; {arch.family} has not")
    table = {parameter.name: parameter for parameter in parameter_table(arch)}
    if type is not None:
        tensors = {name: _in_type(tensors[name], table[name], TYPES[type]) for name in tensors}
    tokenizer = open_tokenizer(folder, arch, say)
    ids = ids_of(tokenizer) if tokenizer is not None else {}
    config, published = publish(arch, family, tensors, kept if kept is not None else ids)
    files = files_of(folder, tokenizer, config)
    write_checkpoint(out, published, {"config.json": as_json(config)} | files)
    return Path(out)


def _opened(path: Path, say: Say) -> tuple[Architecture, dict[str, Readable], Mapping[str, Any] | None, Path]:
    """(model, its tensors by our names, the config.json it was imported with, the tokenizer's folder)."""
    if is_published(path):
        opened = open_published(path, say)
        return opened.arch, opened.tensors, opened.config, path
    checkpoint_folder, run_folder = find_checkpoint(path)
    checkpoint = open_checkpoint(checkpoint_folder)
    arch = architecture_of(checkpoint)
    tensors: dict[str, Readable] = {
        parameter.name: CheckpointTensor.of(
            checkpoint, parameter.name, "weight" if parameter.trainable else "buffer"
        )
        for parameter in parameter_table(arch)
    }
    return (
        arch,
        tensors,
        checkpoint.meta.get("published_config"),
        check_folder(run_folder / "tokenizer", run_folder),
    )


@dataclass(frozen=True, slots=True)
class _InType(Readable):
    """The same values, rounded to another type."""

    source: Readable

    def fill(self, out: torch.Tensor, box: Box) -> None:
        if out.dtype == self.dtype:
            self.source.fill(out, box)
        else:  # rounded to this type first
            out.copy_(self.read([slice(r.start, r.stop, r.step) for r in box]))


def _in_type(tensor: Readable, parameter: Parameter, dtype: torch.dtype) -> Readable:
    """Buffers stay as they are: published models keep the bias of choice in fp32."""
    return _InType(tensor.name, tensor.shape, dtype, tensor) if parameter.trainable else tensor
