"""A decoder-only language model: token ids in, logits or a loss out. Knows no devices and no meshes."""

from __future__ import annotations

from typing import TYPE_CHECKING, overload

import torch
from torch import nn

from colossus.architecture import Architecture
from colossus.models.block import Block
from colossus.models.cache import KVCache
from colossus.models.linear import Embedding, Linear
from colossus.models.loss import cross_entropy
from colossus.models.norm import norm
from colossus.models.packed import product
from colossus.models.sight import sight
from colossus.models.whole import Whole

if TYPE_CHECKING:
    from colossus.models.copies import Copies


class Decoder(nn.Module):
    """The model that `arch` describes; its parameters are exactly `architecture.parameter_table(arch)`.

    The memory of the parameters is not initialised: see `models.init`, or `models.build` for both.
    part: the layers that this is, a stage of a pipeline; with the embeddings if it is the first, with the
        output if it is the last. None: all.
    compute_dtype: type of activations and matrix products. The weights keep their own (see `precision`).
    compiled: layers are, and on a GPU the loss is too.
    fused_attention: on a processor, also where plain products are usually quicker (see `models.attend`).
    hardware: "cpu" or "cuda", whose choices it makes; None: those of the device that its tensors are on.
    loads: of the layers of experts, one a forward pass in training, until `Balance` takes them. z_terms: the
        z-loss of such passes, of the part that has the output, until `program.take_z_loss` takes them.
    copies: of its matrices, on which it generates (see `models.copies`); None: it has none.
    whole: how what this rank computes is part of a whole; None where it computes all.
    """

    def __init__(self, arch: Architecture, part: range | None = None) -> None:
        super().__init__()
        part = range(arch.num_layers) if part is None else part
        self.arch, self.part = arch, part
        self.is_first, self.is_last = part.start == 0, part.stop == arch.num_layers
        self.compute_dtype, self.compiled = torch.float32, False
        self.fused_attention = False
        self.hardware: str | None = None
        looked_up = self.is_first or (self.is_last and arch.tie_embeddings)
        self.embedding = Embedding(arch.vocab_size, arch.hidden_size) if looked_up else None
        learned = self.is_first and arch.position == "learned"
        self.position_embedding = Embedding(arch.max_seq_len, arch.hidden_size) if learned else None
        self.layers = nn.ModuleList()
        for layer in part:
            self.layers.add_module(str(layer), Block(arch, layer))
        self.norm = norm(arch) if self.is_last else None
        has_head = self.is_last and not arch.tie_embeddings
        self.head = Linear(arch.hidden_size, arch.vocab_size) if has_head else None
        self.loads: list[torch.Tensor] = []
        self.copies: Copies | None = None
        self.z_terms: list[torch.Tensor] = []
        self.whole: Whole | None = None

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
        x_BTD: torch.Tensor | None = None,
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
        x_BTD: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Logits [B, T, V] in compute_dtype, or, with targets, (summed loss in fp32, number of targets).

        tokens_BT: int64 ids. targets_BT: the id that should follow each; -100 is not scored.
        documents_BT: equal numbers mark the tokens of one packed document; attention stays inside it.
        Positions count on through a window, so a document's scores depend only on differences of positions.
        cache: the tokens follow those that it holds, and are added to it. Not with documents.
        token_share: of each row, [B]: 1 / tokens of the global batch, 0 where the row is no sample of it. The
            terms that keep experts' loads alike join what is minimised, through the gradient alone, as z-loss
            does; the loss that is returned is the cross entropy.
        only_last: logits that follow the last token alone, [B, 1, V].
        x_BTD: what the part before this one returned. A part that is not the last returns the like.
        """
        num_tokens = tokens_BT.shape[1]
        if self.whole is not None:
            tokens_BT, targets_BT, documents_BT = self.whole.pad(tokens_BT, targets_BT, documents_BT)
        x_BTD = self.hidden(tokens_BT, documents_BT, cache, token_share, x_BTD)
        if not self.is_last:
            return x_BTD
        output = self.embedding if self.head is None else self.head
        assert output is not None
        cap = self.arch.logit_soft_cap
        if targets_BT is not None:
            share, keep = None, False
            if self.whole is not None:
                targets_BT = self.whole.own(targets_BT)
                share, keep = self.whole.vocab, self.whole.keep_gradients
            x_ND, targets_N = x_BTD.flatten(0, 1), targets_BT.flatten()
            terms = self.z_terms if token_share is not None and z_loss else None
            return cross_entropy(
                x_ND, output.weight, targets_N, z_loss, cap, share, keep, self.compiled, terms, self.hardware
            )
        logits_BTV = product(x_BTD[:, -1:] if only_last else x_BTD, output.weight, None, output.packed)
        if self.whole is not None:
            logits_BTV = self.whole.all_logits(logits_BTV)[:, :num_tokens]
        return logits_BTV if cap is None else cap * torch.tanh(logits_BTV / cap)

    def hidden(
        self,
        tokens_BT: torch.Tensor,
        documents_BT: torch.Tensor | None = None,
        cache: KVCache | None = None,
        token_share: torch.Tensor | None = None,
        x_BTD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the output matrix is multiplied with, x_BTD in compute_dtype: the normalised output of the
        last layer, scaled where the family does; of a part that is not the last, its layers' output."""
        arch, exact = self.arch, torch.promote_types(self.compute_dtype, torch.float32)
        if cache is not None:
            cache.reserve(tokens_BT.shape[1])
        if self.whole is None:
            seen = sight(arch, tokens_BT, documents_BT, cache, exact, hardware=self.hardware)
        else:
            seen = self.whole.sight(arch, tokens_BT, documents_BT, exact, self.hardware)
            tokens_BT = self.whole.own(tokens_BT)
        seen = seen._replace(fused=self.fused_attention)
        if self.is_first:
            assert self.embedding is not None
            x_BTD = self.embedding(tokens_BT)
            if self.position_embedding is not None:
                x_BTD = x_BTD + self.position_embedding(seen.positions)
            scale = arch.embedding_scale
            x_BTD = (x_BTD * scale if scale != 1 else x_BTD).to(self.compute_dtype)
        assert x_BTD is not None, "a part that is not the first takes what the one before it returned"
        loads = []
        for layer in self.layers:
            x_BTD, load = layer(x_BTD, seen, cache, token_share)
            if load is not None:
                loads.append(load)
        if token_share is not None and loads:
            self.loads.append(torch.stack(loads))
        if cache is not None:
            cache.advance(tokens_BT.shape[1])
        if self.norm is None:
            return x_BTD
        x_BTD = self.norm(x_BTD)
        return x_BTD * arch.logit_scale if arch.logit_scale != 1 else x_BTD
