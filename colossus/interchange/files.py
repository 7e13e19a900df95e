"""The files that lie beside the weights of a published checkpoint: tokenizer, chat template, settings."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from colossus.architecture import Architecture
from colossus.data.chat_template import TOOLS_FILE
from colossus.data.tokenizer import BytesTokenizer, JsonTokenizer, Tokenizer, load_tokenizer
from colossus.errors import MachineError, UserError
from colossus.untrusted import MIB, parse_json, read_file

GENERATION = "generation_config.json"
KEPT = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "tiktoken.model"),
    *("chat_template.jinja", TOOLS_FILE, "chat_template.json", GENERATION),
)
"""What is kept byte for byte at import, and given back at export."""
MAX_BYTES = 512 * MIB  # of one of them; the longest tokenizer.json that is known has 35

Say = Callable[[str], None]


def read_kept(folder: Path) -> dict[str, bytes]:
    """The files of a folder that are kept, by name. Raises MachineError."""
    try:
        return {
            name: read_file(folder / name, MAX_BYTES, folder) for name in KEPT if (folder / name).is_file()
        }
    except OSError as error:
        raise MachineError(f"{error.filename}: {error.strerror}") from error


def check_vocabulary(folder: Path, arch: Architecture, say: Say) -> None:
    """Compares the tokenizer of a folder with a model; says where the model has more tokens.

    Raises UserError where the tokenizer makes ids that the model has not.
    """
    if not (folder / "tokenizer.json").is_file() and not (folder / "bytes.json").is_file():
        say(f"{folder} has no tokenizer.json: what is made of it has no tokenizer")
        return
    num = load_tokenizer(folder, partly=True).vocab_size
    if num > arch.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {num} tokens, more than the {arch.vocab_size} of the model "
            f"(vocab_size); they do not belong together"
        )
    if num < arch.vocab_size:
        more = arch.vocab_size - num
        say(f"{folder}: the model has {arch.vocab_size} tokens, {more} more than the tokenizer")


def files_of(tokenizer_folder: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """(files to lie beside exported weights, ids of tokens for `config.json`) of a run's tokenizer.

    They are as they were, but that others put in front of a text and end it with what is put there and ends
    it here.
    """
    files = read_kept(tokenizer_folder)
    is_bytes = (tokenizer_folder / "bytes.json").is_file()
    if not is_bytes and "tokenizer.json" not in files:
        return files, {}
    tokenizer = load_tokenizer(tokenizer_folder, partly=True)
    ids = ids_of(tokenizer)
    # Plain bytes become a byte-level BPE without merges.
    theirs = tokenizer.as_json() if isinstance(tokenizer, BytesTokenizer) else tokenizer
    files |= {name: text.encode() for name, text in theirs.files().items()}
    settings = parse_json(files[GENERATION]) if GENERATION in files else {}
    if GENERATION not in files or not theirs.said_ends <= {*_list(settings.get("eos_token_id"))}:
        files[GENERATION] = as_json(settings | ids)
    return files, ids


def ids_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokens that begin, end and fill up texts, as a `config.json` names them: those that are known."""
    account = tokenizer.account if isinstance(tokenizer, JsonTokenizer) else None
    bos = tokenizer.bos_id if account is None else account.bos_id
    ends = sorted(tokenizer.ends, key=lambda end: (account is not None and end != account.eos_id, end))
    ids = {
        "bos_token_id": bos,
        "eos_token_id": (ends if len(ends) > 1 else ends[0]) if ends else None,
        "pad_token_id": account.pad_id if account is not None else None,
    }
    return {name: index for name, index in ids.items() if index is not None}


def _list(ids: Any) -> list[Any]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def as_json(tree: dict[str, Any]) -> bytes:
    return (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode()


@contextlib.contextmanager
def made_whole(path: Path) -> Iterator[Path]:
    """A folder to write into, which takes the name `path` when the block ends; nothing is left of it else.

    Raises:
        UserError: `path` exists and is not an empty folder. MachineError: the storage failed.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} exists and is not an empty folder: name a new one")
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        partial.rename(path)
    except OSError as error:
        raise MachineError(f"cannot write {path}: {error.strerror}; nothing is left of it") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
