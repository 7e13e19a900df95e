"""Continues prompts, with a key/value cache."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from colossus.errors import UserError
from colossus.evaluation.eager import eagerly
from colossus.generation.sampling import Sampling
from colossus.generation.text import TextBuilder
from colossus.models import Decoder, KVCache
from colossus.models.cache import row_bytes

if TYPE_CHECKING:
    from colossus.data.tokenizer import Tokenizer

MAX_ROWS = 32  # prompts that are continued at once
CACHE_BYTES = 4 * 2**30  # of their keys and values, unless one prompt alone takes more
# Up to so many rows a processor attends quicker in fp32 than in bf16: 12 layers of 12 heads of 64 with 192
# keys took 0.4 ms against 0.8 with 1 row. With 8, a step took two cores 14.5 ms in fp32 and 13.7 in bf16.
FEW_ROWS = 2
PREFILL_TOKENS = 1024  # that are read at once, over all rows


@dataclass
class _Row:
    """One prompt: its index, its tokens so far, and the text that they make."""

    index: int
    tokens: list[int]
    text: TextBuilder
    end: int  # tokens, prompt and all, at which it is full
    first_ids: torch.Tensor | None  # the tokens that may come next; None: all
    begin: int = -1  # the first token that the cache holds; -1: it holds none


def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
) -> list[str]:
    """The continuation of each prompt, without the prompt.

    It ends before the end-of-document token, before the first of the `stop` strings, or after
    `max_tokens` tokens. See `Sampling` for what narrows the choice. Text may be longer than the model's
    window: where the window is full it moves on by half, so that every token is predicted from at least
    half a window.

    A space at a prompt's end belongs to the word that follows, as it did in the training text: the first
    new token is chosen among those that begin with a space.

    Raises:
        UserError: prompts are no list of strings, or a number is outside its range.
    """
    if isinstance(prompts, str):
        raise UserError.field("prompts", prompts, "expected a list of strings; write [prompt]")
    texts = [""] * len(prompts)
    sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p, seed)
    for index, piece in _pieces(model, tokenizer, prompts, max_tokens, sampling, stop):
        texts[index] += piece
    return texts


def stream(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
) -> Iterator[str]:
    """The pieces of what `generate` returns for one prompt, each as soon as it is certain."""
    sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p, seed)
    for _, piece in _pieces(model, tokenizer, [prompt], max_tokens, sampling, stop):
        if piece:
            yield piece


def window_begin(position: int, window: int) -> int:
    """The first token that the one at `position` is predicted from; moves on by half a window at a time."""
    stride = max(1, window // 2)
    return max(0, -(-(position - window) // stride) * stride)


def _pieces(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_tokens: int,
    sampling: Sampling,
    stop: Sequence[str],
) -> Iterator[tuple[int, str]]:
    """(index of a prompt, piece of its continuation)."""
    if max_tokens < 0:
        raise UserError.field("max_tokens", max_tokens, "must be 0 or more")
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    rows = [_row(i, prompt, tokenizer, max_tokens, stop) for i, prompt in enumerate(prompts)]
    was_training = model.training
    model.eval()
    try:
        yield from _continue(model, tokenizer, rows, sampling)
    finally:
        model.train(was_training)


def _row(index: int, prompt: str, tokenizer: Tokenizer, max_tokens: int, stop: tuple[str, ...]) -> _Row:
    space = " " if prompt.endswith(" ") else ""
    tokens = [tokenizer.bos_id, *tokenizer.encode(prompt.removesuffix(space))]
    first_ids = _ids_that_begin_with_a_space(tokenizer) if space else None  # type: ignore[arg-type]  # by identity
    text = TextBuilder(tokenizer, stop, drop_prefix=space)
    return _Row(index, tokens, text, len(tokens) + max_tokens, first_ids)


@lru_cache(maxsize=4)
def _ids_that_begin_with_a_space(tokenizer: Tokenizer) -> torch.Tensor:
    return torch.tensor([i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]).startswith(" ")])


def _continue(
    model: Decoder, tokenizer: Tokenizer, rows: list[_Row], sampling: Sampling
) -> Iterator[tuple[int, str]]:
    """Continues many rows at once, each from where it is; one that ends makes room for one that waits. No row
    sees another, and each gets what it would get alone."""
    rows = [row for row in rows if row.end > len(row.tokens)]
    waiting = deque(sorted(rows, key=lambda row: len(row.tokens)))
    if not waiting:
        return
    cache = _cache(model, waiting)
    vocab_size = tokenizer.vocab_size  # the model's may be larger: padded, never trained
    open_rows = [waiting.popleft() for _ in cache.lengths]
    while open_rows:
        _read_ahead(model, open_rows, cache)
        logits_BV = _read(model, [row.tokens[-1:] for row in open_rows], cache)[:, :vocab_size]
        staying = []
        for place, (row, logits_V) in enumerate(zip(open_rows, logits_BV, strict=True)):
            position = len(row.tokens)
            if row.first_ids is not None:
                logits_V = torch.full_like(logits_V, -torch.inf).index_copy(
                    0, row.first_ids, logits_V[row.first_ids]
                )
                row.first_ids = None
            token = sampling.choose(logits_V, row.tokens, row.index, position)
            ended = token == tokenizer.eos_id
            if not ended:
                row.tokens.append(token)
                yield row.index, row.text.add(token)
            if ended or row.text.done or len(row.tokens) == row.end:
                yield row.index, row.text.finish()
                if not waiting:
                    continue
                open_rows[place], cache.lengths[place] = waiting.popleft(), 0
            staying.append(place)
        if len(staying) < len(open_rows):
            open_rows, cache = [open_rows[place] for place in staying], cache.kept(staying)


def _cache(model: Decoder, rows: Sequence[_Row]) -> KVCache:
    """Of as many rows as are continued at once, each with room for the longest of all."""
    device = next(model.parameters()).device
    dtype = model.compute_dtype
    if device.type == "cpu" and len(rows) <= FEW_ROWS:
        dtype = torch.promote_types(dtype, torch.float32)
    max_tokens = min(model.arch.max_seq_len, max(row.end for row in rows))
    fitting = max(1, CACHE_BYTES // row_bytes(model.arch, max_tokens, dtype))
    return KVCache(model.arch, min(len(rows), fitting, MAX_ROWS), max_tokens, dtype, device)


def _read_ahead(model: Decoder, rows: list[_Row], cache: KVCache) -> None:
    """Brings the cache to the last token but one of each row, where it is new or its window has moved on.

    Neighbours of like length are read together. Shorter ones are filled up behind their tokens, where the
    causal rule hides what is there, and the next tokens overwrite it.
    """
    stale = []
    for place, row in enumerate(rows):
        begin = window_begin(len(row.tokens), model.arch.max_seq_len)
        if begin != row.begin:
            row.begin = begin
            stale.append(place)
    for places in _neighbours(stale, [len(row.tokens) - row.begin - 1 for row in rows]):
        known = [rows[place].tokens[rows[place].begin : -1] for place in places]
        longest = max(map(len, known))
        if longest:
            part = cache.rows(places[0], places[-1] + 1, longest)
            _read(model, [tokens + [0] * (longest - len(tokens)) for tokens in known], part)
        for place, tokens in zip(places, known, strict=True):
            cache.lengths[place] = len(tokens)


def _neighbours(places: list[int], lengths: list[int]) -> Iterator[list[int]]:
    """Runs of adjacent places, as long as filling up to the longest adds little."""
    run: list[int] = []
    for place in places:
        found = [lengths[other] for other in (*run, place)]
        if run and (place != run[-1] + 1 or max(found) > 1.25 * min(found) + 8):
            yield run
            run = []
        run.append(place)
    if run:
        yield run


def _read(model: Decoder, tokens: list[list[int]], cache: KVCache) -> torch.Tensor:
    """Feeds tokens to the cache; the logits [B, V] that follow the last ones, in fp32 on the CPU."""
    tokens_BT = torch.tensor(tokens, device=next(model.parameters()).device)
    with torch.no_grad(), eagerly():
        for part_BT in tokens_BT.split(max(1, PREFILL_TOKENS // len(tokens)), dim=1):
            logits_B1V = model(part_BT, cache=cache, only_last=True)
    return logits_B1V[:, -1].float().cpu()
