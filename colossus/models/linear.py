"""Matrices that compute in the type of their input, whatever type they are kept in."""

from __future__ import annotations

import torch
from torch import nn

from colossus.models.packed import Packed, product


class Linear(nn.Linear):
    """y = x W^T + b. fp32 weights serve bf16 activations; their gradient comes back in fp32.

    packed: a copy for products without gradients (see `models.packed`).
    """

    packed: Packed | None = None

    def __init__(self, num_in: int, num_out: int, bias: bool = False) -> None:
        super().__init__(num_in, num_out, bias=bias)

    def reset_parameters(self) -> None:
        """Leaves the memory as it is: `models.init` fills it, shard by shard."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., num_in] -> [..., num_out], of x's type."""
        return product(x, self.weight, self.bias, self.packed)


class Embedding(nn.Embedding):
    """One vector a token id. packed: a copy of the matrix, where it is the output's too."""

    packed: Packed | None = None

    def reset_parameters(self) -> None:
        """Leaves the memory as it is: `models.init` fills it, shard by shard."""
