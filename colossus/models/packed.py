"""Matrices laid out for a processor's products with few rows, as in generation.

Every new token reads all matrices once, so that what counts is how quickly they come from memory. On one core
of a busy machine with AVX-512 bf16, oneDNN's own layout took 0.3 to 0.8 of the time of plain products in fp32
and 0.3 to 0.6 in bf16, for 1 and for 8 rows; with 1,024 rows it was about as quick or quicker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

ROWS = 8  # the layout that is best for so many is good from 1 to 1,024


@dataclass(frozen=True)
class Packed:
    """A copy in that layout of one matrix [out, in], or of several for one product, one below the other.

    widths: rows of each.
    """

    matrix: torch.Tensor
    bias: torch.Tensor | None
    widths: tuple[int, ...]

    def serves(self, x: torch.Tensor) -> bool:
        """Whether it has products of this type and place, and no gradient is wanted."""
        return self.matrix.dtype == x.dtype and x.device.type == "cpu" and not torch.is_grad_enabled()

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., sum of widths]."""
        return torch.ops.mkldnn._linear_pointwise(x, self.matrix, self.bias, "none", [], "")


def pack(
    weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], dtype: torch.dtype
) -> Packed:
    """Of matrices in a processor's memory with one input; all have a bias or none. See `can_pack`."""
    rows = torch.cat([weight.detach().to(dtype) for weight in weights])
    matrix = torch.ops.mkldnn._reorder_linear_weight(rows.contiguous(), ROWS)
    kept = [bias.detach().to(dtype) for bias in biases if bias is not None]
    assert len(kept) in (0, len(weights))
    return Packed(matrix, torch.cat(kept) if kept else None, tuple(len(weight) for weight in weights))


@lru_cache(maxsize=8)
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this processor has such products of the type."""
    try:
        pack([torch.ones(16, 16)], [], dtype).product(torch.ones(1, 16, dtype=dtype))
    except (AttributeError, RuntimeError):  # a build without oneDNN, or a type that it lacks here
        return False
    return True


def product(
    x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, packed: Packed | None = None
) -> torch.Tensor:
    """x W^T + b in the type of x: [..., in] -> [..., out]; by the packed copy, where it serves."""
    if packed is not None and packed.serves(x):
        return packed.product(x)
    return F.linear(x, weight_OI.to(x.dtype), None if bias_O is None else bias_O.to(x.dtype))
