"""Plain bytes as tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from colossus.data.account import BOS, EOS
from colossus.data.bpe import ours
from colossus.data.chat_template import ChatFormat
from colossus.data.json_tokenizer import JsonTokenizer
from colossus.data.quick import byte_characters


class BytesTokenizer:
    """A token a byte, and the two that begin and end a document."""

    bos_id, eos_id, vocab_size, fingerprint = 256, 257, 258, "bytes"
    begins, begin_id, prefix_id = (256,), 256, 256
    ends, byte_ids = frozenset({257}), frozenset[int]()

    def __init__(self, chats: ChatFormat | None = None) -> None:
        self.chats = chats

    @property
    def special_tokens(self) -> dict[str, int]:
        return {BOS: self.bos_id, EOS: self.eos_id}

    @property
    def added_tokens(self) -> dict[str, int]:
        return self.special_tokens

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_rendered(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        return [self._encode_rendered(text) for text in texts]

    def _encode_rendered(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        ids: list[np.ndarray] = []
        offsets: list[np.ndarray] = []
        at = 0
        for piece in re.split("(" + "|".join(map(re.escape, self.special_tokens)) + ")", text):
            if piece in self.special_tokens:
                ids.append(np.array([self.special_tokens[piece]]))
                offsets.append(np.array([[at, at + len(piece)]]))
            else:
                data = np.frombuffer(piece.encode(), np.uint8)
                character = at + np.cumsum((data & 0xC0) != 0x80) - 1  # that a byte is of
                ids.append(data)
                offsets.append(np.stack([character, character + 1], 1))
            at += len(piece)
        return np.concatenate(ids).astype(np.uint32), np.concatenate(offsets).astype(np.int64)

    def encode_named(self, text: str, names: Mapping[str, int]) -> list[int]:
        parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
        return [i for part in parts for i in ([names[part]] if part in names else part.encode())]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "bytes.json").write_text(json.dumps({"tokenizer": "bytes", "vocab_size": self.vocab_size}))
        if self.chats is not None:
            self.chats.save(folder)

    def as_json(self) -> JsonTokenizer:
        """The same ids by a byte-level BPE without merges, which other tools read."""
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers

        vocabulary = {character: byte for byte, character in byte_characters().items()}
        tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([BOS, EOS])
        return ours(tokenizer, self.bos_id, self.eos_id)
