"""Any `tokenizer.json`, read by `tokenizers`, and by tiktoken where that gives the same ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from colossus.data.account import CONFIG, KEPT, MAP, TOKENIZER, Account, as_kept
from colossus.data.chat_template import ChatFormat, end_of_turn, named_tokens
from colossus.data.named_class import names_in
from colossus.data.quick import as_tiktoken
from colossus.errors import UserError

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

FALLBACK = tuple(f"<0x{byte:02X}>" for byte in range(256))  # tokens of bytes that no other token holds
# Normalizers for which a part is what it is in its place, but for marks that join a letter across its ends.
IN_PLACE = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents")


class JsonTokenizer:
    """Any `tokenizer.json`. Encodes by tiktoken where that gives the same ids (see `quicken`).

    account: what its files say of it.
    """

    def __init__(
        self,
        text: str,
        bos_id: int | None,
        eos_id: int | None,
        chats: ChatFormat | None = None,
        account: Account | None = None,
    ) -> None:
        """account: what else is known; the other arguments count for what they say."""
        told = Account(text) if account is None else account
        self.account = replace(told, text=text, bos_id=bos_id, eos_id=eos_id, chats=chats)
        self._text, self.chats = text, chats
        self._quick: tiktoken.Encoding | None = None

    @classmethod
    def of(cls, account: Account) -> JsonTokenizer:
        return cls(account.text, account.bos_id, account.eos_id, account.chats, account)

    @cached_property
    def _tokenizer(self) -> tokenizers.Tokenizer:
        tokenizer = self._read()
        tokenizer.encode_special_tokens = True  # a text that spells one is text, not the end of a document
        return tokenizer

    @cached_property
    def _of_texts(self) -> tokenizers.Tokenizer:
        return self._in_letters() if self._state["model"].get("type") == "Unigram" else self._tokenizer

    def _in_letters(self, also: Collection[str] = ()) -> tokenizers.Tokenizer:
        """Encodes texts. To Unigram special tokens are pieces as all others, which it would choose where a
        text spells one: here they have names that no text has.

        also: further added tokens that are letters.
        """
        names = {*self.special_tokens, *also}
        added = [token | {"special": token["content"] in names} for token in self._state["added_tokens"]]
        state = self._state | {"added_tokens": added}
        if state["model"].get("type") == "Unigram":
            vocabulary = [
                [f"\ufdd0{piece}\ufdd0" if piece in names else piece, score]
                for piece, score in state["model"]["vocab"]
            ]
            state = state | {"model": state["model"] | {"vocab": vocabulary}}
        tokenizer = self._read(json.dumps(state))
        tokenizer.encode_special_tokens = True
        return tokenizer

    @cached_property
    def _of_rendered(self) -> tokenizers.Tokenizer:
        """Of texts in which special tokens are spelled."""
        tokenizer = self._read()
        tokenizer.encode_special_tokens = False
        return tokenizer

    def _read(self, text: str | None = None) -> tokenizers.Tokenizer:
        import tokenizers

        try:
            tokenizer = tokenizers.Tokenizer.from_str(self._text if text is None else text)
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
    def earlier_fingerprint(self) -> str:
        """That of tokenizer.json alone, without the tokens that other files add to it."""
        return hashlib.sha256(self.account.files.get(TOKENIZER, self._text).encode()).hexdigest()[:16]

    @property
    def special_tokens(self) -> dict[str, int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: index for index, token in added.items() if token.special}

    @property
    def added_tokens(self) -> dict[str, int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: index for index, token in added.items()}

    @property
    def eos_id(self) -> int:
        """Raises `UserError` where none is known."""
        if self.account.eos_id is None:
            raise UserError(
                f"data.tokenizer: none of its special tokens {sorted(self.special_tokens)} is known to end a "
                "document; name eos_token (and bos_token) in tokenizer_config.json beside it"
            )
        return self.account.eos_id

    @property
    def bos_id(self) -> int:
        named, usual = self.account.bos_id, self.account.usual_bos_id
        return named if named is not None else usual if usual is not None else self.eos_id

    @cached_property
    def begins(self) -> tuple[int, ...]:
        return self._own_begins if self.account.begins is None else self.account.begins

    @cached_property
    def _own_begins(self) -> tuple[int, ...]:
        """What the tokenizer's own encoding puts in front of a text."""
        encoded = self._tokenizer.encode("a")
        marks = zip(encoded.ids, encoded.special_tokens_mask, strict=True)
        return tuple(index for index, _ in takewhile(lambda pair: pair[1], marks))

    @property
    def begin_id(self) -> int:
        return self.begins[-1] if self.begins else self.eos_id

    @property
    def prefix_id(self) -> int:
        return self.eos_id if self.account.bos_id is None else self.account.bos_id

    @property
    def ends(self) -> frozenset[int]:
        """Those that a published model names, else the one that ends a document; what a run was taught of
        documents counts as well, and the end of a turn always."""
        is_said = self.account.eos_id is None or (self.account.ends and self.account.begins is None)
        return self.said_ends if is_said else self.said_ends | {self.eos_id}

    @property
    def said_ends(self) -> frozenset[int]:
        """Those that a published model names, and the token that ends a turn in the chat template."""
        if self.chats is None:
            return self.account.ends
        ids = self.added_tokens
        turn = end_of_turn(self.chats, ids)
        return self.account.ends | ({ids[turn]} if turn is not None else set())

    @cached_property
    def byte_ids(self) -> frozenset[int]:
        if "ByteFallback" not in _kinds(self._state.get("decoder")):
            return frozenset()
        ids = (self._tokenizer.token_to_id(name) for name in FALLBACK)
        return frozenset(index for index in ids if index is not None)

    @cached_property
    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(self._text)
        return state

    @cached_property
    def is_the_same_in_parts(self) -> bool:
        """Whether a part of a text has the ids that it has by itself, wherever it stands: so of byte-level
        ones. Those made from SentencePiece begin a text with a blank, and WordPiece marks what goes on a
        word."""
        kinds = {*_kinds(self._state.get("pre_tokenizer")), *_kinds(self._state.get("normalizer"))}
        split = [part for part in _parts(self._state.get("pre_tokenizer")) if part.get("type") == "ByteLevel"]
        plain = {*IN_PLACE, "Sequence", "ByteLevel", "Split", "Digits", "Punctuation"}
        return (
            bool(split) and kinds <= plain and not any(part.get("add_prefix_space", True) for part in split)
        )

    def encode_rendered(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        return self._with_offsets(self._of_rendered, texts)

    def encode_named(self, text: str, names: Mapping[str, int]) -> list[int]:
        import tokenizers

        tokenizer = self._in_letters([self.name(index) for index in names.values()])
        tokenizer.add_tokens([tokenizers.AddedToken(name, special=False, normalized=False) for name in names])
        meant = {tokenizer.token_to_id(name): index for name, index in names.items()}
        return [meant.get(index, index) for index in tokenizer.encode(text, add_special_tokens=False).ids]

    def encode_in_place(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """As `encode_rendered`, of texts in which nothing spells a special token."""
        return self._with_offsets(self._of_texts, texts)

    def _with_offsets(
        self, tokenizer: tokenizers.Tokenizer, texts: Sequence[str]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [(np.array(e.ids, np.uint32), np.array(e.offsets, np.int64).reshape(-1, 2)) for e in encoded]

    def encode(self, text: str) -> list[int]:
        return self.encode_many([text])[0].tolist()

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, uint32; the library's own batch encoding where tiktoken gives others."""
        if self._quick is not None:
            return [self._encode_quickly(self._quick, text) for text in texts]
        return self._encode_by_library(texts)

    def _encode_quickly(self, quick: tiktoken.Encoding, text: str) -> np.ndarray:
        try:
            return quick.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # its pattern gives up on very long runs of blanks
            return self._encode_by_library([text])[0]

    def _encode_by_library(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._of_texts.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(e.ids, np.uint32) for e in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        skipped = (self.account.bos_id, self.account.usual_bos_id, self.account.eos_id)
        text = self._tokenizer.decode([i for i in ids if i not in skipped], skip_special_tokens=False)
        return _cleaned(text) if self._cleans_up else text

    @cached_property
    def _cleans_up(self) -> bool:
        """As `transformers`, which does it to no BPE: it would take blanks that are the text's."""
        return self.account.cleans_up and self._state["model"].get("type") != "BPE"

    def name(self, token: int) -> str:
        return str(self._tokenizer.id_to_token(token))

    def taught(self, texts: bool, chats: ChatFormat | None) -> JsonTokenizer:
        """The tokenizer as a run keeps it.

        texts: it learns texts, each behind a token that begins it; where nothing is put in front of texts,
            that is the token that ended the text before.
        """
        begins = self.begins or ((self.eos_id,) if texts else ())
        bos = self.account.bos_id if self.account.bos_id is not None else self.account.usual_bos_id
        if begins and self._may_rename(bos, chats):
            bos = begins[-1]
            if chats is not None and "bos_token" in chats.variables:  # none that the template names
                chats = replace(chats, variables={**chats.variables, "bos_token": self.name(bos)})
        account = replace(self.account, begins=begins)
        return JsonTokenizer(self._text, bos, self.eos_id, chats, account)

    def _may_rename(self, bos: int | None, chats: ChatFormat | None) -> bool:
        """Whether another token may be named to begin texts: not where the chat template uses the name, nor
        where the name alone makes a token of what is a plain one in tokenizer.json."""
        if chats is not None and chats.mentions("bos_token"):
            return False
        state = json.loads(self.account.files.get(TOKENIZER, self._text))
        added = {token["content"] for token in state["added_tokens"]}
        return bos is None or self.name(bos) in added

    def save(self, folder: Path) -> None:
        """Writes the files that it is loaded from again."""
        folder.mkdir(parents=True, exist_ok=True)
        files = self._files()
        if self.account.begins is not None:
            files[KEPT] = as_kept(replace(self.account, chats=self.chats))
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8", newline="")
        if self.chats is not None:
            self.chats.save(folder)

    def files(self) -> dict[str, str]:
        """The files that other tools read it from, by name, but for the chat template. What they put in front
        of a text is what is put there here."""
        whole = self.whole()
        return self._files() | ({TOKENIZER: whole} if whole != self._text else {})

    def whole(self) -> str:
        """A tokenizer.json that says all by itself, with what is put in front of a text."""
        if self.begins and self.begins != self._own_begins:
            return putting_in_front(self._read(), self.begins).to_str()
        return self._text

    def _files(self) -> dict[str, str]:
        return {TOKENIZER: self._text, **self.account.files, **self._settings()}

    def _settings(self) -> dict[str, str]:
        """tokenizer_config.json, and the older file where that counts: as they were, but for what they do not
        say or say otherwise of the tokens that begin and end a document."""
        files = self.account.files
        names = {"bos_token": self.account.bos_id, "eos_token": self.account.eos_id}
        tokens = {key: self.name(index) for key, index in names.items() if index is not None}
        if CONFIG not in files:
            if self.chats is not None:  # a template may rely on one that is not configured
                tokens = dict(self.chats.variables)
            return {CONFIG: json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | tokens, indent=1)}
        if self.chats is not None:
            tokens = {**self.chats.variables, **tokens}
        changed: dict[str, str] = {}
        config = json.loads(files[CONFIG])
        older = json.loads(files[MAP]) if MAP in files and "added_tokens_decoder" not in config else {}
        for name, found in ((CONFIG, config), (MAP, older)):
            said = names_in(found) if name == CONFIG else named_tokens(found)
            wrong = {k: v for k, v in tokens.items() if (k in found or name == CONFIG) and said.get(k) != v}
            if wrong and (name == CONFIG or found):
                changed[name] = json.dumps(found | wrong, indent=2, ensure_ascii=False) + "\n"
        return changed

    def quicken(self, proved: bool = False) -> bool:
        """Encodes by tiktoken from now on, where the file says that its ids are the same for every text.

        proved: another process has found so.
        """
        self._quick = as_tiktoken(self._text, proved)
        return self._quick is not None


def _parts(tree: Any) -> list[dict[str, Any]]:
    """A part of a tokenizer.json, and those that it is made of."""
    if not isinstance(tree, dict):
        return []
    inner = [tree.get(key) or [] for key in ("pretokenizers", "normalizers", "decoders", "processors")]
    return [tree, *(part for parts in inner for each in parts for part in _parts(each))]


def _kinds(tree: Any) -> set[str]:
    return {str(part.get("type")) for part in _parts(tree)}


def _cleaned(text: str) -> str:
    """As `transformers` cleans up after a tokenizer that splits at punctuation."""
    for found, instead in ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't")):
        text = text.replace(found, instead)
    for end in ("'m", "'s", "'ve", "'re"):
        text = text.replace(" " + end, end)
    return text


def putting_in_front(tokenizer: tokenizers.Tokenizer, begins: Sequence[int]) -> tokenizers.Tokenizer:
    """The tokenizer, whose own encoding puts `begins` in front of every text from now on."""
    from tokenizers import processors

    names = [str(tokenizer.id_to_token(index)) for index in begins]
    front = processors.TemplateProcessing(
        single=[*names, "$A"],
        pair=[*names, "$A", *(f"{name}:1" for name in names), "$B:1"],
        special_tokens=[*dict(zip(names, begins, strict=True)).items()],
    )
    before = tokenizer.post_processor
    tokenizer.post_processor = front if before is None else processors.Sequence([before, front])
    return tokenizer
