"""Text to token ids and back. Every tokenizer is kept as a `tokenizer.json` that other tools read too,
but for plain bytes, which need none."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from colossus.data.chat_template import ChatFormat, chat_format
from colossus.errors import UserError

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

BOS, EOS = "<|bos|>", "<|eos|>"
# The split of GPT-2 (Radford et al. 2019), which `tokenizers` calls ByteLevel.
GPT2_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


class Tokenizer(Protocol):
    """bos_id begins every document, eos_id ends it; neither comes out of `encode`.

    chats: how it renders chats; None where it does not say.
    """

    bos_id: int
    eos_id: int
    chats: ChatFormat | None

    @property
    def vocab_size(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str) -> list[int]: ...

    @property
    def special_tokens(self) -> dict[str, int]: ...

    def encode_rendered(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each text, whose special tokens are spelled: ids, uint32 [N], and the first character of each
        token and the one behind its last, int64 [N, 2]."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def save(self, folder: Path) -> None: ...


class BytesTokenizer:
    """A token a byte, and the two that begin and end a document."""

    bos_id, eos_id, vocab_size, fingerprint = 256, 257, 258, "bytes"

    def __init__(self, chats: ChatFormat | None = None) -> None:
        self.chats = chats

    @property
    def special_tokens(self) -> dict[str, int]:
        return {BOS: self.bos_id, EOS: self.eos_id}

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

        vocabulary = {character: byte for byte, character in _byte_characters().items()}
        tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([BOS, EOS])
        return JsonTokenizer(tokenizer.to_str(), self.bos_id, self.eos_id)


class JsonTokenizer:
    """Any `tokenizer.json`. Encodes by tiktoken where that gives the same ids (see `quick`)."""

    def __init__(self, text: str, bos_id: int, eos_id: int, chats: ChatFormat | None = None) -> None:
        self._text, self.bos_id, self.eos_id, self.chats = text, bos_id, eos_id, chats
        self._quick: tiktoken.Encoding | None = None

    @cached_property
    def _tokenizer(self) -> tokenizers.Tokenizer:
        tokenizer = self._read()
        tokenizer.encode_special_tokens = True  # a text that spells one is text, not the end of a document
        return tokenizer

    @cached_property
    def _of_rendered(self) -> tokenizers.Tokenizer:
        """Of texts in which special tokens are spelled."""
        tokenizer = self._read()
        tokenizer.encode_special_tokens = False
        return tokenizer

    def _read(self) -> tokenizers.Tokenizer:
        import tokenizers

        try:
            tokenizer = tokenizers.Tokenizer.from_str(self._text)
        except Exception as error:  # it raises no narrower type
            raise UserError(f"data.tokenizer: not a tokenizer.json that can be used ({error})") from None
        tokenizer.no_truncation()  # some are published with the settings of somebody's batches
        tokenizer.no_padding()
        return tokenizer

    @cached_property
    def vocab_size(self) -> int:
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self._text.encode()).hexdigest()[:16]

    @property
    def special_tokens(self) -> dict[str, int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: index for index, token in added.items() if token.special}

    def encode_rendered(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        encoded = self._of_rendered.encode_batch(list(texts), add_special_tokens=False)
        return [(np.array(e.ids, np.uint32), np.array(e.offsets, np.int64).reshape(-1, 2)) for e in encoded]

    def encode(self, text: str) -> list[int]:
        return self.encode_many([text])[0].tolist()

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, uint32; the library's own batch encoding where tiktoken does not agree."""
        if self._quick is not None:
            return [self._encode_quickly(self._quick, text) for text in texts]
        return self._encode_by_library(texts)

    def _encode_quickly(self, quick: tiktoken.Encoding, text: str) -> np.ndarray:
        try:
            return quick.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # its pattern gives up on very long runs of blanks
            return self._encode_by_library([text])[0]

    def _encode_by_library(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(e.ids, np.uint32) for e in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(
            [i for i in ids if i not in (self.bos_id, self.eos_id)], skip_special_tokens=False
        )

    def name(self, token: int) -> str:
        return str(self._tokenizer.id_to_token(token))

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.files().items():
            (folder / name).write_text(text, encoding="utf-8")
        if self.chats is not None:
            self.chats.save(folder)

    def files(self) -> dict[str, str]:
        """The files that other tools read it from, by name, but for the chat template."""
        tokens = {"bos_token": self.name(self.bos_id), "eos_token": self.name(self.eos_id)}
        if self.chats is not None:  # a template may rely on one that is not configured
            tokens = dict(self.chats.variables)
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | tokens
        return {"tokenizer.json": self._text, "tokenizer_config.json": json.dumps(config, indent=1)}

    def quicken(self, sample: Iterable[str]) -> bool:
        """Encodes by tiktoken from now on where its ids are equal on every text of `sample`.

        It is 3 to 5 times as fast. Whether it agrees is found out, never assumed.
        """
        quick, texts = self._as_tiktoken(), list(sample)
        if quick is not None:
            expected = self._encode_by_library(texts)
            found = (self._encode_quickly(quick, text) for text in texts)
            if not all(map(np.array_equal, found, expected)):
                quick = None
        self._quick = quick
        return quick is not None

    def _as_tiktoken(self) -> tiktoken.Encoding | None:
        """The same merges for tiktoken, where the tokenizer is a byte-level BPE with GPT-2's split."""
        import tiktoken

        state = json.loads(self._text)
        split = state.get("pre_tokenizer") or {}
        plain = (
            state["model"].get("type") == "BPE"  # which old files leave out
            and not state.get("normalizer")
            and not state["model"].get("dropout")
            and all(token["special"] for token in state["added_tokens"])
        )
        if (
            not plain
            or split.get("type") != "ByteLevel"
            or split.get("add_prefix_space")
            or not split.get("use_regex", True)
        ):
            return None
        special = {token["content"] for token in state["added_tokens"]}
        byte_of = {character: byte for byte, character in _byte_characters().items()}
        try:
            ranks = {
                bytes(byte_of[c] for c in token): rank
                for token, rank in state["model"]["vocab"].items()
                if token not in special
            }
        except KeyError:
            return None
        if not all(bytes([byte]) in ranks for byte in range(256)):
            return None
        return tiktoken.Encoding("same-merges", pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens={})


def train_bpe(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """A byte-level BPE with GPT-2's split, trained on `texts`; deterministic.

    Raises:
        UserError: fewer tokens than the 256 bytes and the two special ones.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < 258:
        raise UserError(f"model.vocab_size={vocab_size}: a byte-level tokenizer needs at least 258")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    tokenizer.train_from_iterator(texts, trainer)
    special = tokenizer.get_added_tokens_decoder()
    ids = {token.content: index for index, token in special.items()}
    return JsonTokenizer(tokenizer.to_str(), ids[BOS], ids[EOS])


def load_tokenizer(path: str | Path) -> JsonTokenizer | BytesTokenizer:
    """A tokenizer from its file, or from a folder that holds `tokenizer.json` (or that of plain bytes).

    Raises:
        UserError: there is none, or it says of no token that it begins or ends a document.
    """
    path = Path(path)
    if os.path.isdir(path):  # noqa: PTH112  # Path.is_dir raises for a name that no folder can have
        if (path / "bytes.json").is_file():
            return BytesTokenizer(chat_format(path, {}, BOS, EOS))
        path = path / "tokenizer.json"
    try:
        text = path.read_text(encoding="utf-8")
        state = json.loads(text)
        special = {token["content"]: token["id"] for token in state["added_tokens"]}
        vocabulary = dict(state.get("model") or {}).get("vocab")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.tokenizer={path}: cannot be read ({error}); bpe, bytes or a tokenizer.json"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"data.tokenizer={path}: not a tokenizer.json") from None
    config = _config(path.parent / "tokenizer_config.json")
    special |= _configured_tokens(config, vocabulary)
    bos, eos = _document_tokens(config, special)
    if eos is None:
        raise UserError(
            f"data.tokenizer={path}: none of its special tokens {sorted(special)} is known to end a "
            "document; name eos_token (and bos_token) in tokenizer_config.json beside it"
        )
    bos = eos if bos is None else bos
    return JsonTokenizer(text, special[bos], special[eos], chat_format(path.parent, config, bos, eos))


def _document_tokens(config: dict[str, Any], special: dict[str, int]) -> tuple[str | None, str | None]:
    """The names of the tokens that begin and end a document: as configured, else the usual ones."""

    def named(key: str, usual: tuple[str, ...]) -> str | None:
        asked = config.get(key)
        asked = asked.get("content") if isinstance(asked, dict) else asked
        names = (asked, *usual) if isinstance(asked, str) else usual
        return next((name for name in names if name in special), None)

    bos = named("bos_token", (BOS, "<s>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]"))
    eos = named("eos_token", (EOS, "</s>", "<|end_of_text|>", "<|endoftext|>", "<|eot_id|>", "[EOS]"))
    return bos, eos


def _configured_tokens(config: dict[str, Any], vocabulary: Any) -> dict[str, int]:
    """Ids of tokens that tokenizer_config.json names and that are plain ones of the vocabulary."""
    asked = [config.get(key) for key in ("bos_token", "eos_token")]
    names = [token.get("content") if isinstance(token, dict) else token for token in asked]
    plain = vocabulary if isinstance(vocabulary, dict) else {}
    return {name: plain[name] for name in names if isinstance(name, str) and name in plain}


def _config(path: Path) -> dict[str, Any]:
    """What a tokenizer_config.json holds; nothing where there is none."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"data.tokenizer: {path}: cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"data.tokenizer: {path}: not a tokenizer_config.json")
    return config


def _byte_characters() -> dict[int, str]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
