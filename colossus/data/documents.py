"""Documents as tokens: each with which of them are learned, and the text that they stand for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from colossus.data.chat_template import ChatFormat, ChatTemplate
from colossus.data.chats import Chat, learned_tokens, rendered
from colossus.data.corpus import Document, text_of
from colossus.data.tokenizer import BOS, EOS, BytesTokenizer, JsonTokenizer

Pieces = list[tuple[str, bool]]


@dataclass(frozen=True)
class Encoded:
    """ids: uint32 [N]. mask: which are learned, uint8 [N].

    text: what they stand for, special tokens left out. learned: the part of it that is learned.
    """

    ids: np.ndarray
    mask: np.ndarray
    text: str
    learned: str


def chats_of(tokenizer: JsonTokenizer | BytesTokenizer) -> ChatFormat:
    """How a tokenizer renders chats: its own way, else between the tokens that begin and end a document."""
    if tokenizer.chats is not None:
        return tokenizer.chats
    if isinstance(tokenizer, BytesTokenizer):
        return ChatFormat.default(BOS, EOS)
    return ChatFormat.default(tokenizer.name(tokenizer.bos_id), tokenizer.name(tokenizer.eos_id))


class Encoder:
    """Encodes documents by one tokenizer: texts between the tokens that begin and end a document, chats as
    the chat template renders them, with no token more."""

    def __init__(self, tokenizer: JsonTokenizer | BytesTokenizer) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(chats_of(self._tokenizer))

    @cached_property
    def _special(self) -> re.Pattern[str]:
        """Special tokens as they are spelled; the longest that fits."""
        names = sorted(self._tokenizer.special_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or "(?!)")

    def __call__(self, documents: Sequence[Document]) -> Iterator[Encoded]:
        """The documents, in order.

        Raises:
            UserError: the chat template does not fit a chat.
        """
        chats = self._chats([d for d in documents if isinstance(d, Chat)])
        others = self._texts([d for d in documents if not isinstance(d, Chat)])
        return (next(chats if isinstance(document, Chat) else others) for document in documents)

    def _chats(self, chats: Sequence[Chat]) -> Iterator[Encoded]:
        pairs = [rendered(chat, self._template) for chat in chats]
        encoded = self._tokenizer.encode_rendered([text for text, _ in pairs])
        for (text, spans), (ids, offsets_N2) in zip(pairs, encoded, strict=True):
            learned = "".join(self._special.sub("", text[a:b]) for a, b in spans)
            yield Encoded(ids, learned_tokens(offsets_N2, spans), self._special.sub("", text), learned)

    def _texts(self, documents: Sequence[str | Pieces]) -> Iterator[Encoded]:
        """The tokens that begin and end a document are learned as what they stand beside."""
        tokenizer = self._tokenizer
        begin, end = np.array([tokenizer.bos_id], np.uint32), np.array([tokenizer.eos_id], np.uint32)
        all_pieces = [[(d, True)] if isinstance(d, str) else d for d in documents]
        ids = iter(self._ids([text for pieces in all_pieces for text, _ in pieces]))
        for document, pieces in zip(documents, all_pieces, strict=True):
            encoded = [(next(ids), bool(learned)) for _, learned in pieces]
            learned = [encoded[0][1], *(piece[1] for piece in encoded), encoded[-1][1]]
            lengths = [1, *(len(piece[0]) for piece in encoded), 1]
            mask = np.repeat(np.array(learned, np.uint8), lengths)
            tokens = np.concatenate([begin, *(part for part, _ in encoded), end])
            yield Encoded(tokens, mask, text_of(document), "".join(text for text, yes in pieces if yes))

    def _ids(self, texts: list[str]) -> list[np.ndarray]:
        if isinstance(self._tokenizer, JsonTokenizer):
            return self._tokenizer.encode_many(texts)
        return [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts]
