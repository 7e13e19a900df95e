"""Text to token ids and back. Every tokenizer is kept as a `tokenizer.json` that other tools read too,
but for plain bytes, which need none."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from colossus.data.account import BOS, EOS, TOKENIZER, read_account
from colossus.data.bytes_tokenizer import BytesTokenizer
from colossus.data.chat_template import ChatFormat, chat_format
from colossus.data.json_tokenizer import JsonTokenizer


class Tokenizer(Protocol):
    """Text to ids and back, and what begins and ends a text.

    bos_id, eos_id: the tokens that are named to begin a text and to end a document; neither comes out of
        `encode`.
    begins: what stands in front of every text, here and where it was trained; often nothing.
    begin_id: what a document's first token follows: the last of `begins`, or else the token that ends the
        document before.
    prefix_id: what the standard harness puts before a text that has nothing before it.
    ends: all tokens that end a text or a turn.
    byte_ids: tokens that are one byte each, and text only in a whole run of them.
    chats: how it renders chats; None where it does not say.
    """

    chats: ChatFormat | None

    @property
    def bos_id(self) -> int: ...

    @property
    def eos_id(self) -> int: ...

    @property
    def begins(self) -> tuple[int, ...]: ...

    @property
    def begin_id(self) -> int: ...

    @property
    def prefix_id(self) -> int: ...

    @property
    def ends(self) -> frozenset[int]: ...

    @property
    def byte_ids(self) -> frozenset[int]: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str) -> list[int]: ...

    @property
    def special_tokens(self) -> dict[str, int]: ...

    @property
    def added_tokens(self) -> dict[str, int]:
        """Those that are looked for in texts before anything else; most are special."""
        ...

    def encode_rendered(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each text, whose special tokens are spelled: ids, uint32 [N], and the first character of each
        token and the one behind its last, int64 [N, 2]."""
        ...

    def encode_named(self, text: str, names: Mapping[str, int]) -> list[int]:
        """Ids of a text in which tokens go by other names, and whatever else spells one of them, or a special
        one, is text."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def save(self, folder: Path) -> None: ...


def load_tokenizer(path: str | Path, partly: bool = False) -> JsonTokenizer | BytesTokenizer:
    """A tokenizer from its file, or from a folder that holds `tokenizer.json` (or that of plain bytes).

    partly: also one of which no token is known to end a document.

    Raises:
        UserError: there is none, or it says of no token that it ends a document.
    """
    path = Path(path)
    if os.path.isdir(path):  # noqa: PTH112  # Path.is_dir raises for a name that no folder can have
        if (path / "bytes.json").is_file():
            return BytesTokenizer(chat_format(path, {}, BOS, EOS))
        account = read_account(path / TOKENIZER, path)
    else:  # named by the user, as a link perhaps
        account = read_account(path, Path(os.path.realpath(path)).parent)
    tokenizer = JsonTokenizer.of(account)
    if not partly:
        _ = tokenizer.eos_id  # which raises
    return tokenizer
