"""How what a rank computes of a batch, and the whole batch, belong together: see `models.whole.Whole`.

Every rank of a replica is given the same rows. Ranks of cp take their tokens of them; ranks of tp share the
vocabulary, and between the products the tokens again.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from colossus.architecture import IGNORED, Architecture
from colossus.layout import Layout
from colossus.models.sight import Sight, sight
from colossus.parallel.collectives import Group, all_reduce, gather
from colossus.parallel.context import METHODS, ContextParallel

Maybe = torch.Tensor | None


class VocabShare:
    """This rank's rows of the output matrix begin with `first`."""

    def __init__(self, vocab_size: int, group: Group) -> None:
        self.first = vocab_size // group.size * group.rank
        self._group = group

    def max(self, x: torch.Tensor) -> torch.Tensor:
        return all_reduce(x, self._group, "max")

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return all_reduce(x, self._group)


class RankShare:
    """What one rank computes of the rows that its replica's ranks are given."""

    def __init__(self, arch: Architecture, layout: Layout, cp: Group, tp: Group) -> None:
        self.context: ContextParallel | None = METHODS[layout.cp_method](cp) if cp.size > 1 else None
        self.vocab = VocabShare(arch.vocab_size, tp) if tp.size > 1 else None
        self.keep_gradients = False
        self._tp = tp
        blocks = 1 if self.context is None else self.context.num_blocks
        self._multiple = math.lcm(blocks, cp.size * tp.size)

    def pad(
        self, tokens_BT: torch.Tensor, targets_BT: Maybe, documents_BT: Maybe
    ) -> tuple[torch.Tensor, Maybe, Maybe]:
        missing = -tokens_BT.shape[1] % self._multiple
        if not missing:
            return tokens_BT, targets_BT, documents_BT
        padded = F.pad(tokens_BT, (0, missing))
        targets = None if targets_BT is None else F.pad(targets_BT, (0, missing), value=IGNORED)
        return padded, targets, None if documents_BT is None else F.pad(documents_BT, (0, missing), value=-1)

    def own(self, x_BT: torch.Tensor) -> torch.Tensor:
        return x_BT if self.context is None else self.context.own(x_BT)

    def sight(
        self,
        arch: Architecture,
        tokens_BT: torch.Tensor,
        documents_BT: Maybe,
        dtype: torch.dtype,
        hardware: str | None = None,
    ) -> Sight:
        if self.context is None:
            return sight(arch, tokens_BT, documents_BT, None, dtype, hardware=hardware)
        return self.context.sight(arch, tokens_BT, documents_BT, dtype, hardware)

    def all_logits(self, logits_BTV: torch.Tensor) -> torch.Tensor:
        logits_BTV = gather(logits_BTV, self._tp, -1)
        return logits_BTV if self.context is None else self.context.whole(logits_BTV, 1)
