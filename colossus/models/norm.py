"""Normalisation over the last dimension."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from colossus.architecture import Architecture


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in fp32 or better; the weight is read in x's type, in
    which ranks gather it.

    mean_over_ranks: of means over parts of the width, where ranks share it (see `parallel.tensor`).
    """

    mean_over_ranks: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., width] -> the same shape and type."""
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = exact.square().mean(-1, keepdim=True)
        if self.mean_over_ranks is not None:
            mean = self.mean_over_ranks(mean)
        scale = torch.rsqrt(mean + self.eps)
        return (exact * scale * self.weight.to(x.dtype)).to(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias, computed as `RMSNorm` is."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., width] -> the same shape and type."""
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        weight, bias = (w.to(x.dtype).to(exact.dtype) for w in (self.weight, self.bias))
        return F.layer_norm(exact, weight.shape, weight, bias, self.eps).to(x.dtype)


def norm(arch: Architecture) -> nn.Module:
    """The norm of the residual stream that `arch` names."""
    return (RMSNorm if arch.norm == "rms" else LayerNorm)(arch.hidden_size, arch.norm_eps)
