"""What a model keeps of the tokens that it has read, so that each is read once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from colossus.architecture import Architecture


class KVCache:
    """Keys and values of the tokens seen so far, in buffers of a fixed size: [B, K, S, E].

    Latent attention keeps the small vector that its keys and values come from, and the rotated key, each
    [B, S, E]. A row's tokens begin at 0; what lies beyond its length is never looked at, and overwritten.

    lengths: tokens held by each row; `Decoder.forward` adds to them, and they may be set back.
    dtype: a single query looks at keys in it, whatever the model's type.
    """

    def __init__(
        self,
        arch: Architecture,
        batch: int,
        max_tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._layers = [
            tuple(
                torch.zeros((batch, *heads, max_tokens, width), dtype=dtype, device=device)
                for heads, width in _shapes(arch)
            )
            for _ in range(arch.num_layers)
        ]
        self._visible_BS: torch.Tensor | None = None
        if arch.pad_token is not None:
            self._visible_BS = torch.zeros((batch, max_tokens), dtype=torch.bool, device=device)
        self.max_tokens, self.lengths = max_tokens, [0] * batch

    @property
    def length(self) -> int:
        """Tokens held by the longest row."""
        return max(self.lengths)

    @property
    def is_even(self) -> bool:
        """Whether all rows hold as many."""
        return min(self.lengths) == self.length

    def append(self, layer: int, *new: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Stores what new tokens add to a layer, [B, ..., T, E] each; gives all, [B, ..., length + T, E]."""
        buffers = self._layers[layer]
        for buffer, values in zip(buffers, new, strict=True):
            self._put(buffer.movedim(-2, 1), values.movedim(-2, 1))
        return tuple(buffer[..., : self._end(new[0].shape[-2]), :] for buffer in buffers)

    def append_visible(self, visible_BT: torch.Tensor) -> torch.Tensor:
        """Stores which of the new tokens may be looked at; returns that of all, [B, length + T]."""
        assert self._visible_BS is not None
        self._put(self._visible_BS, visible_BT)
        return self._visible_BS[:, : self._end(visible_BT.shape[1])]

    def advance(self, num_new: int) -> None:
        """Counts tokens that every layer has stored."""
        self.lengths = [length + num_new for length in self.lengths]

    def rows(self, first: int, end: int) -> KVCache:
        """These rows in the same memory, empty. Their new lengths are for the caller to set."""
        return self._of(slice(first, end), [0] * (end - first))

    def kept(self, rows: Sequence[int]) -> KVCache:
        """A copy of these rows alone."""
        return self._of(list(rows), [self.lengths[row] for row in rows])

    def _of(self, rows: slice | list[int], lengths: list[int]) -> KVCache:
        part = object.__new__(KVCache)
        part._layers = [tuple(buffer[rows] for buffer in buffers) for buffers in self._layers]
        part._visible_BS = None if self._visible_BS is None else self._visible_BS[rows]
        part.max_tokens, part.lengths = self.max_tokens, lengths
        return part

    def _put(self, buffer_BS: torch.Tensor, values_BT: torch.Tensor) -> None:
        """Writes T values behind each row's; both [B, tokens, ...]."""
        num_new = values_BT.shape[1]
        end = self._end(num_new)
        if self.is_even:
            buffer_BS[:, self.length : end] = values_BT
        else:
            rows_B1 = torch.arange(len(self.lengths), device=buffer_BS.device)[:, None]
            places_BT = places(self.lengths, num_new, buffer_BS.device)
            buffer_BS[rows_B1, places_BT] = values_BT.to(buffer_BS.dtype)

    def _end(self, num_new: int) -> int:
        end = self.length + num_new
        assert end <= self.max_tokens, f"a cache of {self.max_tokens} tokens cannot hold {end}"
        return end


def places(lengths: Sequence[int], num_new: int, device: torch.device) -> torch.Tensor:
    """Where new tokens stand behind rows of such lengths: [T] where all are equal, else [B, T]."""
    new_T = torch.arange(num_new, device=device)
    if min(lengths) == max(lengths):
        return new_T + lengths[0]
    return torch.tensor(lengths, device=device)[:, None] + new_T


def row_bytes(arch: Architecture, max_tokens: int, dtype: torch.dtype) -> int:
    """Of one row of a cache."""
    numbers = sum(width * (heads[0] if heads else 1) for heads, width in _shapes(arch))
    return arch.num_layers * max_tokens * numbers * dtype.itemsize


def _shapes(arch: Architecture) -> tuple[tuple[tuple[int, ...], int], ...]:
    """(heads, if any, and width) of the two things that a layer keeps of a token."""
    if arch.latent is not None:
        return ((), arch.latent.kv_rank), ((), arch.latent.rope_dim)
    return (((arch.num_kv_heads,), arch.head_dim),) * 2
