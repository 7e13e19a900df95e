"""A model as lm-eval's harness asks it: log-likelihoods of continuations and of whole texts, and text.

Needs the extra `eval`; `evaluation/tasks.py` says so where it is missing.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from colossus.errors import UserError
from colossus.evaluation.bits_per_byte import BATCH_TOKENS, Ranks
from colossus.evaluation.eager import eagerly
from colossus.evaluation.windows import batches

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from colossus.data.tokenizer import Tokenizer
    from colossus.models import Decoder

LOGITS = 2**26  # that exist at once, unless a single row has more: 256 MiB in fp32
MAX_NEW_TOKENS = 256  # of a text where its task does not say
MAX_NEW_TOKENS_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
DRAWING = ("top_k", "top_p", "min_p")  # settings that only a text that is drawn has
SETTINGS = ("until", *MAX_NEW_TOKENS_NAMES, "do_sample", "temperature", *DRAWING, "repetition_penalty")
WITHOUT_EFFECT = {"num_beams": 1, "num_return_sequences": 1, "typical_p": 1, "no_repeat_ngram_size": 0}
"""Settings of `transformers` that are read where they change nothing."""

Generate = Callable[..., list[str]]  # as `colossus.generation.generate`
Scored = tuple[float, bool]  # (log-likelihood in nats, whether each token is the likeliest)


class HarnessModel(TemplateLM):
    """Answers the harness's requests, as its own model of `transformers` does of what is exported: in front
    of a text stands what the model was taught to find there.

    generate: continues prompts; it is given by the caller, since generation is built on evaluation.
    world: ranks that share the batches. Each makes the same number of forward calls and gets all answers;
        texts are written by one rank alone.
    max_length: tokens of a window; by default the most that the model can take.
    before_batch: called before every batch; may raise to give up.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        generate: Generate,
        *,
        world: Ranks | None = None,
        max_length: int | None = None,
        before_batch: Callable[[], None] | None = None,
    ) -> None:
        super().__init__()
        self._model, self._tokens, self._generate = model, tokenizer, generate
        self._ranks = world
        self.max_length = max_length or model.arch.max_seq_len
        self._before_batch = before_batch or (lambda: None)
        behind = tokenizer.encode("a a")[len(tokenizer.encode("a")) :]
        self._lost = "" if tokenizer.decode(behind).startswith(" ") else " "
        self._batch_tokens = max(1, min(BATCH_TOKENS, LOGITS // model.arch.vocab_size))

    @property
    def eot_token_id(self) -> int:
        return self._tokens.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._tokens.prefix_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, behind what begins every text unless that is declined."""
        ids = self._tokens.encode(string)
        return ids if add_special_tokens is False else [*self._tokens.begins, *ids]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Scored]:
        """Of each (context, continuation): what the continuation has after the context. One that makes no
        token has no probability: with 0 nats, as the sum over none, it would be the best of all."""
        made = [bool(self.tok_encode(request.args[1], add_special_tokens=False)) for request in requests]
        asked = [request for request, is_made in zip(requests, made, strict=True) if is_made]
        if len(asked) < len(requests):
            logging.getLogger(__name__).warning(
                f"tasks: {len(requests) - len(asked):,} of {len(requests):,} continuations make no token "
                f"(the first behind {requests[made.index(False)].args[0][-60:]!r}): they count as impossible"
            )
        scores = iter(super().loglikelihood(asked, disable_tqdm=disable_tqdm))
        return [next(scores) if is_made else (-math.inf, False) for is_made in made]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As the harness: blanks between the two are the continuation's. Where that has no token of its own,
        because its text became one with the context's, each is encoded by itself. A context of blanks alone
        is as one that is empty."""
        first, then = super()._encode_pair(context, continuation)
        then = then or self.tok_encode(continuation, add_special_tokens=False)
        return first or [self.prefix_token_id], then

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of each whole text, in the harness's windows: side by side, the last one filled up to the left. As
        with its own model, what stands in front of a text is scored too, behind the prefix."""
        owners: list[int] = []
        pieces: list[tuple[tuple[str, str], list[int], list[int]]] = []
        for index, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for rolled in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                context, continuation = make_disjoint_window(rolled)
                owners.append(index)
                pieces.append((("", ""), context, continuation))
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(pieces), strict=True):
            totals[owner] += score
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """A continuation of each prompt, up to the first of its stop strings. As with the harness's own model
        a blank at a prompt's end is read as it is, and one with which a text begins is lost where decoding
        loses it."""
        assert self._ranks is None or self._ranks.size == 1, "texts are written by one rank alone"
        same: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            same.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(index)
        texts = [""] * len(requests)
        for indices in same.values():
            self._before_batch()
            settings = sampling_of(requests[indices[0]].args[1])
            prompts = [
                self.tok_encode(requests[index].args[0]) or [self._tokens.begin_id] for index in indices
            ]
            for index, text in zip(
                indices, self._generate(self._model, self._tokens, prompts, **settings), strict=True
            ):
                texts[index] = text.removeprefix(self._lost)
        return texts

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[Scored]:
        """Of each (texts, ids of the context, ids of the continuation). Equal inputs are read once."""
        wanted: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for index, (_texts, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise UserError(
                    f"tasks: a continuation of {len(continuation):,} tokens; the model's window holds "
                    f"{self.max_length:,}"
                )
            tokens = (*context, *continuation)[-self.max_length - 1 :]
            if continuation:
                wanted.setdefault(tokens[:-1], []).append((index, continuation))
        rows = list(wanted)
        lengths = np.array([len(row) for row in rows], np.int64)
        parts = batches(lengths, int(lengths.max(initial=1)), self._batch_tokens)
        rank, size = (self._ranks.rank, self._ranks.size) if self._ranks is not None else (0, 1)
        parts += [(np.zeros(0, np.int64), 1)] * (-len(parts) % size)
        scores = np.zeros((len(requests), 2))
        scores[:, 1] = float(rank == 0)  # of an empty continuation
        for answers in wanted.values():
            scores[[index for index, _ in answers], 1] = 0.0
        was_training = self._model.training
        self._model.eval()
        try:
            with eagerly():
                for members, length in parts[rank::size]:
                    self._before_batch()
                    logits_BTV = self._read([rows[member] for member in members.tolist()], length)
                    for row, member in enumerate(members.tolist()):
                        for index, continuation in wanted[rows[member]]:
                            scores[index] = _score(logits_BTV[row, : lengths[member]], continuation)
        finally:
            self._model.train(was_training)
        if self._ranks is not None:
            scores = np.array(self._ranks.sum(scores.ravel().tolist())).reshape(scores.shape)
        return [(float(score), bool(greedy)) for score, greedy in scores]

    def _read(self, rows: Sequence[tuple[int, ...]], length: int) -> torch.Tensor:
        """Logits of rows that are padded on the right to `length`; of one token where there is none."""
        tokens_BT = torch.zeros((max(1, len(rows)), length), dtype=torch.int64)
        for index, row in enumerate(rows):
            tokens_BT[index, : len(row)] = torch.tensor(row)
        return self._model(tokens_BT.to(next(self._model.parameters()).device))


def _score(logits_TV: torch.Tensor, continuation: list[int]) -> Scored:
    """Of a continuation that the last logits predict, in fp32 or better."""
    logits_TV = logits_TV[-len(continuation) :]
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    ids_T = torch.tensor(continuation, device=logits_TV.device)
    logp_T = torch.log_softmax(logits_TV, -1).gather(1, ids_T[:, None])[:, 0]
    return float(logp_T.double().sum()), bool((logits_TV.argmax(-1) == ids_T).all())


def sampling_of(asked: dict[str, Any]) -> dict[str, Any]:
    """What a task asks of a text (its `generation_kwargs`), as the arguments of `generate`.

    Without `do_sample` it is the likeliest text, whatever its temperature, as the harness has it. Then what
    narrows the choice where a text is drawn has no effect, as in `transformers`; a penalty has.

    Raises:
        UserError: a setting that is not known.
    """
    for name, value in asked.items():
        if name not in SETTINGS and value is not None and value != WITHOUT_EFFECT.get(name):
            allowed = f"{value!r} is asked for, which is not supported; {', '.join(SETTINGS)} are"
            raise UserError.field("generation_kwargs", name, allowed, SETTINGS)
    until = asked.get("until") or []
    lengths: Iterable[Any] = (asked[name] for name in MAX_NEW_TOKENS_NAMES if asked.get(name) is not None)
    samples = bool(asked.get("do_sample"))
    settings: dict[str, Any] = {
        "max_tokens": int(next(iter(lengths), MAX_NEW_TOKENS)),
        "stop": [text for text in (until if isinstance(until, list) else [until]) if text != ""],
        "temperature": float(asked.get("temperature", 1.0)) if samples else 0.0,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    if samples:
        settings |= {name: given[name] for name in DRAWING if name in given}
        if settings.get("top_k") == 0:  # no bound, in `transformers`
            del settings["top_k"]
        if settings.get("top_p") == 0:  # the likeliest token alone
            settings |= {"top_p": None, "top_k": 1}
    return settings | {name: given[name] for name in ("repetition_penalty",) if name in given}
