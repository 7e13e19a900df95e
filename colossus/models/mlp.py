"""The feed-forward part of a layer, and what a layer of experts does with its gates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from colossus.architecture import Architecture
from colossus.models.linear import Linear, products

CLAMP, SHARPNESS = 7.0, 1.702  # of gpt-oss (openai/gpt-oss, gpt_oss/torch/model.py)


class MLP(nn.Module):
    """w_down(gated(w_gate x, w_up x)), after Shazeer 2020; GPT's has no gate: w_down(gelu(w_up x))."""

    def __init__(self, arch: Architecture, width: int, bias: bool = False) -> None:
        super().__init__()
        self.arch = arch
        self.w_gate = Linear(arch.hidden_size, width, bias) if arch.mlp != "gelu" else None
        self.w_up = Linear(arch.hidden_size, width, bias)
        self.w_down = Linear(width, arch.hidden_size, bias)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """x_BTD -> the same shape and type."""
        if self.w_gate is None:
            return self.w_down(gated(self.arch, None, self.w_up(x_BTD)))
        gate_BTF, up_BTF = products(x_BTD, self.w_gate, self.w_up)
        return self.w_down(gated(self.arch, gate_BTF, up_BTF))


def gated(arch: Architecture, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
    """What goes into the last product, of the shape and type of `up`. Without a gate: gelu(up)."""
    if gate is None:
        return F.gelu(up, approximate=_approximation(arch))
    if arch.mlp == "geglu":
        return F.gelu(gate, approximate=_approximation(arch)) * up
    if arch.mlp == "clamped_swiglu":
        gate, up = gate.clamp(max=CLAMP), up.clamp(-CLAMP, CLAMP)
        return (up + 1) * gate * torch.sigmoid(SHARPNESS * gate)
    return F.silu(gate) * up


def _approximation(arch: Architecture) -> str:
    return "tanh" if arch.gelu == "tanh" else "none"
