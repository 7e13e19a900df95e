"""Continues prompts, with a key/value cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from colossus.errors import UserError
from colossus.evaluation.eager import eagerly
from colossus.generation.sampling import Sampling
from colossus.generation.text import TextBuilder
from colossus.models import Decoder, KVCache

if TYPE_CHECKING:
    from colossus.data.tokenizer import Tokenizer

MAX_ROWS = 32  # prompts that are continued at once
PREFILL_TOKENS = 1024  # of a prompt that are read at once, over all rows: their logits exist together


@dataclass
class _Row:
    """One prompt: its index, its tokens so far, and the text that they make."""

    index: int
    tokens: list[int]
    text: TextBuilder
    end: int  # tokens, prompt and all, at which it is full
    first_ids: torch.Tensor | None  # the tokens that may come first; None: all


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
) -> list[str]:
    """The continuation of each prompt, without the prompt.

    It ends before the end-of-document token, before the first of the `stop` strings, or after
    `max_tokens` tokens. Text may be longer than the model's window: where the window is full it moves on
    by half, so that every token is predicted from at least half a window.

    A space at a prompt's end belongs to the word that follows, as it did in the training text: the first
    new token is chosen among those that begin with a space.

    Raises:
        UserError: prompts are no list of strings, or a number is outside its range.
    """
    if isinstance(prompts, str):
        raise UserError.field("prompts", prompts, "expected a list of strings; write [prompt]")
    texts = [""] * len(prompts)
    sampling = Sampling(temperature, top_k, top_p, seed)
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
) -> Iterator[str]:
    """The pieces of what `generate` returns for one prompt, each as soon as it is certain."""
    sampling = Sampling(temperature, top_k, top_p, seed)
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
        for group in _groups(rows):
            yield from _continue(model, tokenizer, group, sampling)
    finally:
        model.train(was_training)


def _row(index: int, prompt: str, tokenizer: Tokenizer, max_tokens: int, stop: tuple[str, ...]) -> _Row:
    space = " " if prompt.endswith(" ") else ""
    tokens = [tokenizer.bos_id, *tokenizer.encode(prompt.removesuffix(space))]
    first_ids = None
    if space:
        first_ids = torch.tensor(
            [i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]).startswith(space)]
        )
    text = TextBuilder(tokenizer, stop, drop_prefix=space)
    return _Row(index, tokens, text, len(tokens) + max_tokens, first_ids)


def _groups(rows: list[_Row]) -> Iterator[list[_Row]]:
    """Rows that are continued together: of similar length, since all are at the same position."""
    group: list[_Row] = []
    for row in sorted(rows, key=lambda row: len(row.tokens)):
        if group and (len(group) == MAX_ROWS or len(row.tokens) > 2 * len(group[0].tokens) + 16):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _continue(
    model: Decoder, tokenizer: Tokenizer, rows: list[_Row], sampling: Sampling
) -> Iterator[tuple[int, str]]:
    """Continues rows position by position. One whose prompt goes on is fed its own token there: no row is
    padded, none sees another, and each gets what it would get alone."""
    device, window = next(model.parameters()).device, model.arch.max_seq_len
    vocab_size = tokenizer.vocab_size  # the model's may be larger: padded, never trained
    prompts = [len(row.tokens) for row in rows]
    position = min(prompts)
    open_rows = [row for row in rows if row.end > len(row.tokens)]
    last = max(row.end for row in rows)
    cache, begin, fed = None, -1, 0
    while open_rows:
        if cache is None or window_begin(position, window) != begin:
            begin = fed = window_begin(position, window)
            cache = KVCache(model.arch, len(rows), min(window, last - begin), model.compute_dtype, device)
        known = [(row.tokens + [0] * (position - len(row.tokens)))[fed:position] for row in rows]
        logits_BV = _read(model, torch.tensor(known, device=device), cache)[:, :vocab_size]
        fed = position
        for row, prompt, logits_V in zip(rows, prompts, logits_BV, strict=True):
            if row not in open_rows or position < prompt:
                continue
            if row.first_ids is not None and position == prompt:
                logits_V = torch.full_like(logits_V, -torch.inf).index_copy(
                    0, row.first_ids, logits_V[row.first_ids]
                )
            token = sampling.choose(logits_V, row.index, position)
            ended = token == tokenizer.eos_id
            if not ended:
                row.tokens.append(token)
                yield row.index, row.text.add(token)
            if ended or row.text.done or len(row.tokens) == row.end:
                yield row.index, row.text.finish()
                open_rows.remove(row)
        position += 1


def _read(model: Decoder, tokens_BT: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Feeds tokens to the cache; the logits that follow the last one, in fp32 on the CPU."""
    with torch.no_grad(), eagerly():
        for part_BT in tokens_BT.split(max(1, PREFILL_TOKENS // len(tokens_BT)), dim=1):
            logits_BTV = model(part_BT, cache=cache)
    return logits_BTV[:, -1].float().cpu()
