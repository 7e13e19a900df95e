"""The files that lie beside the weights of a published checkpoint: tokenizer, chat template, settings."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from colossus.architecture import Architecture
from colossus.checkpoints.format import sync_folder
from colossus.data.account import CONFIG, MAP, TOKENIZER
from colossus.data.bytes_tokenizer import BytesTokenizer
from colossus.data.chat_template import TOOLS_FILE
from colossus.data.json_tokenizer import JsonTokenizer
from colossus.data.named_class import AS_IT_STANDS, names_in, reads_alike
from colossus.data.tokenizer import Tokenizer, load_tokenizer
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


def open_tokenizer(folder: Path, arch: Architecture, say: Say) -> JsonTokenizer | BytesTokenizer | None:
    """The tokenizer of a folder, compared with a model; says where they have not the same tokens, and where
    there is none.

    Raises UserError where the tokenizer makes ids that the model has not.
    """
    if not (folder / "tokenizer.json").is_file() and not (folder / "bytes.json").is_file():
        say(f"{folder} has no tokenizer.json: what is made of it has no tokenizer")
        return None
    tokenizer = load_tokenizer(folder, partly=True)
    num = tokenizer.vocab_size
    if num > arch.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {num} tokens, more than the {arch.vocab_size} of the model "
            f"(vocab_size); they do not belong together"
        )
    if num < arch.vocab_size:
        more = arch.vocab_size - num
        say(f"{folder}: the model has {arch.vocab_size} tokens, {more} more than the tokenizer")
    for name in tokenizer.account.left_out if isinstance(tokenizer, JsonTokenizer) else ():
        say(f"{folder}: {name}, which is only named, is none of the {arch.vocab_size} tokens: left out")
    return tokenizer


def files_of(
    folder: Path, tokenizer: JsonTokenizer | BytesTokenizer | None, model: Mapping[str, Any]
) -> dict[str, bytes]:
    """The files to lie beside exported weights and their config.json, `model`, of the tokenizer in `folder`.

    They are as they were, but that others read texts, put in front of them and end them as is done here.
    """
    files = read_kept(folder)
    if tokenizer is None:
        return files
    # Plain bytes become a byte-level BPE without merges.
    theirs = tokenizer.as_json() if isinstance(tokenizer, BytesTokenizer) else tokenizer
    files |= {name: text.encode() for name, text in _read_alike(theirs, model).items()}
    settings = parse_json(files[GENERATION]) if GENERATION in files else {}
    if GENERATION not in files or not theirs.said_ends <= {*_list(settings.get("eos_token_id"))}:
        files[GENERATION] = as_json(settings | ids_of(tokenizer))
    return files


def _read_alike(tokenizer: JsonTokenizer, model: Mapping[str, Any]) -> dict[str, str]:
    """The files of a tokenizer. Where others would read them otherwise than it was trained with here, they
    name the class that reads tokenizer.json as it stands."""
    files = tokenizer.files()
    config = json.loads(files[CONFIG])
    older = json.loads(files[MAP]) if MAP in files and "added_tokens_decoder" not in config else {}
    is_published = tokenizer.account.begins is None  # and was not trained here
    if is_published or reads_alike(tokenizer.account.text, files[TOKENIZER], {**config, **older}, model):
        return files
    own = {key: name for key, name in names_in(config).items() if name in tokenizer.added_tokens}
    changed = {key: value for key, value in config.items() if key != "auto_map"}
    changed |= {key: name for key, name in own.items() if key not in {**config, **older}}
    changed["tokenizer_class"] = AS_IT_STANDS
    return files | {TOKENIZER: tokenizer.whole(), CONFIG: as_json(changed).decode()}


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
    """A folder to write into, which takes the name `path` when the block ends, and keeps it after a power
    cut; nothing is left of it else.

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
        sync_folder(partial)
        partial.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        raise MachineError(f"cannot write {path}: {error.strerror}; nothing is left of it") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
