"""Causal self-attention with grouped queries, packed documents and a key/value cache."""

from __future__ import annotations

import torch
from torch import nn

from colossus.architecture import Architecture
from colossus.models.attend import Scores
from colossus.models.cache import KVCache
from colossus.models.latent import LatentAttention
from colossus.models.linear import Linear, products
from colossus.models.norm import RMSNorm
from colossus.models.rope import rotate
from colossus.models.sight import Sight


def attention(arch: Architecture, layer: int) -> nn.Module:
    """The attention that `arch` names."""
    return LatentAttention(arch, layer) if arch.latent is not None else Attention(arch, layer)


class Attention(nn.Module):
    """Grouped-query attention: num_heads queries share num_kv_heads keys and values (Ainslie et al. 2023)."""

    def __init__(self, arch: Architecture, layer: int) -> None:
        super().__init__()
        heads, kv = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
        self.head_dim, self.layer = arch.head_dim, layer
        self.windowed, self.norm_whole = arch.is_windowed(layer), arch.qk_norm_over == "projection"
        self.scores = Scores(arch.scale_of_scores, arch.attention_soft_cap)
        self.sinks = nn.Parameter(torch.empty(arch.num_heads)) if arch.attention_sinks else None
        self.wq = Linear(arch.hidden_size, heads, arch.attention_bias)
        self.wk = Linear(arch.hidden_size, kv, arch.attention_bias)
        self.wv = Linear(arch.hidden_size, kv, arch.attention_bias)
        self.wo = Linear(heads, arch.hidden_size, arch.attention_out_bias)
        widths = (heads, kv) if self.norm_whole else (self.head_dim, self.head_dim)
        self.q_norm = RMSNorm(widths[0], arch.norm_eps) if arch.qk_norm else None
        self.k_norm = RMSNorm(widths[1], arch.norm_eps) if arch.qk_norm else None

    def forward(self, x_BTD: torch.Tensor, sight: Sight, cache: KVCache | None = None) -> torch.Tensor:
        """x_BTD -> the same shape and type."""
        q, k, v = products(x_BTD, self.wq, self.wk, self.wv)
        q_BTHE, k_BTKE, v_BTKE = (
            self._heads(q, self.q_norm),
            self._heads(k, self.k_norm),
            self._heads(v, None),
        )
        if sight.rotations is not None:
            q_BTHE, k_BTKE = rotate(q_BTHE, sight.rotations), rotate(k_BTKE, sight.rotations)
        q_BHTE, k_BKSE, v_BKSE = (x.transpose(1, 2) for x in (q_BTHE, k_BTKE, v_BTKE))
        if cache is not None:
            k_BKSE, v_BKSE = cache.append(self.layer, k_BKSE, v_BKSE)
        if sight.context is not None:
            k_BKSE, v_BKSE = sight.context.gather(k_BKSE, 2), sight.context.gather(v_BKSE, 2)
        mixed_BHTE = sight.attend(q_BHTE, k_BKSE, v_BKSE, self.windowed, self.scores, self.sinks)
        return self.wo(mixed_BHTE.transpose(1, 2).flatten(-2))

    def _heads(self, x: torch.Tensor, norm: nn.Module | None) -> torch.Tensor:
        """[B, T, heads x E] -> [B, T, heads, E], normalised before or after the split."""
        if norm is not None and self.norm_whole:
            x = norm(x)
        x = x.unflatten(-1, (-1, self.head_dim))
        return norm(x) if norm is not None and not self.norm_whole else x
