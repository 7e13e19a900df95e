"""How the next token is chosen. Every draw is a pure function of (seed, prompt, position)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from colossus.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """temperature: 0 takes the likeliest token; 1 draws from the model's own distribution.

    top_k: draw among the k likeliest. top_p: among the fewest likeliest that together have this share.

    Raises:
        UserError: a number outside its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError.field("temperature", self.temperature, "must be 0 (the likeliest token) or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError.field("top_k", self.top_k, "must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError.field("top_p", self.top_p, "must be above 0 and at most 1")

    def choose(self, logits_V: torch.Tensor, prompt: int, position: int) -> int:
        """The next token of the prompt of that index, which will stand at `position`."""
        if self.temperature == 0:
            return int(logits_V.argmax())
        scaled_V = (logits_V.double() - logits_V.max()) / self.temperature
        p_V, ids_V = torch.softmax(scaled_V, dim=-1).sort(descending=True, stable=True)
        if self.top_k is not None:
            p_V = p_V[: self.top_k]
        if self.top_p is not None:
            before_V = p_V.cumsum(0) - p_V
            p_V = p_V[before_V < self.top_p * p_V.sum()]
        cumulative_V = p_V.cumsum(0)
        drawn = torch.searchsorted(
            cumulative_V, uniform(self.seed, prompt, position) * cumulative_V[-1], right=True
        )
        return int(ids_V[min(int(drawn), len(cumulative_V) - 1)])


def uniform(seed: int, prompt: int, position: int) -> float:
    """A number in [0, 1) that depends on the three alone, the same on every device."""
    digest = hashlib.blake2b(f"{seed},{prompt},{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53
