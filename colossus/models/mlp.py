"""The feed-forward part of a layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from colossus.architecture import Architecture
from colossus.models.linear import Linear


class SwiGLU(nn.Module):
    """w_down(silu(w_gate x) * w_up x), from Shazeer 2020."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.w_gate = Linear(arch.hidden_size, arch.intermediate_size)
        self.w_up = Linear(arch.hidden_size, arch.intermediate_size)
        self.w_down = Linear(arch.intermediate_size, arch.hidden_size)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """x_BTD -> the same shape and type."""
        return self.w_down(F.silu(self.w_gate(x_BTD)) * self.w_up(x_BTD))
