"""What a model keeps of the tokens that it has read, so that each is read once."""

from __future__ import annotations

import torch

from colossus.architecture import Architecture


class KVCache:
    """Keys and values of the tokens seen so far, in buffers of a fixed size.

    Latent attention keeps the small vector that its keys and values come from, and the rotated key.

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
        widths: tuple[tuple[int, ...], ...] = ((arch.num_kv_heads, arch.head_dim),) * 2
        if arch.latent is not None:
            widths = ((arch.latent.kv_rank,), (arch.latent.rope_dim,))
        self._layers = [
            tuple(torch.zeros((batch, max_tokens, *width), dtype=dtype, device=device) for width in widths)
            for _ in range(arch.num_layers)
        ]
        self._visible_BS: torch.Tensor | None = None
        if arch.pad_token is not None:
            self._visible_BS = torch.zeros((batch, max_tokens), dtype=torch.bool, device=device)
        self.max_tokens = max_tokens
        self.length = 0

    def append(self, layer: int, *new: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Stores what new tokens add to a layer, each [B, T, ...]; returns all, [B, length + T, ...]."""
        end = self._end(new[0].shape[1])
        for buffer, values in zip(self._layers[layer], new, strict=True):
            buffer[:, self.length : end] = values
        return tuple(buffer[:, :end] for buffer in self._layers[layer])

    def append_visible(self, visible_BT: torch.Tensor) -> torch.Tensor:
        """Stores which of the new tokens may be looked at; returns that of all, [B, length + T]."""
        assert self._visible_BS is not None
        end = self._end(visible_BT.shape[1])
        self._visible_BS[:, self.length : end] = visible_BT
        return self._visible_BS[:, :end]

    def _end(self, num_new: int) -> int:
        end = self.length + num_new
        assert end <= self.max_tokens, f"a cache of {self.max_tokens} tokens cannot hold {end}"
        return end
