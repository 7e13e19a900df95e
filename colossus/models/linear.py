"""Matrices that compute in the type of their input, whatever type they are kept in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Linear(nn.Linear):
    """y = x W^T + b. fp32 weights serve bf16 activations; their gradient comes back in fp32."""

    def __init__(self, num_in: int, num_out: int, bias: bool = False) -> None:
        super().__init__(num_in, num_out, bias=bias)

    def reset_parameters(self) -> None:
        """Leaves the memory as it is: `models.init` fills it, shard by shard."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., num_in] -> [..., num_out], of x's type."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Embedding(nn.Embedding):
    """One vector a token id."""

    def reset_parameters(self) -> None:
        """Leaves the memory as it is: `models.init` fills it, shard by shard."""
