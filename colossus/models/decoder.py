"""A decoder-only language model: token ids in, logits or a loss out. Knows no devices and no meshes."""

from __future__ import annotations

from typing import overload

import torch
from torch import nn

from colossus.architecture import Architecture
from colossus.models.attention import attention
from colossus.models.cache import KVCache
from colossus.models.experts import MoE
from colossus.models.linear import Embedding, Linear
from colossus.models.loss import cross_entropy
from colossus.models.mlp import MLP
from colossus.models.norm import norm
from colossus.models.packed import product
from colossus.models.sight import Sight, positions, sight


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


class Decoder(nn.Module):
    """The model that `arch` describes; its parameters are exactly `architecture.parameter_table(arch)`.

    The memory of the parameters is not initialised: see `models.init`, or `models.build` for both.
    compute_dtype: type of activations and matrix products. The weights keep their own (see `precision`).
    loads: of the layers of experts, one a forward pass in training, until `Balance` takes them.
    """

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.arch = arch
        self.compute_dtype = torch.float32
        self.embedding = Embedding(arch.vocab_size, arch.hidden_size)
        learned = arch.position == "learned"
        self.position_embedding = Embedding(arch.max_seq_len, arch.hidden_size) if learned else None
        self.layers = nn.ModuleList(Block(arch, layer) for layer in range(arch.num_layers))
        self.norm = norm(arch)
        self.head = None if arch.tie_embeddings else Linear(arch.hidden_size, arch.vocab_size)
        self.loads: list[torch.Tensor] = []

    @overload
    def forward(
        self, tokens_BT: torch.Tensor, *, cache: KVCache | None = None, only_last: bool = False
    ) -> torch.Tensor: ...
    @overload
    def forward(
        self,
        tokens_BT: torch.Tensor,
        targets_BT: torch.Tensor,
        documents_BT: torch.Tensor | None = None,
        z_loss: float = 0.0,
        *,
        token_share: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...
    def forward(
        self,
        tokens_BT: torch.Tensor,
        targets_BT: torch.Tensor | None = None,
        documents_BT: torch.Tensor | None = None,
        z_loss: float = 0.0,
        cache: KVCache | None = None,
        token_share: torch.Tensor | None = None,
        only_last: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Logits [B, T, V] in compute_dtype, or, with targets, (summed loss in fp32, number of targets).

        tokens_BT: int64 ids. targets_BT: the id that should follow each; -100 is not scored.
        documents_BT: equal numbers mark the tokens of one packed document; attention stays inside it.
        Positions count on through a window, so a document's scores depend only on differences of positions.
        cache: the tokens follow those that it holds, and are added to it. Not with documents.
        token_share: of each row, [B]: 1 / tokens of the global batch, 0 where the row is no sample of it. The
            terms that keep experts' loads alike join what is minimised, through the gradient alone; the loss
            that is returned is the cross entropy.
        only_last: logits that follow the last token alone, [B, 1, V].
        """
        x_BTD = self.hidden(tokens_BT, documents_BT, cache, token_share)
        output = self.embedding if self.head is None else self.head
        cap = self.arch.logit_soft_cap
        if targets_BT is not None:
            return cross_entropy(x_BTD.flatten(0, 1), output.weight, targets_BT.flatten(), z_loss, cap)
        logits_BTV = product(x_BTD[:, -1:] if only_last else x_BTD, output.weight, None, output.packed)
        return logits_BTV if cap is None else cap * torch.tanh(logits_BTV / cap)

    def hidden(
        self,
        tokens_BT: torch.Tensor,
        documents_BT: torch.Tensor | None = None,
        cache: KVCache | None = None,
        token_share: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the output matrix is multiplied with, x_BTD in compute_dtype: the normalised output of the
        last layer, scaled where the family does."""
        arch, exact = self.arch, torch.promote_types(self.compute_dtype, torch.float32)
        if cache is not None:
            cache.reserve(tokens_BT.shape[1])
        seen = sight(arch, tokens_BT, documents_BT, cache, exact)
        x_BTD = self.embedding(tokens_BT)
        if self.position_embedding is not None:
            x_BTD = x_BTD + self.position_embedding(positions(tokens_BT, cache))
        x_BTD = (x_BTD * arch.embedding_scale if arch.embedding_scale != 1 else x_BTD).to(self.compute_dtype)
        loads = []
        for layer in self.layers:
            x_BTD, load = layer(x_BTD, seen, cache, token_share)
            if load is not None:
                loads.append(load)
        if token_share is not None and loads:
            self.loads.append(torch.stack(loads))
        if cache is not None:
            cache.advance(tokens_BT.shape[1])
        x_BTD = self.norm(x_BTD)
        return x_BTD * arch.logit_scale if arch.logit_scale != 1 else x_BTD
