"""Context parallelism: ranks share the tokens of each sequence.

gather: a rank has two blocks of each sequence, one from its head and one from its tail, so that all ranks
have as many scores to compute (Llama 3, arXiv 2407.21783, section 3.3.2); keys and values are gathered.
ulysses: a rank has one block, and for the scores all tokens of a part of the heads (Jacobs et al. 2023,
arXiv 2309.14509).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from colossus.architecture import Architecture
from colossus.models.attend import Scores, attend
from colossus.models.sight import Sight, sight
from colossus.parallel.collectives import Group, exchange, gather

if TYPE_CHECKING:
    from colossus.models.block_mask import Mask

Maybe = torch.Tensor | None


class Gathered:
    """This rank's blocks are the r-th and the r-th from the end, of 2 x cp."""

    def __init__(self, group: Group) -> None:
        self.group = group
        last = 2 * group.size - 1
        self.mine = (group.rank, last - group.rank)
        order = [block for rank in range(group.size) for block in (rank, last - rank)]
        self._places = [order.index(block) for block in range(last + 1)]  # of each block, among the gathered

    @property
    def num_blocks(self) -> int:
        return 2 * self.group.size

    def own(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        blocks = x.chunk(self.num_blocks, dim=dim)
        return torch.cat([blocks[block] for block in self.mine], dim=dim)

    def gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return self.whole(x, dim)

    def whole(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """All ranks' parts, in the order of tokens."""
        blocks = gather(x, self.group, dim).chunk(self.num_blocks, dim=dim)
        return torch.cat([blocks[place] for place in self._places], dim=dim)

    def sight(
        self,
        arch: Architecture,
        tokens_BS: torch.Tensor,
        documents: Maybe,
        dtype: torch.dtype,
        hardware: str | None = None,
    ) -> Sight:
        """With masks [..., T, S] of this rank's T tokens over all S."""
        of = self.own(torch.arange(tokens_BS.shape[1], device=tokens_BS.device), 0)
        return sight(arch, tokens_BS, documents, None, dtype, of, hardware)._replace(context=self)

    def attend(
        self,
        q_BHTE: torch.Tensor,
        k_BKSE: torch.Tensor,
        v_BKSE: torch.Tensor,
        mask: Mask | None,
        scores: Scores,
        temperature: Maybe,
        sinks_H: Maybe = None,
        *,
        fused: bool = False,
    ) -> torch.Tensor:
        """Block by block: none looks at what comes after its end. A mask by blocks says so itself."""
        if mask is not None and not isinstance(mask, torch.Tensor):
            return attend(q_BHTE, k_BKSE, v_BKSE, mask, scores, temperature, sinks_H, fused=fused)
        length = q_BHTE.shape[2] // 2
        parts = []
        for half, block in enumerate(self.mine):
            rows, keys = slice(half * length, (half + 1) * length), (block + 1) * length
            parts.append(
                attend(
                    q_BHTE[:, :, rows],
                    k_BKSE[:, :, :keys],
                    v_BKSE[:, :, :keys],
                    None if mask is None else mask[..., rows, :keys],
                    scores,
                    None if temperature is None else temperature[..., rows],
                    sinks_H,
                    fused=fused,
                )
            )
        return torch.cat(parts, dim=2)


class Ulysses:
    """This rank's block is the r-th of cp; its heads are the r-th of cp parts."""

    def __init__(self, group: Group) -> None:
        self.group = group

    @property
    def num_blocks(self) -> int:
        return self.group.size

    def own(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        return x.chunk(self.group.size, dim=dim)[self.group.rank]

    def gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Nothing is missing: heads change places in `attend`."""
        return x

    def whole(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return gather(x, self.group, dim)

    def sight(
        self,
        arch: Architecture,
        tokens_BS: torch.Tensor,
        documents: Maybe,
        dtype: torch.dtype,
        hardware: str | None = None,
    ) -> Sight:
        """Rotations of this rank's tokens; masks of all, [..., S, S]."""
        seen = sight(arch, tokens_BS, documents, None, dtype, hardware=hardware)
        turned = None if seen.rotations is None else self.own(seen.rotations, -2)
        return seen._replace(positions=self.own(seen.positions, -1), rotations=turned, context=self)

    def attend(
        self,
        q_BHTE: torch.Tensor,
        k_BKTE: torch.Tensor,
        v_BKTE: torch.Tensor,
        mask: Mask | None,
        scores: Scores,
        temperature: Maybe,
        sinks_H: Maybe = None,
        *,
        fused: bool = False,
    ) -> torch.Tensor:
        """Of all tokens' queries of this rank's heads; what they see goes back to the tokens' ranks."""
        q, k, v = (self._to_heads(x) for x in (q_BHTE, k_BKTE, v_BKTE))
        sinks = None if sinks_H is None else self.own(sinks_H, 0)
        return self._to_tokens(attend(q, k, v, mask, scores, temperature, sinks, fused=fused))

    def _to_heads(self, x_BHTE: torch.Tensor) -> torch.Tensor:
        """[B, H, T/cp, E] -> [B, H/cp, T, E]."""
        ranks, batch = self.group.size, x_BHTE.shape[0]
        sent = torch.cat(x_BHTE.chunk(ranks, dim=1))
        received = exchange(sent, self.group, [batch] * ranks, [batch] * ranks)
        return torch.cat(received.chunk(ranks), dim=2)

    def _to_tokens(self, x_BHTE: torch.Tensor) -> torch.Tensor:
        """[B, H/cp, T, E] -> [B, H, T/cp, E]."""
        ranks, batch = self.group.size, x_BHTE.shape[0]
        sent = torch.cat(x_BHTE.chunk(ranks, dim=2))
        received = exchange(sent, self.group, [batch] * ranks, [batch] * ranks)
        return torch.cat(received.chunk(ranks), dim=1)


ContextParallel = Gathered | Ulysses
METHODS: dict[str, type[Gathered] | type[Ulysses]] = {"gather": Gathered, "ulysses": Ulysses}
