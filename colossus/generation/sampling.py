"""How the next token is chosen. Every draw is a pure function of (seed, prompt, position)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from colossus.generation.arguments import MAX_SEED, check_number, check_whole


@dataclass(frozen=True)
class Sampling:
    """What narrows the choice applies in the order of the fields, from the penalty to min_p, as in
    `transformers`.

    repetition_penalty: logits of tokens that the text holds already, prompt and all, are divided by it where
        positive and multiplied where negative (CTRL, arXiv 1909.05858, section 4.1); 1 changes nothing.
    temperature: 0 takes the likeliest token, and nothing below applies; 1 draws from the model's own
        distribution.
    top_k: draw among the k likeliest. top_p: among the fewest likeliest that together have this share.
    min_p: among those that are at least this times as likely as the likeliest.

    Raises:
        UserError: a value that is no number, or outside its range.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_number(
            "repetition_penalty",
            self.repetition_penalty,
            lambda value: 0 < value < math.inf,
            "must be a number above 0; 1 is none",
        )
        check_number(
            "temperature",
            self.temperature,
            lambda value: 0 <= value < math.inf,
            "must be a number, 0 (the likeliest token) or more",
        )
        if self.top_k is not None:
            check_whole("top_k", self.top_k, 1)
        if self.top_p is not None:
            check_number(
                "top_p", self.top_p, lambda value: 0 < value <= 1, "must be a number above 0 and at most 1"
            )
        if self.min_p is not None:
            check_number("min_p", self.min_p, lambda value: 0 <= value <= 1, "must be a number from 0 to 1")
        check_whole("seed", self.seed, 0, MAX_SEED)

    def choose(self, logits_V: torch.Tensor, seen: Sequence[int], prompt: int, position: int) -> int:
        """The next token of the prompt of that index, which will stand at `position` behind `seen`."""
        if self.repetition_penalty != 1:
            logits_V = penalised(logits_V, seen, self.repetition_penalty)
        if self.temperature == 0:
            return int(logits_V.argmax())
        p_N, ids_N = self.candidates(logits_V)
        cumulative_N = p_N.cumsum(0)
        drawn = torch.searchsorted(
            cumulative_N, uniform(self.seed, prompt, position) * cumulative_N[-1], right=True
        )
        return int(ids_N[min(int(drawn), len(cumulative_N) - 1)])

    def candidates(self, logits_V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(probabilities in float64 up to a factor, ids) of the tokens to draw among, the likeliest first.

        logits_V: penalised already.
        """
        kept = len(logits_V) if self.top_k is None else min(self.top_k, len(logits_V))
        few = kept < len(logits_V) // 8  # where finding them is quicker than sorting all
        logits_N, ids_N = logits_V.topk(kept) if few else logits_V.sort(descending=True, stable=True)
        logits_N, ids_N = logits_N[:kept].double(), ids_N[:kept]
        p_N = torch.softmax((logits_N - logits_N[0]) / self.temperature, dim=-1)
        if self.top_p is not None:
            before_N = p_N.cumsum(0) - p_N
            p_N = p_N[before_N < self.top_p]
        if self.min_p is not None:
            p_N = p_N[p_N >= self.min_p * p_N[0]]
        return p_N, ids_N[: len(p_N)]


def penalised(logits_V: torch.Tensor, seen: Sequence[int], penalty: float) -> torch.Tensor:
    """The logits, those of `seen` made smaller. See `Sampling`."""
    ids = torch.tensor(sorted(set(seen)), dtype=torch.int64, device=logits_V.device)
    found = logits_V[ids]
    return logits_V.index_copy(0, ids, torch.where(found > 0, found / penalty, found * penalty))


def uniform(seed: int, prompt: int, position: int) -> float:
    """A number in [0, 1) that depends on the three alone, the same on every device."""
    digest = hashlib.blake2b(f"{seed},{prompt},{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53
