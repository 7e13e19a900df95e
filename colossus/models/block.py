"""One layer of a decoder."""

from __future__ import annotations

import torch
from torch import nn

from colossus.architecture import Architecture
from colossus.models.attention import attention
from colossus.models.cache import KVCache
from colossus.models.experts import MoE
from colossus.models.mlp import MLP
from colossus.models.norm import norm
from colossus.models.sight import Sight


class Block(nn.Module):
    """One layer: attention and feed-forward, each added to the residual stream.

    Norms come before a part, after it (on what it adds), or both, as `arch.norm_placement` says. The
    feed-forward part is an MLP, a mixture of experts, or the scaled sum of both (Grok-2).
    """

    def __init__(self, arch: Architecture, layer: int) -> None:
        super().__init__()
        before, after = arch.norm_placement != "post", arch.norm_placement != "pre"
        self.attention_norm = norm(arch) if before else nn.Identity()
        self.attention = attention(arch, layer)
        self.attention_post_norm = norm(arch) if after else nn.Identity()
        self.mlp_norm = norm(arch) if before else nn.Identity()
        self.mlp = MLP(arch, arch.intermediate_size, arch.mlp_bias) if arch.has_mlp(layer) else None
        self.moe = MoE(arch) if arch.has_experts(layer) else None
        self.mlp_post_norm = norm(arch) if after else nn.Identity()
        self.scale = arch.experts.beside_scale if arch.experts is not None else 1.0

    def forward(
        self,
        x_BTD: torch.Tensor,
        sight: Sight,
        cache: KVCache | None = None,
        token_share: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x_BTD -> (the same shape and type, the load of experts). See `Router.forward` for token_share."""
        mixed_BTD = self.attention(self.attention_norm(x_BTD), sight, cache)
        x_BTD = x_BTD + self.attention_post_norm(mixed_BTD)
        y_BTD, load = self._feed_forward(self.mlp_norm(x_BTD), token_share)
        return x_BTD + self.mlp_post_norm(y_BTD), load

    def _feed_forward(
        self, x_BTD: torch.Tensor, token_share: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.moe is None:
            assert self.mlp is not None
            return self.mlp(x_BTD), None
        y_BTD, load = self.moe(x_BTD, token_share)
        return y_BTD if self.mlp is None else (y_BTD + self.mlp(x_BTD)) * self.scale, load
