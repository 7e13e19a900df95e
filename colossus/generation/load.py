"""Opens what was trained: a run, or one of its checkpoints."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from colossus.architecture import Architecture
from colossus.checkpoints.find import latest
from colossus.checkpoints.format import checkpoints_folder, is_committed
from colossus.checkpoints.load import open_checkpoint
from colossus.checkpoints.weights import Weights
from colossus.data.tokenizer import Tokenizer, load_tokenizer
from colossus.errors import UserError
from colossus.generation.ready import generation_type, make_ready
from colossus.models import Decoder
from colossus.models.hf.published import open_published


def load_model(
    path: str | Path, dtype: torch.dtype | None = torch.float32, device: str | torch.device = "cpu"
) -> tuple[Decoder, Tokenizer]:
    """The model and the tokenizer of a run (its newest whole checkpoint), a checkpoint or a Hugging Face one.

    dtype: of the matrix products, and of the matrices; fp32 are the weights as they were trained. None: what
        is quickest for generation here (see `generation.ready`).

    Raises:
        UserError: there is no run or checkpoint at `path`, or nothing was saved yet.
        MachineError: what is there is damaged.
    """
    weights = open_weights(path)
    with torch.device("meta"):
        model = Decoder(weights.arch)
    model.to_empty(device=device)
    weights.load_into(model)
    make_ready(model, dtype or generation_type(torch.device(device)))
    return model.eval(), load_tokenizer(weights.tokenizer)


def open_weights(path: str | Path) -> Weights:
    """What `load_model` loads, opened. Raises as it does."""
    path = Path(path)
    if is_published(path):
        opened = open_published(path)
        return Weights(path, opened.arch, path, opened.tensors)
    checkpoint_folder, run_folder = find_checkpoint(path)
    checkpoint = open_checkpoint(checkpoint_folder)
    arch = Architecture.model_validate(checkpoint.meta["architecture"])
    return Weights(path, arch, run_folder / "tokenizer", checkpoint)


def is_published(path: Path) -> bool:
    """Whether `path` is a Hugging Face folder."""
    names = ("config.json", "tensor00000_000")  # the second of Grok-1, which has no configuration
    if not any(os.path.isfile(path / name) for name in names):  # noqa: PTH113  # False too for impossible ones
        return False
    return not (is_committed(path) or (path / "job.toml").is_file() or checkpoints_folder(path).is_dir())


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """(checkpoint, run) for a run's folder or a checkpoint's. Raises UserError where it is neither."""
    if not os.path.isdir(path):  # noqa: PTH112  # Path.is_dir raises for a name that no folder can have
        siblings = [str(p) for p in path.parent.iterdir()] if os.path.isdir(path.parent) else []  # noqa: PTH112
        raise UserError.field(
            "path",
            str(path),
            "no such folder; a run, a checkpoint or a Hugging Face folder is expected",
            siblings,
        )
    if is_committed(path):
        return path, path.resolve().parent.parent  # `step-00000100` alone says nothing of its run
    if checkpoints_folder(path).is_dir() or (path / "job.toml").is_file():
        newest = latest(path)
        if newest is None:
            raise UserError(f"{path}: this run has saved no checkpoint yet")
        return newest, path
    raise UserError(
        f"{path}: neither a run (it has no job.toml), nor a whole checkpoint (no COMMITTED), nor a Hugging "
        "Face folder (no config.json)"
    )
