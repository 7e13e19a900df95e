"""What a model asks where it computes a part of what a batch needs: ranks share its tokens or vocabulary."""

from __future__ import annotations

from typing import Protocol

import torch

from colossus.architecture import Architecture
from colossus.models.loss import VocabShare
from colossus.models.sight import Sight

Maybe = torch.Tensor | None


class Whole(Protocol):
    """How a rank's part and the whole batch, which all ranks are given, belong together: `parallel.whole`.

    vocab: where ranks share the output matrix. keep_gradients: see `models.loss.cross_entropy`.
    """

    keep_gradients: bool

    @property
    def vocab(self) -> VocabShare | None: ...

    def pad(
        self, tokens_BT: torch.Tensor, targets_BT: Maybe, documents_BT: Maybe
    ) -> tuple[torch.Tensor, Maybe, Maybe]:
        """Sequences made as long as ranks can share, with tokens that are not scored."""
        ...

    def own(self, x_BT: torch.Tensor) -> torch.Tensor:
        """Of something that every token has, what this rank's tokens have."""
        ...

    def sight(
        self,
        arch: Architecture,
        tokens_BT: torch.Tensor,
        documents_BT: Maybe,
        dtype: torch.dtype,
        hardware: str | None = None,
    ) -> Sight:
        """As `models.sight.sight`, of this rank's tokens."""
        ...

    def all_logits(self, logits_BTV: torch.Tensor) -> torch.Tensor:
        """Of this rank's tokens and vocabulary -> of all, in order."""
        ...
