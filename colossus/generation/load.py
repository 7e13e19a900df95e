"""Opens what was trained: a run, or one of its checkpoints."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from colossus.architecture import Architecture
from colossus.checkpoints.find import latest
from colossus.checkpoints.format import checkpoints_folder, is_committed
from colossus.checkpoints.load import open_checkpoint
from colossus.data.tokenizer import Tokenizer, load_tokenizer
from colossus.errors import UserError
from colossus.generation.ready import generation_type, make_ready
from colossus.models import Decoder


def load_model(
    path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[Decoder, Tokenizer]:
    """The model and the tokenizer of a run (its newest whole checkpoint) or of one checkpoint.

    dtype: of the matrix products, and of the matrices; fp32 are the weights as they were trained. None: what
        is quickest for generation here (see `generation.ready`).

    Raises:
        UserError: there is no run or checkpoint at `path`, or nothing was saved yet.
        MachineError: what is there is damaged.
    """
    checkpoint_folder, run_folder = find_checkpoint(Path(path))
    checkpoint = open_checkpoint(checkpoint_folder)
    arch = Architecture.model_validate(checkpoint.meta["architecture"])
    with torch.device("meta"):
        model = Decoder(arch)
    model.to_empty(device=device)
    weights = {(name, "weight"): tensor.detach() for name, tensor in model.named_parameters()}
    kept = model.state_dict()
    buffers = {(name, "buffer"): tensor for name, tensor in model.named_buffers() if name in kept}
    checkpoint.load_into(weights | buffers)
    make_ready(model, dtype or generation_type(torch.device(device)))
    return model.eval(), load_tokenizer(run_folder / "tokenizer")


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """(checkpoint, run) for a run's folder or a checkpoint's. Raises UserError where it is neither."""
    if not os.path.isdir(path):  # noqa: PTH112  # Path.is_dir raises for a name that no folder can have
        siblings = [str(p) for p in path.parent.iterdir()] if os.path.isdir(path.parent) else []  # noqa: PTH112
        raise UserError.field(
            "path", str(path), "no such folder; a run or a checkpoint is expected", siblings
        )
    if is_committed(path):
        return path, path.resolve().parent.parent  # `step-00000100` alone says nothing of its run
    if checkpoints_folder(path).is_dir() or (path / "job.toml").is_file():
        newest = latest(path)
        if newest is None:
            raise UserError(f"{path}: this run has saved no checkpoint yet")
        return newest, path
    if (path / "config.json").is_file():
        raise UserError(f"{path}: a Hugging Face folder; loading these is not available yet")
    raise UserError(f"{path}: neither a run (it has no job.toml) nor a whole checkpoint (no COMMITTED)")
