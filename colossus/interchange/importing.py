"""A Hugging Face folder as a run with one checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from colossus.architecture import parameter_table
from colossus.checkpoints.format import Key, write_synced
from colossus.checkpoints.stream import save_streamed
from colossus.data.account import KEPT, as_kept
from colossus.data.json_tokenizer import JsonTokenizer
from colossus.interchange.files import Say, made_whole, open_tokenizer, read_kept
from colossus.models import Decoder
from colossus.models.hf.published import Opened, open_published, warn
from colossus.models.hf.tensors import InMemory, Readable


def import_model(path: str | Path, out: str | Path | None = None, say: Say = warn) -> Path:
    """Makes of a Hugging Face folder what `load_model` and `export_model` open; returns its folder.

    Weights keep their type; float8 and MXFP4 become bf16. They pass through bands of bounded size.

    Args:
        out: a new folder; `runs/<name of path>` where it is left out.
        say: is told in a line what is left out or remarkable.

    Raises:
        UserError: `path` is no folder of a known family, or what it holds does not belong together; or
            `out` is not free.
        MachineError: a file is damaged, or the storage failed; nothing is left of what was written.
    """
    path = Path(path)
    opened = open_published(path, say)
    tokenizer = open_tokenizer(path, opened.arch, say)
    out = Path(out) if out is not None else Path("runs") / path.resolve().name
    with made_whole(out) as folder:
        (folder / "tokenizer").mkdir()
        for name, data in read_kept(path).items():
            (folder / "tokenizer" / name).parent.mkdir(exist_ok=True)
            write_synced(folder / "tokenizer" / name, data)
        if isinstance(tokenizer, JsonTokenizer):  # what config.json says of texts, which does not lie there
            write_synced(folder / "tokenizer" / KEPT, as_kept(tokenizer.account).encode())
        meta = {
            "step": 0,
            "optimizer_steps": 0,
            "architecture": opened.arch.model_dump(exclude_none=True),
            "published_config": opened.config,
        }
        save_streamed(folder, 0, _keyed(opened), meta)
    return out


def _keyed(opened: Opened) -> dict[Key, Readable]:
    """What is saved: published weights and buffers, and buffers of training, at 0."""
    trainable = {parameter.name: parameter.trainable for parameter in parameter_table(opened.arch)}
    found: dict[Key, Readable] = {
        (name, "weight" if trainable[name] else "buffer"): tensor for name, tensor in opened.tensors.items()
    }
    with torch.device("meta"):
        model = Decoder(opened.arch)
    for name, buffer in model.named_buffers():
        if name not in opened.tensors:
            found[name, "buffer"] = InMemory.of(name, torch.zeros(buffer.shape, dtype=torch.float32))
    return found
