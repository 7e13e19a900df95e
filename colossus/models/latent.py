"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

from __future__ import annotations

import torch
from torch import nn

from colossus.architecture import Architecture
from colossus.models.attend import Scores
from colossus.models.cache import KVCache
from colossus.models.linear import Linear
from colossus.models.norm import RMSNorm
from colossus.models.rope import rotate
from colossus.models.sight import Sight


class LatentAttention(nn.Module):
    """Keys and values come from one normalised vector of L = kv_rank coordinates a token; one rotated key
    serves all heads. A cache keeps these two alone. Queries come from such a vector too, or straight."""

    def __init__(self, arch: Architecture, layer: int) -> None:
        super().__init__()
        assert arch.latent is not None
        self.sizes, self.layer, self.windowed = arch.latent, layer, arch.is_windowed(layer)
        self.scores = Scores(arch.scale_of_scores, arch.attention_soft_cap)
        sizes, heads = arch.latent, arch.num_heads
        if sizes.q_rank is None:
            self.wq = Linear(arch.hidden_size, heads * arch.head_dim)
        else:
            self.wq_down = Linear(arch.hidden_size, sizes.q_rank)
            self.q_norm = RMSNorm(sizes.q_rank, sizes.norm_eps)
            self.wq_up = Linear(sizes.q_rank, heads * arch.head_dim)
        self.wkv_down = Linear(arch.hidden_size, sizes.kv_rank + sizes.rope_dim)
        self.kv_norm = RMSNorm(sizes.kv_rank, sizes.norm_eps)
        self.wkv_up = Linear(sizes.kv_rank, heads * (sizes.nope_dim + sizes.v_dim))
        self.wo = Linear(heads * sizes.v_dim, arch.hidden_size)

    def forward(self, x_BTD: torch.Tensor, sight: Sight, cache: KVCache | None = None) -> torch.Tensor:
        """x_BTD -> the same shape and type."""
        sizes = self.sizes
        straight = sizes.q_rank is None
        q_BTHE = self.wq(x_BTD) if straight else self.wq_up(self.q_norm(self.wq_down(x_BTD)))
        q_BTHE = q_BTHE.unflatten(-1, (-1, sizes.nope_dim + sizes.rope_dim))
        qn_BTHE, qr_BTHE = q_BTHE.split((sizes.nope_dim, sizes.rope_dim), dim=-1)
        c_BTL, kr_BTE = self.wkv_down(x_BTD).split((sizes.kv_rank, sizes.rope_dim), dim=-1)
        c_BTL = self.kv_norm(c_BTL)
        if sight.rotations is not None:
            qr_BTHE = rotate(qr_BTHE, sight.rotations)
            kr_BTE = rotate(kr_BTE.unsqueeze(2), sight.rotations).squeeze(2)
        if cache is not None:
            c_BTL, kr_BTE = cache.append(self.layer, c_BTL, kr_BTE)
        if sight.context is not None:
            c_BTL, kr_BTE = sight.context.gather(c_BTL, 1), sight.context.gather(kr_BTE, 1)
        few = cache is not None and x_BTD.shape[1] == 1
        mix = self._attend_to_latents if few else self._attend_to_heads
        mixed_BHTE = mix(qn_BTHE, qr_BTHE, c_BTL, kr_BTE, sight)
        return self.wo(mixed_BHTE.transpose(1, 2).flatten(-2))

    def _attend_to_heads(
        self,
        qn_BTHE: torch.Tensor,
        qr_BTHE: torch.Tensor,
        c_BSL: torch.Tensor,
        kr_BSE: torch.Tensor,
        sight: Sight,
    ) -> torch.Tensor:
        """Each head's own keys and values are made of the latents: [B, H, T, v_dim]."""
        c_BSL, kr_BSE = c_BSL.to(qn_BTHE.dtype), kr_BSE.to(qn_BTHE.dtype)
        up_BSHE = self.wkv_up(c_BSL).unflatten(-1, (-1, self.sizes.nope_dim + self.sizes.v_dim))
        kn_BSHE, v_BSHE = up_BSHE.split((self.sizes.nope_dim, self.sizes.v_dim), dim=-1)
        kr_BSHE = kr_BSE.unsqueeze(2).expand(-1, -1, kn_BSHE.shape[2], -1)
        q_BTHE, k_BSHE = torch.cat((qn_BTHE, qr_BTHE), -1), torch.cat((kn_BSHE, kr_BSHE), -1)
        q_BHTE, k_BHSE, v_BHSE = (x.transpose(1, 2) for x in (q_BTHE, k_BSHE, v_BSHE))
        return sight.attend(q_BHTE, k_BHSE, v_BHSE, self.windowed, self.scores)

    def _attend_to_latents(
        self,
        qn_BTHE: torch.Tensor,
        qr_BTHE: torch.Tensor,
        c_BSL: torch.Tensor,
        kr_BSE: torch.Tensor,
        sight: Sight,
    ) -> torch.Tensor:
        """The same by (q W_k) c = q (W_k c): one key and value for all heads, and no keys of long ago made
        again for each new token."""
        up_HEL = self.wkv_up.weight.to(qn_BTHE.dtype).unflatten(0, (qn_BTHE.shape[2], -1))
        wk_HEL, wv_HEL = up_HEL.split((self.sizes.nope_dim, self.sizes.v_dim), dim=1)
        q_BHTL = torch.einsum("bthe,hel->bhtl", qn_BTHE, wk_HEL)
        q_BHTE = torch.cat((q_BHTL, qr_BTHE.transpose(1, 2)), dim=-1)
        k_B1SE, v_B1SL = torch.cat((c_BSL, kr_BSE), dim=-1).unsqueeze(1), c_BSL.unsqueeze(1)
        mixed_BHTL = sight.attend(q_BHTE, k_B1SE, v_B1SL, self.windowed, self.scores)
        return torch.einsum("bhtl,hel->bhte", mixed_BHTL, wv_HEL)
