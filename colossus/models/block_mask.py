"""Which keys queries may look at, in blocks instead of pairs: a GPU's kernel passes over blocks that nobody
looks at, and asks for the rule itself only where a block is looked at in part.

Of 32,768 tokens a mask of all pairs takes 1.1 GB a row, its blocks 1 MB.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from colossus.perf.parts import BLOCK

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from colossus.models.attend import Scores

    Mask = torch.Tensor | BlockMask  # of all pairs, or of blocks of them


def block_mask(
    positions_T: torch.Tensor,
    num_keys: int,
    window: int | None = None,
    documents_BS: torch.Tensor | None = None,
    visible_BS: torch.Tensor | None = None,
) -> BlockMask:
    """Of queries at these positions, among so many keys: each looks at itself and at what came before it, of
    that at the last `window` alone, in its own document alone, and beside itself only at what is visible.
    Where positions or documents jump within a block, some blocks are kept that nobody looks at."""
    from torch.nn.attention.flex_attention import BlockMask

    at_T = positions_T.int()
    own_BT = None if documents_BS is None else documents_BS[:, positions_T]

    def may_look(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        behind = at_T[q] - k
        may = behind >= 0
        if window is not None:
            may = may & (behind < window)
        if own_BT is not None and documents_BS is not None:
            may = may & (own_BT[b, q] == documents_BS[b, k])
        if visible_BS is not None:
            may = may & (visible_BS[b, k] | (behind == 0))
        return may

    low_Q, high_Q = (x.unsqueeze(-1) for x in _bounds(at_T))
    low_K, high_K = _bounds(torch.arange(num_keys, device=at_T.device, dtype=torch.int32))
    # What is beyond the last token is looked at by none, and looks at none: no such block is looked at whole.
    every = (high_K <= low_Q) & _is_full(low_Q[:, 0], at_T.shape[0]).unsqueeze(-1) & _is_full(low_K, num_keys)
    some = low_K <= high_Q
    if window is not None:
        some, every = some & (low_Q - high_K < window), every & (high_Q - low_K < window)
    if own_BT is not None and documents_BS is not None:
        least_BQ, most_BQ = (x.unsqueeze(-1) for x in _bounds(own_BT))
        least_BK, most_BK = (x.unsqueeze(-2) for x in _bounds(documents_BS))
        some = some & (least_BQ <= most_BK) & (least_BK <= most_BQ)
        every = every & (least_BQ == most_BK) & (least_BK == most_BQ)
    if visible_BS is not None:
        all_BK, any_BK = (x.unsqueeze(-2) > 0 for x in _bounds(visible_BS.int()))
        itself = (low_K <= high_Q) & (high_K >= low_Q)
        some, every = some & (any_BK | itself), every & all_BK
    heads = (
        (slice(None), None) if every.ndim == 3 else (None, None)
    )  # rows of a batch, or one for all of them
    return BlockMask.from_kv_blocks(
        *_listed((some & ~every)[heads]),
        *_listed((some & every)[heads]),
        BLOCK_SIZE=BLOCK,
        mask_mod=may_look,
        seq_lengths=(at_T.shape[0], num_keys),
    )


def _bounds(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the most of each block of the last dimension."""
    length = x.shape[-1]
    last = torch.arange(-(-length // BLOCK) * BLOCK, device=x.device).clamp_max(length - 1)
    least, most = x[..., last].unflatten(-1, (-1, BLOCK)).aminmax(dim=-1)
    return least, most


def _is_full(blocks: torch.Tensor, length: int) -> torch.Tensor:
    """Whether each of the blocks has all its tokens: all but the last do."""
    return torch.arange(1, len(blocks) + 1, device=blocks.device) * BLOCK <= length


def _listed(blocks_BHQK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks of keys each block of queries has, and which, first."""
    order = blocks_BHQK.byte().argsort(dim=-1, descending=True, stable=True)
    return blocks_BHQK.sum(-1, dtype=torch.int32), order.int()


def attend_by_blocks(
    q_BHTE: torch.Tensor,
    k_BKSE: torch.Tensor,
    v_BKSE: torch.Tensor,
    mask: BlockMask,
    scores: Scores,
    temperature_T: torch.Tensor | None = None,
    sinks_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `models.attend.attend`, in one fused kernel: [B, H, T, E of v]."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    cap, heat_T = scores.soft_cap, None if temperature_T is None else temperature_T.float()

    def changed(
        score: torch.Tensor, b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> torch.Tensor:
        if cap is not None:
            score = cap * torch.tanh(score / cap)
        return score if heat_T is None else score * heat_T[q]

    # A compiled layer compiles what it calls; what is not compiled would write all scores.
    flex = flex_attention if torch.compiler.is_compiling() else _compiled()
    y_BHTE, more = flex(
        q_BHTE,
        k_BKSE,
        v_BKSE,
        score_mod=None if cap is None and heat_T is None else changed,
        block_mask=mask,
        scale=scores.scale,
        enable_gqa=q_BHTE.shape[1] != k_BKSE.shape[1],
        return_aux=AuxRequest(lse=sinks_H is not None),
    )
    if sinks_H is None:
        return y_BHTE
    # One more key, of value 0, leaves to the others exp(lse) / (exp(lse) + exp(sink)).
    left_BHT = torch.sigmoid(more.lse - sinks_H.to(more.lse.dtype).unsqueeze(-1))
    return y_BHTE * left_BHT.unsqueeze(-1).to(y_BHTE.dtype)


@lru_cache(maxsize=1)
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
