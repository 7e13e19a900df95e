"""Documents as tokens: each with which of them are learned, and the text that they stand for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, compress

import numpy as np

from colossus.data.account import BOS, EOS
from colossus.data.bytes_tokenizer import BytesTokenizer
from colossus.data.chat_template import ChatFormat, ChatTemplate, Span
from colossus.data.chats import Chat, is_within, learned_tokens, rendered
from colossus.data.corpus import Document, text_of
from colossus.data.json_tokenizer import JsonTokenizer
from colossus.data.lossless import lost_bytes

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
    """Encodes documents by one tokenizer: texts behind the token that begins them and before the one that
    ends them, chats as the chat template renders them, with no token more.

    Where one token does both, it stands between two texts once.
    """

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

    def __call__(self, documents: Sequence[Document], follows: Sequence[bool] = ()) -> Iterator[Encoded]:
        """The documents, in order.

        follows: of each, whether it stands right behind a text: where the token that ends a text also begins
            one, it is written once. By default each document is read by itself.

        Raises:
            UserError: the chat template does not fit a chat.
        """
        chats = self._chats([d for d in documents if isinstance(d, Chat)])
        behind = follows or [False] * len(documents)
        texts = [(d, f) for d, f in zip(documents, behind, strict=True) if not isinstance(d, Chat)]
        others = self._texts([d for d, _ in texts], [f for _, f in texts])
        return (next(chats if isinstance(document, Chat) else others) for document in documents)

    def lost_bytes(self, encoded: Encoded) -> int:
        """Of what is learned of a document, the bytes that its tokens do not give back."""
        if isinstance(self._tokenizer, BytesTokenizer):
            return 0
        return lost_bytes(encoded.learned, self._tokenizer.decode(self._tokenizer.encode(encoded.learned)))

    def _chats(self, chats: Sequence[Chat]) -> Iterator[Encoded]:
        pairs = [rendered(chat, self._template) for chat in chats]
        encoded = self._tokenizer.encode_rendered([text for text, _ in pairs])
        for (text, spans), (ids, offsets_N2) in zip(pairs, encoded, strict=True):
            learned = "".join(self._special.sub("", text[a:b]) for a, b in spans)
            yield Encoded(ids, learned_tokens(offsets_N2, spans), self._special.sub("", text), learned)

    def _texts(self, documents: Sequence[str | Pieces], follows: Sequence[bool]) -> Iterator[Encoded]:
        """The tokens that begin and end a document are learned as what they stand beside."""
        tokenizer, once = self._tokenizer, separated_once(self._tokenizer)
        begins = np.array(tokenizer.begins or [tokenizer.begin_id], np.uint32)
        end = np.array([tokenizer.eos_id], np.uint32)
        all_pieces = [[(d, True)] if isinstance(d, str) else d for d in documents]
        rows = zip(documents, follows, all_pieces, self._encoded(all_pieces), strict=True)
        for document, behind, pieces, encoded in rows:
            begin = begins[:0] if once and behind else begins
            learned = [np.full(len(begin), pieces[0][1]), encoded[1], np.full(1, pieces[-1][1])]
            mask = np.concatenate(learned).astype(np.uint8)
            tokens = np.concatenate([begin, encoded[0], end])
            yield Encoded(tokens, mask, text_of(document), "".join(text for text, yes in pieces if yes))

    def _encoded(self, all_pieces: Sequence[Pieces]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(ids, which are learned) of each text. Where the place of a piece tells in its ids, the whole text
        is encoded, and a token is learned that has a character of a piece that is."""
        tokenizer = self._tokenizer
        if isinstance(tokenizer, JsonTokenizer) and not tokenizer.is_the_same_in_parts:
            in_place = [len(pieces) > 1 for pieces in all_pieces]
            whole = ["".join(text for text, _ in pieces) for pieces in compress(all_pieces, in_place)]
            placed = iter(tokenizer.encode_in_place(whole))
        else:
            in_place, placed = [False] * len(all_pieces), iter(())
        apart = compress(all_pieces, (not yes for yes in in_place))
        ids = iter(self._ids([text for pieces in apart for text, _ in pieces]))
        for pieces, is_placed in zip(all_pieces, in_place, strict=True):
            if is_placed:
                found, offsets_N2 = next(placed)
                yield found, is_within(offsets_N2, _learned_spans(pieces))
            else:
                parts = [next(ids) for _ in pieces]
                learned = np.array([yes for _, yes in pieces], np.uint8)
                yield np.concatenate(parts), np.repeat(learned, [len(part) for part in parts])

    def _ids(self, texts: list[str]) -> list[np.ndarray]:
        if isinstance(self._tokenizer, JsonTokenizer):
            return self._tokenizer.encode_many(texts)
        return [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts]


def separated_once(tokenizer: JsonTokenizer | BytesTokenizer) -> bool:
    """Whether one token ends a document and begins the next."""
    return tokenizer.begins in ((), (tokenizer.eos_id,))


def _learned_spans(pieces: Pieces) -> list[Span]:
    ends = list(accumulate(len(text) for text, _ in pieces))
    return [(end - len(text), end) for (text, yes), end in zip(pieces, ends, strict=True) if yes and text]
