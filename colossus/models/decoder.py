"""A decoder-only language model: token ids in, logits or a loss out. Knows no devices and no meshes."""

from __future__ import annotations

from typing import overload

import torch
import torch.nn.functional as F
from torch import nn

from colossus.architecture import Architecture
from colossus.models.attention import Attention, KVCache, cached_mask, document_mask
from colossus.models.linear import Embedding, Linear
from colossus.models.loss import cross_entropy
from colossus.models.mlp import SwiGLU
from colossus.models.norm import RMSNorm
from colossus.models.rope import rotations


class Block(nn.Module):
    """One layer: attention and feed-forward, each normalised before and added to the residual stream."""

    def __init__(self, arch: Architecture, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(arch.hidden_size, arch.norm_eps)
        self.attention = Attention(arch, layer)
        self.mlp_norm = RMSNorm(arch.hidden_size, arch.norm_eps)
        self.mlp = SwiGLU(arch)

    def forward(
        self,
        x_BTD: torch.Tensor,
        rotations_2TE: torch.Tensor,
        mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """x_BTD -> the same shape and type. For the other arguments see `Attention.forward`."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotations_2TE, mask, cache)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class Decoder(nn.Module):
    """The model that `arch` describes; its parameters are exactly `architecture.parameter_table(arch)`.

    The memory of the parameters is not initialised: see `models.init`, or `models.build` for both.
    compute_dtype: type of activations and matrix products. The weights keep their own (see `precision`).
    """

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.arch = arch
        self.compute_dtype = torch.float32
        self.embedding = Embedding(arch.vocab_size, arch.hidden_size)
        self.layers = nn.ModuleList(Block(arch, layer) for layer in range(arch.num_layers))
        self.norm = RMSNorm(arch.hidden_size, arch.norm_eps)
        self.head = None if arch.tie_embeddings else Linear(arch.hidden_size, arch.vocab_size)

    @overload
    def forward(self, tokens_BT: torch.Tensor, *, cache: KVCache | None = None) -> torch.Tensor: ...
    @overload
    def forward(
        self,
        tokens_BT: torch.Tensor,
        targets_BT: torch.Tensor,
        documents_BT: torch.Tensor | None = None,
        z_loss: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...
    def forward(
        self,
        tokens_BT: torch.Tensor,
        targets_BT: torch.Tensor | None = None,
        documents_BT: torch.Tensor | None = None,
        z_loss: float = 0.0,
        cache: KVCache | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Logits [B, T, V] in compute_dtype, or, with targets, (summed loss in fp32, number of targets).

        tokens_BT: int64 ids. targets_BT: the id that should follow each; -100 is not scored.
        documents_BT: equal numbers mark the tokens of one packed document; attention stays inside it.
        Positions count on through a window, so a document's scores depend only on differences of positions.
        cache: the tokens follow those that it holds, and are added to it. Not with documents.
        """
        x_BTD = self.hidden(tokens_BT, documents_BT, cache)
        weight_VD = self.embedding.weight if self.head is None else self.head.weight
        if targets_BT is None:
            return F.linear(x_BTD, weight_VD.to(x_BTD.dtype))
        return cross_entropy(x_BTD.flatten(0, 1), weight_VD, targets_BT.flatten(), z_loss)

    def hidden(
        self,
        tokens_BT: torch.Tensor,
        documents_BT: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """The normalised output of the last layer, x_BTD in compute_dtype."""
        num_cached, num_new = 0 if cache is None else cache.length, tokens_BT.shape[1]
        positions_T = torch.arange(num_cached, num_cached + num_new, device=tokens_BT.device)
        rotations_2TE = rotations(
            self.arch, positions_T, torch.promote_types(self.compute_dtype, torch.float32)
        )
        mask = cached_mask(num_cached, num_new, tokens_BT.device)
        if documents_BT is not None:
            assert cache is None, "packed documents have no cache"
            mask = document_mask(documents_BT)
        x_BTD = self.embedding(tokens_BT).to(self.compute_dtype)
        for layer in self.layers:
            x_BTD = layer(x_BTD, rotations_2TE, mask, cache)
        if cache is not None:
            cache.length += num_new
        return self.norm(x_BTD)
