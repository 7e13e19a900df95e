"""Causal self-attention with grouped queries, packed documents and a key/value cache."""

from __future__ import annotations

import torch
from torch import nn

from colossus.architecture import Architecture
from colossus.models.attend import attend
from colossus.models.linear import Linear
from colossus.models.norm import RMSNorm
from colossus.models.rope import rotate


class KVCache:
    """Keys and values of the tokens seen so far, in buffers of a fixed size.

    length: tokens held; `Decoder.forward` adds to it. Rotations depend on it, so all rows of a batch are at
    the same position.
    """

    def __init__(
        self,
        arch: Architecture,
        batch: int,
        max_tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (batch, max_tokens, arch.num_kv_heads, arch.head_dim)
        self.keys_BTKE = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(arch.num_layers)]
        self.values_BTKE = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(arch.num_layers)]
        self.max_tokens = max_tokens
        self.length = 0

    def append(
        self, layer: int, k_BTKE: torch.Tensor, v_BTKE: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the keys and values of new tokens; returns all of that layer's, [B, length + T, K, E]."""
        end = self.length + k_BTKE.shape[1]
        assert end <= self.max_tokens, f"a cache of {self.max_tokens} tokens cannot hold {end}"
        self.keys_BTKE[layer][:, self.length : end] = k_BTKE
        self.values_BTKE[layer][:, self.length : end] = v_BTKE
        return self.keys_BTKE[layer][:, :end], self.values_BTKE[layer][:, :end]


def document_mask(documents_BT: torch.Tensor) -> torch.Tensor:
    """True where a token may look: at itself and earlier tokens of its own document. [B, 1, T, T]."""
    same_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
    return same_BTT.tril().unsqueeze(1)


def cached_mask(num_cached: int, num_new: int, device: torch.device) -> torch.Tensor | None:
    """What `num_new` tokens after `num_cached` others may look at, [T, num_cached + T].

    None where the plain causal rule, or no rule (a single token), says the same.
    """
    if num_cached == 0:
        return None
    every = torch.ones(num_new, num_cached + num_new, dtype=torch.bool, device=device)
    return every.tril(diagonal=num_cached)


class Attention(nn.Module):
    """Grouped-query attention: num_heads queries share num_kv_heads keys and values (Ainslie et al. 2023)."""

    def __init__(self, arch: Architecture, layer: int) -> None:
        super().__init__()
        heads, kv_heads, self.head_dim = arch.num_heads, arch.num_kv_heads, arch.head_dim
        self.layer = layer
        self.wq = Linear(arch.hidden_size, heads * self.head_dim)
        self.wk = Linear(arch.hidden_size, kv_heads * self.head_dim)
        self.wv = Linear(arch.hidden_size, kv_heads * self.head_dim)
        self.wo = Linear(heads * self.head_dim, arch.hidden_size)
        self.q_norm = RMSNorm(self.head_dim, arch.norm_eps) if arch.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, arch.norm_eps) if arch.qk_norm else None

    def forward(
        self,
        x_BTD: torch.Tensor,
        rotations_2TE: torch.Tensor,
        mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """x_BTD -> the same shape and type. mask: True where a query may look; None: the causal rule."""
        q_BTHE = self.wq(x_BTD).unflatten(-1, (-1, self.head_dim))
        k_BTKE = self.wk(x_BTD).unflatten(-1, (-1, self.head_dim))
        v_BTKE = self.wv(x_BTD).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHE, k_BTKE = self.q_norm(q_BTHE), self.k_norm(k_BTKE)
        q_BTHE, k_BTKE = rotate(q_BTHE, rotations_2TE), rotate(k_BTKE, rotations_2TE)
        if cache is not None:
            k_BTKE, v_BTKE = cache.append(self.layer, k_BTKE, v_BTKE)
        mixed_BHTE = attend(q_BTHE.transpose(1, 2), k_BTKE.transpose(1, 2), v_BTKE.transpose(1, 2), mask)
        return self.wo(mixed_BHTE.transpose(1, 2).flatten(-2))
