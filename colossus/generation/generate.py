"""Continues prompts, with a key/value cache."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from colossus.errors import UserError
from colossus.evaluation.eager import eagerly
from colossus.generation.arguments import Prompt, check_prompt, check_prompts, check_stop, check_whole
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
    prompts: Sequence[Prompt],
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    special: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[str]:
    """The continuation of each prompt, without the prompt.

    It ends before a token that ends a text or a turn (`Tokenizer.ends`), before the first of the `stop`
    strings, or after `max_tokens` tokens. See `Sampling` for what narrows the choice. Text may be longer than
    the model's window: where the window is full it moves on by half, so that every token is predicted from at
    least half a window.

    A prompt is a text, or a list of the tokenizer's ids, which are read as they are. In front of a text
    stands what the model was taught to find there; of a published one, what the tokenizer's own encoding
    puts there. It may be a list of messages, too, each with `role` and `content`, which the tokenizer's chat
    template renders, with the header of the answer that is written.

    tools: JSON schemas of the functions that messages may call, which the chat template renders too.

    special: special tokens that a text spells are read as such, and not in letters. Never for texts that
        somebody else may have written. A message is always text, whatever it spells.

    A space at a prompt's end belongs to the word that follows, as it did in the training text: the first
    new token is chosen among those that begin with a space. Where the tokenizer has none, the prompt is read
    as it is.

    Raises:
        UserError: prompts are no list of texts, ids or messages, or a number is outside its range; the model
            has no embedding for a token of a prompt; messages do not fit into its context.
    """
    checked = check_prompts(prompts, tokenizer, model.arch.max_seq_len, tools)
    sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p, seed)
    rows = _rows(model, tokenizer, checked, max_tokens, stop, special)
    texts = [""] * len(rows)
    for index, piece in _pieces(model, tokenizer, rows, sampling):
        texts[index] += piece
    return texts


def stream(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: Prompt,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    special: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> Iterator[str]:
    """The pieces of what `generate` returns for one prompt, each as soon as it is certain."""
    checked = [check_prompt("prompt", prompt, tokenizer, model.arch.max_seq_len, tools)]
    sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p, seed)
    rows = _rows(
        model, tokenizer, checked, max_tokens, stop, special
    )  # a mistake is told before the first piece
    return (piece for _, piece in _pieces(model, tokenizer, rows, sampling) if piece)


def window_begin(position: int, window: int) -> int:
    """The first token that the one at `position` is predicted from; moves on by half a window at a time."""
    stride = max(1, window // 2)
    return max(0, -(-(position - window) // stride) * stride)


def _rows(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str | list[int]],
    max_tokens: int,
    stop: Sequence[str],
    special: bool,
) -> list[_Row]:
    """The prompts, ready to be continued. Raises as `generate` does."""
    max_tokens, stop = check_whole("max_tokens", max_tokens, 0), check_stop(stop)
    if not special:
        _warn_of_letters([prompt for prompt in prompts if isinstance(prompt, str)], tokenizer)
    rows = [_row(i, prompt, tokenizer, max_tokens, stop, special) for i, prompt in enumerate(prompts)]
    most = max((max(row.tokens) for row in rows), default=0)
    if most >= model.arch.vocab_size:
        raise UserError(
            f"prompts: token {most} of the tokenizer's {tokenizer.vocab_size:,}; the model has embeddings "
            f"for {model.arch.vocab_size:,}: the two do not belong together"
        )
    return rows


def _pieces(
    model: Decoder, tokenizer: Tokenizer, rows: list[_Row], sampling: Sampling
) -> Iterator[tuple[int, str]]:
    """(index of a prompt, piece of its continuation)."""
    was_training = model.training
    model.eval()
    try:
        yield from _continue(model, tokenizer, rows, sampling)
    finally:
        model.train(was_training)


def _row(
    index: int,
    prompt: str | list[int],
    tokenizer: Tokenizer,
    max_tokens: int,
    stop: tuple[str, ...],
    special: bool,
) -> _Row:
    if not isinstance(prompt, str):
        text = TextBuilder(tokenizer, stop, prompt=prompt)
        return _Row(index, prompt, text, len(prompt) + max_tokens, None)
    first_ids = _ids_that_begin_with_a_space(tokenizer) if prompt.endswith(" ") else None  # type: ignore[arg-type]  # by identity
    if first_ids is not None and not len(first_ids):
        first_ids = None
    space = " " if first_ids is not None else ""
    tokens = _ids(prompt.removesuffix(space), tokenizer, special) or [tokenizer.begin_id]
    text = TextBuilder(tokenizer, stop, space, tokens)
    return _Row(index, tokens, text, len(tokens) + max_tokens, first_ids)


def _ids(text: str, tokenizer: Tokenizer, special: bool) -> list[int]:
    """Of a text, behind what begins every text, unless it spells that itself."""
    begins = list(tokenizer.begins)
    ids = tokenizer.encode_rendered([text])[0][0].tolist() if special else tokenizer.encode(text)
    return ids if begins and ids[: len(begins)] == begins else begins + ids


def _warn_of_letters(prompts: Sequence[str], tokenizer: Tokenizer) -> None:
    """Says of special tokens that prompts spell, and that are read as text, how they are read as such."""
    text = "\n".join(prompts)
    spelled = sorted(name for name in tokenizer.special_tokens if name in text)
    if spelled:
        logging.getLogger(__name__).warning(
            f"prompts: {', '.join(spelled)}: read in letters, as text; to read special tokens as such: "
            "--special (special=True)"
        )


@lru_cache(maxsize=4)
def _ids_that_begin_with_a_space(tokenizer: Tokenizer) -> torch.Tensor:
    word = tokenizer.encode("a")  # some decoders take the space from a text's first token
    known = len(tokenizer.decode(word))
    ids = [i for i in range(tokenizer.vocab_size) if tokenizer.decode([*word, i])[known:].startswith(" ")]
    return torch.tensor(ids, dtype=torch.int64)


def _continue(
    model: Decoder, tokenizer: Tokenizer, rows: list[_Row], sampling: Sampling
) -> Iterator[tuple[int, str]]:
    """Continues many rows at once, each from where it is; one that ends makes room for one that waits. No row
    sees another, and each gets what it would get alone."""
    rows = [row for row in rows if row.end > len(row.tokens)]
    waiting = deque(sorted(rows, key=lambda row: len(row.tokens)))
    if not waiting:
        return
    if model.copies is not None:
        model.copies.refresh(model)
    cache = _cache(model, waiting)
    vocab_size = tokenizer.vocab_size  # the model's may be larger: padded, never trained
    ends = tokenizer.ends
    open_rows = [waiting.popleft() for _ in cache.lengths]
    while open_rows:
        _read_ahead(model, open_rows, cache)
        logits_BV = _read(model, [row.tokens[-1:] for row in open_rows], cache)[:, :vocab_size]
        staying = []
        for place, (row, logits_V) in enumerate(zip(open_rows, logits_BV, strict=True)):
            position = len(row.tokens)
            if row.first_ids is not None:
                first_ids = row.first_ids[row.first_ids < len(logits_V)]  # of the model's vocabulary
                logits_V = torch.full_like(logits_V, -torch.inf).index_copy(0, first_ids, logits_V[first_ids])
                row.first_ids = None
            token = sampling.choose(logits_V, row.tokens, row.index, position)
            ended = token in ends
            if not ended:
                row.tokens.append(token)
                yield row.index, row.text.add(token)
            if ended or row.text.done or len(row.tokens) == row.end:
                yield row.index, row.text.finish()
                if not waiting:
                    continue
                open_rows[place] = waiting.popleft()
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
    serving = contextlib.nullcontext() if model.copies is None else model.copies.serving()
    with torch.no_grad(), eagerly(), serving:
        for part_BT in tokens_BT.split(max(1, PREFILL_TOKENS // len(tokens)), dim=1):
            logits_B1V = model(part_BT, cache=cache, only_last=True)
    return logits_B1V[:, -1].float().cpu()
