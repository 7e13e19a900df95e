"""What a model keeps of the tokens that it has read, so that each is read once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from colossus.architecture import Architecture

BLOCK = 32  # tokens by which buffers grow at least


class KVCache:
    """Keys and values of the tokens seen so far, in buffers that grow by blocks up to a limit: [B, K, S, E].

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
            [
                torch.zeros((batch, *heads, 0, width), dtype=dtype, device=device)
                for heads, width in _shapes(arch)
            ]
            for _ in range(arch.num_layers)
        ]
        self._visible_BS: torch.Tensor | None = None
        if arch.pad_token is not None:
            self._visible_BS = torch.zeros((batch, 0), dtype=torch.bool, device=device)
        self.max_tokens, self.lengths, self.capacity = max_tokens, [0] * batch, 0
        # oneDNN's products in bf16 take tensors without gaps, and would copy a part of a buffer every time.
        self._whole = dtype == torch.bfloat16 and torch.device(device).type == "cpu"

    @property
    def length(self) -> int:
        """Tokens held by the longest row."""
        return max(self.lengths)

    @property
    def is_even(self) -> bool:
        """Whether all rows hold as many."""
        return min(self.lengths) == self.length

    def num_keys(self, num_new: int) -> int:
        """Keys that `append` gives to so many new tokens: where it is quicker, a single one gets the whole
        buffer, whose end is to be masked."""
        return self.capacity if self._whole and num_new == 1 else self._end(num_new)

    def reserve(self, num_new: int) -> None:
        """Makes room for so many tokens behind the longest row."""
        end = self._end(num_new)
        if end > self.capacity:
            room = -(-(end + end // 16) // BLOCK) * BLOCK
            self.capacity = min(max(room, end), self.max_tokens)
            for buffers in self._layers:
                buffers[:] = [_grown(buffer, -2, self.capacity) for buffer in buffers]
            if self._visible_BS is not None:
                self._visible_BS = _grown(self._visible_BS, 1, self.capacity)

    def append(self, layer: int, *new: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Stores what new tokens add to a layer, [B, ..., T, E] each, in room that was reserved; gives all,
        [B, ..., num_keys(T), E]."""
        buffers, num_keys = self._layers[layer], self.num_keys(new[0].shape[-2])
        for buffer, values in zip(buffers, new, strict=True):
            self._put(buffer.movedim(-2, 1), values.movedim(-2, 1))
        return tuple(buffer[..., :num_keys, :] for buffer in buffers)

    def append_visible(self, visible_BT: torch.Tensor) -> torch.Tensor:
        """Stores which of the new tokens may be looked at; returns that of all, [B, num_keys(T)]."""
        assert self._visible_BS is not None
        self._put(self._visible_BS, visible_BT)
        return self._visible_BS[:, : self.num_keys(visible_BT.shape[1])]

    def advance(self, num_new: int) -> None:
        """Counts tokens that every layer has stored."""
        self.lengths = [length + num_new for length in self.lengths]

    def rows(self, first: int, end: int, num_tokens: int) -> KVCache:
        """These rows in the same memory, empty, with room for so many tokens. Their new lengths are for the
        caller to set."""
        self.reserve(max(0, num_tokens - self.length))
        part = self._of(slice(first, end), [0] * (end - first))
        part.max_tokens = self.capacity
        return part

    def kept(self, rows: Sequence[int]) -> KVCache:
        """A copy of these rows alone."""
        return self._of(list(rows), [self.lengths[row] for row in rows])

    def _of(self, rows: slice | list[int], lengths: list[int]) -> KVCache:
        part = object.__new__(KVCache)
        part._layers = [[buffer[rows] for buffer in buffers] for buffers in self._layers]
        part._visible_BS = None if self._visible_BS is None else self._visible_BS[rows]
        part.max_tokens, part.lengths, part.capacity = self.max_tokens, lengths, self.capacity
        part._whole = self._whole
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


def _grown(buffer: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """A copy with zeros behind: what is never looked at must be finite all the same."""
    shape = list(buffer.shape)
    shape[dim] = size
    grown = buffer.new_zeros(shape)
    grown.narrow(dim, 0, buffer.shape[dim]).copy_(buffer)
    return grown


def row_bytes(arch: Architecture, max_tokens: int, dtype: torch.dtype) -> int:
    """Of one row of a cache."""
    numbers = sum(width * (heads[0] if heads else 1) for heads, width in _shapes(arch))
    return arch.num_layers * max_tokens * numbers * dtype.itemsize


def _shapes(arch: Architecture) -> tuple[tuple[tuple[int, ...], int], ...]:
    """(heads, if any, and width) of the two things that a layer keeps of a token."""
    if arch.latent is not None:
        return ((), arch.latent.kv_rank), ((), arch.latent.rope_dim)
    return (((arch.num_kv_heads,), arch.head_dim),) * 2
