"""What to do with a model that is not in a folder as `transformers` writes it, in words."""

from __future__ import annotations

import os
import re
from pathlib import Path

from colossus.errors import UserError, nearest

HUB = re.compile(r"(?:hf:|(?:https?:/+)?(?:huggingface\.co|hf\.co)/)?([\w-][\w.-]*/[\w-][\w.-]*)/?")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def no_folder(path: Path, expected: str) -> UserError:
    """Of a path that is no folder. expected: what should have been there."""
    if os.path.isfile(path):  # noqa: PTH113 - False too for a name that no file can have
        return UserError.field("path", str(path), f"a file; {expected} is expected{remedy(path)}")
    if os.path.islink(path):  # noqa: PTH114
        return UserError.field("path", str(path), f"a link that leads nowhere; {expected} is expected")
    siblings = folders_beside(path)
    hint = remedy(path) if nearest(str(path), siblings) is None else ""
    return UserError.field("path", str(path), f"no such folder; {expected} is expected{hint}", siblings)


def folders_beside(path: Path) -> list[str]:
    beside = path.parent.iterdir() if os.path.isdir(path.parent) else ()  # noqa: PTH112
    return [str(other) for other in beside if other.is_dir()]


def remedy(path: Path) -> str:
    """What to do with a file, or with a name that is nothing here but may be one on a hub."""
    if os.path.isfile(path):  # noqa: PTH113
        if path.suffix.lower() == ".gguf":
            return other_form(path.parent, [path])
        if path.suffix.lower() in PICKLES:
            return "; it is a pickle, which could run code: have it converted"
        if path.name.startswith(("config", "model", "tokenizer")) or path.suffix == ".safetensors":
            return f": name {path.parent}, where it lies"
    elif on_hub := HUB.fullmatch(str(path)):
        name, folder = on_hub[1], on_hub[1].rpartition("/")[2]
        return (
            "; nothing is downloaded here. If it is a name on the hub of Hugging Face: "
            f"hf download {name} --local-dir {folder}, then name {folder}"
        )
    return ""


def other_form(folder: Path, files: list[Path] | None = None) -> str:
    """What to do with the files of a folder (all of it, where none are named) that are in another form."""
    files = sorted(folder.iterdir()) if files is None else files
    gguf = next((file.name for file in files if file.suffix.lower() == ".gguf"), None)
    if gguf is not None:
        return (
            f"; {gguf} is GGUF, of which `transformers` makes a folder (pip install transformers accelerate "
            "gguf): in Python, for AutoModelForCausalLM with quantization_config=GgufConfig(dequantize=True) "
            "and for AutoTokenizer without, "
            f".from_pretrained({str(folder)!r}, gguf_file={gguf!r}).save_pretrained('NEW'), then name NEW"
        )
    if any(folder.glob("pytorch_model*.bin")):
        return "; its pytorch_model.bin is a pickle, which could run code: have it converted"
    return ""
