"""Matrices laid out for a processor's products with few rows, as in generation.

Every new token reads all matrices once, so that what counts is how quickly they come from memory. On one core
of a busy machine with AVX-512 bf16, oneDNN's own layout took 0.3 to 0.8 of the time of plain products in fp32
and 0.3 to 0.6 in bf16, for 1 and for 8 rows; with 1,024 rows it was about as quick or quicker.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

ROWS = 8  # the layout that is best for so many is good from 1 to 1,024


@dataclass(frozen=True)
class Packed:
    """A copy of a matrix [out, in] in that layout, of one type; `version` is that of the matrix."""

    matrix: torch.Tensor
    version: int


def pack(weight_OI: torch.Tensor, dtype: torch.dtype) -> Packed:
    """Of a matrix in a processor's memory. See `can_pack`."""
    matrix = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach().to(dtype).contiguous(), ROWS)
    return Packed(matrix, weight_OI._version)


@lru_cache(maxsize=8)
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this processor has such products of the type."""
    try:
        packed = pack(torch.ones(16, 16), dtype)
        product(torch.ones(1, 16, dtype=dtype), torch.ones(16, 16), None, packed)
    except (AttributeError, RuntimeError):  # a build without oneDNN, or a type that it lacks here
        return False
    return True


def product(
    x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, packed: Packed | None = None
) -> torch.Tensor:
    """x W^T + b in the type of x: [..., in] -> [..., out].

    By the packed copy, where there is one that the matrix has not left behind, and no gradient is wanted.
    """
    bias_O = None if bias_O is None else bias_O.to(x.dtype)
    fits = (
        packed is not None
        and packed.matrix.dtype == x.dtype
        and packed.version == weight_OI._version
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
    )
    if packed is not None and fits:
        return torch.ops.mkldnn._linear_pointwise(x, packed.matrix, bias_O, "none", [], "")
    return F.linear(x, weight_OI.to(x.dtype), bias_O)
