"""Matrices that compute in the type of their input, whatever type they are kept in."""

from __future__ import annotations

import torch
from torch import nn

from colossus.models.packed import Packed, product


class Linear(nn.Linear):
    """y = x W^T + b. fp32 weights serve bf16 activations; their gradient comes back in fp32.

    packed: a copy for products without gradients, while it serves (see `models.copies`). fused: one of this
    and others.
    """

    packed: Packed | None = None
    fused: Packed | None = None

    def __init__(self, num_in: int, num_out: int, bias: bool = False) -> None:
        super().__init__(num_in, num_out, bias=bias)

    def reset_parameters(self) -> None:
        """Leaves the memory as it is: `models.init` fills it, shard by shard."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., num_in] -> [..., num_out], of x's type."""
        return product(x, self.weight, self.bias, self.packed)


def products(x: torch.Tensor, *linears: Linear) -> tuple[torch.Tensor, ...]:
    """What each makes of the same x; in one product where they were packed together.

    Another module may stand in a linear's place, an adapter around it.
    """
    fused = linears[0].fused if isinstance(linears[0], Linear) else None
    if fused is not None and fused.serves(x):
        return fused.product(x).split(fused.widths, dim=-1)
    return tuple(linear(x) for linear in linears)


class Embedding(nn.Embedding):
    """One vector a token id. packed: a copy of the matrix, as in `Linear`, where it is the output's too."""

    packed: Packed | None = None

    def reset_parameters(self) -> None:
        """Leaves the memory as it is: `models.init` fills it, shard by shard."""
