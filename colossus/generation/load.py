"""Opens what was trained: a run, or one of its checkpoints."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from colossus.checkpoints.find import latest
from colossus.checkpoints.format import checkpoints_folder, is_committed
from colossus.checkpoints.load import open_checkpoint
from colossus.checkpoints.weights import Weights, architecture_of
from colossus.data.tokenizer import Tokenizer, load_tokenizer
from colossus.errors import UserError
from colossus.generation.ready import generation_type, make_ready
from colossus.measure.machine import memory_bytes
from colossus.models import Decoder
from colossus.models.hf.elsewhere import no_folder, other_form
from colossus.models.hf.published import open_published
from colossus.untrusted import check_folder
from colossus.words import size


def load_model(
    path: str | Path, dtype: torch.dtype | None = torch.float32, device: str | torch.device | None = "cpu"
) -> tuple[Decoder, Tokenizer | None]:
    """The model and the tokenizer of a run (its newest whole checkpoint), a checkpoint or a Hugging Face one.

    The tokenizer is None where a folder has weights alone. One of which no token is known to end a text never
    ends one.

    dtype: of the matrix products, and of the matrices; fp32 are the weights as they were trained. None: what
        is quickest for generation here (see `generation.ready`).
    device: None: a GPU that has room for it, else the processor.

    Raises:
        UserError: there is no run or checkpoint at `path`, nothing was saved yet, or there is no such device.
        MachineError: what is there is damaged.
    """
    weights = open_weights(path)
    with torch.device("meta"):
        model = Decoder(weights.arch)
    place = _roomy(model) if device is None else _device(device)
    weights.check(model)
    _check_memory(path, model, place)
    model.to_empty(device=place)
    weights.load_into(model)
    make_ready(model, dtype or generation_type(place))
    return model.eval(), tokenizer_in(weights.tokenizer)


def tokenizer_in(folder: Path) -> Tokenizer | None:
    """The tokenizer that lies in a folder, as far as it is known; None where there is none."""
    names = ("tokenizer.json", "bytes.json")
    is_there = any(os.path.lexists(folder / name) for name in names)
    return load_tokenizer(folder, partly=True) if is_there else None


def _check_memory(path: str | Path, model: Decoder, place: torch.device) -> None:
    needed = sum(parameter.nbytes for parameter in model.parameters())
    if place.type == "cpu" and needed > memory_bytes():
        raise UserError(f"{path}: its weights take {size(needed)}; this machine has {size(memory_bytes())}")


def _roomy(model: Decoder) -> torch.device:
    """The GPU where there is one with room for the weights and as much again, else the processor."""
    needed = 2 * sum(parameter.nbytes for parameter in model.parameters())
    if not torch.cuda.is_available():
        return torch.device("cpu")
    free, _ = torch.cuda.mem_get_info()
    if needed <= free:
        return torch.device("cuda")
    logging.getLogger(__name__).warning(
        f"on the CPU: the model wants {size(needed)} of the GPU's memory, {size(free)} of it is free"
    )
    return torch.device("cpu")


def _device(name: str | torch.device) -> torch.device:
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    known = ["cpu", *(["cuda", *gpus] if gpus else [])]
    if str(name) not in known:
        raise UserError.field("device", str(name), f"this machine has {', '.join(known)}", known)
    return torch.device(name)


def open_weights(path: str | Path) -> Weights:
    """What `load_model` loads, opened. Raises as it does."""
    path = Path(path)
    if is_published(path):
        opened = open_published(path)
        return Weights(path, opened.arch, path, opened.tensors)
    checkpoint_folder, run_folder = find_checkpoint(path)
    checkpoint = open_checkpoint(checkpoint_folder)
    tokenizer = check_folder(run_folder / "tokenizer", run_folder)
    return Weights(path, architecture_of(checkpoint), tokenizer, checkpoint)


def tokenizer_folder(path: Path) -> Path:
    """Where the tokenizer of what `load_model` loads lies. Raises as it does."""
    return path if is_published(path) else find_checkpoint(path)[1] / "tokenizer"


def is_published(path: Path) -> bool:
    """Whether `path` is a Hugging Face folder."""
    names = ("config.json", "tensor00000_000")  # the second of Grok-1, which has no configuration
    if not any(os.path.isfile(path / name) for name in names):  # noqa: PTH113  # False too for impossible ones
        return False
    return not (is_committed(path) or (path / "job.toml").is_file() or checkpoints_folder(path).is_dir())


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """(checkpoint, run) for a run's folder or a checkpoint's. Raises UserError where it is neither."""
    if not os.path.isdir(path):  # noqa: PTH112  # Path.is_dir raises for a name that no folder can have
        raise no_folder(path, "a run, a checkpoint or a Hugging Face folder")
    if is_committed(path):
        return path, path.resolve().parent.parent  # `step-00000100` alone says nothing of its run
    if checkpoints_folder(path).is_dir() or (path / "job.toml").is_file():
        newest = latest(path)
        if newest is None:
            raise UserError(f"{path}: this run has saved no checkpoint yet")
        return newest, path
    raise UserError(
        f"{path}: neither a run (it has no job.toml), nor a whole checkpoint (no COMMITTED), nor a Hugging "
        f"Face folder (no config.json){other_form(path)}"
    )
