"""A mixture of experts: dropless, by grouped products over tokens that are sorted by expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from colossus.architecture import Architecture
from colossus.models.grouped import grouped_product
from colossus.models.mlp import MLP, gated
from colossus.models.router import Router, with_objective


class MoE(nn.Module):
    """A router, experts that a token visits by choice, and shared ones that every token visits."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        assert arch.experts is not None
        self.router = Router(arch)
        self.experts = Experts(arch)
        num_shared = arch.experts.num_shared
        self.shared = MLP(arch, num_shared * arch.expert_size) if num_shared else None

    def forward(
        self, x_BTD: torch.Tensor, token_share: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x_BTD -> (the same shape and type, load [X + 1]). See `Router.forward`."""
        routes = self.router(x_BTD, token_share)
        y_ND = self.experts(x_BTD.flatten(0, 1), routes.weights_NK, routes.experts_NK)
        y_BTD = y_ND.view_as(x_BTD)
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD)
        return with_objective(y_BTD, routes.objective), routes.load


class Experts(nn.Module):
    """The matrices of all experts, stacked: [X, out, in]."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        assert arch.experts is not None
        self.arch = arch
        num, model, ffn = arch.experts.num_experts, arch.hidden_size, arch.expert_size

        def stack(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num, *sizes))

        has_gate, has_bias = arch.mlp != "gelu", arch.experts.bias
        self.w_gate = stack(ffn, model) if has_gate else None
        self.w_gate_bias = stack(ffn) if has_gate and has_bias else None
        self.w_up = stack(ffn, model)
        self.w_up_bias = stack(ffn) if has_bias else None
        self.w_down = stack(model, ffn)
        self.w_down_bias = stack(model) if has_bias else None

    def forward(self, x_ND: torch.Tensor, weights_NK: torch.Tensor, experts_NK: torch.Tensor) -> torch.Tensor:
        """The sum over a token's K visits of weight x expert(x): x_ND -> the same shape and type."""
        num_visits = experts_NK.shape[1]
        order_M, ends_X = sort_by_expert(experts_NK, self.w_down.shape[0])
        sorted_M = experts_NK.flatten()[order_M]
        rows_MD = _Reorder.apply(x_ND.repeat_interleave(num_visits, dim=0), order_M, order_M.argsort())
        gate_MF = None
        if self.w_gate is not None:
            gate_MF = self._product(rows_MD, self.w_gate, self.w_gate_bias, sorted_M, ends_X)
        up_MF = self._product(rows_MD, self.w_up, self.w_up_bias, sorted_M, ends_X)
        hidden_MF = gated(self.arch, gate_MF, up_MF)
        y_MD = self._product(hidden_MF, self.w_down, self.w_down_bias, sorted_M, ends_X)
        y_NKD = _Reorder.apply(y_MD, order_M.argsort(), order_M).unflatten(0, (-1, num_visits))
        return (y_NKD * weights_NK.to(y_NKD.dtype).unsqueeze(-1)).sum(1)

    def _product(
        self,
        x_MI: torch.Tensor,
        w_XOI: torch.Tensor,
        bias_XO: torch.Tensor | None,
        experts_M: torch.Tensor,
        ends_X: torch.Tensor,
    ) -> torch.Tensor:
        y_MO = grouped_product(x_MI, w_XOI.to(x_MI.dtype), ends_X)
        return y_MO if bias_XO is None else y_MO + bias_XO.to(x_MI.dtype)[experts_M]


def sort_by_expert(experts_NK: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(order [N x K] that sorts visits by expert, where each expert's rows end [X] in int32)."""
    flat_M = experts_NK.flatten()
    counts_X = torch.zeros(num_experts, dtype=torch.int32, device=flat_M.device)
    counts_X = counts_X.scatter_add(0, flat_M, torch.ones_like(flat_M, dtype=torch.int32))
    return flat_M.argsort(stable=True), counts_X.cumsum(0, dtype=torch.int32)


class _Reorder(torch.autograd.Function):
    """Rows in another order. Its gradient is a gather too, where PyTorch would add row by row."""

    @staticmethod
    def forward(ctx: Any, x_MD: torch.Tensor, order_M: torch.Tensor, inverse_M: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse_M)
        return x_MD[order_M]

    @staticmethod
    def backward(ctx: Any, grad_MD: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        (inverse_M,) = ctx.saved_tensors
        return grad_MD[inverse_M], None, None
