"""Products of rows that are sorted by expert, each group with its expert's matrix, in one call."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def grouped_product(x_MI: torch.Tensor, w_XOI: torch.Tensor, ends_X: torch.Tensor) -> torch.Tensor:
    """Row m of group x (rows ends[x-1] to ends[x]) times the transposed matrix of expert x: [M, O].

    ends_X: int32, non-decreasing; the last is M. Groups may be empty.
    """
    return _grouped_product(x_MI, w_XOI, ends_X)


# One operator for the compiler, which cannot trace PyTorch's own in fp32.
@torch.library.custom_op("colossus::grouped_product", mutates_args=())
def _grouped_product(x_MI: torch.Tensor, w_XOI: torch.Tensor, ends_X: torch.Tensor) -> torch.Tensor:
    if not _has_kernel(x_MI, w_XOI.shape[1]):
        parts = x_MI.tensor_split(ends_X[:-1].cpu().long())
        return torch.cat([rows @ w_OI.t() for rows, w_OI in zip(parts, w_XOI, strict=True)])
    return F.grouped_mm(x_MI, w_XOI.mT, offs=ends_X)


@torch.library.custom_op("colossus::grouped_outer_product", mutates_args=())
def _grouped_outer_product(g_MO: torch.Tensor, x_MI: torch.Tensor, ends_X: torch.Tensor) -> torch.Tensor:
    """The sum over a group's rows of their outer products: [X, O, I]."""
    if not _has_kernel(x_MI, g_MO.shape[1]):
        cuts = ends_X[:-1].cpu().long()
        pairs = zip(g_MO.tensor_split(cuts), x_MI.tensor_split(cuts), strict=True)
        return torch.stack([g.t() @ x for g, x in pairs])
    return F.grouped_mm(g_MO.mT, x_MI, offs=ends_X)


def _has_kernel(x_MI: torch.Tensor, num_out: int) -> bool:
    """PyTorch's takes no float64, and rows of whole 16 bytes alone."""
    item = x_MI.element_size()
    return x_MI.dtype != torch.float64 and x_MI.shape[1] * item % 16 == 0 and num_out * item % 16 == 0


@_grouped_product.register_fake
def _(x_MI: torch.Tensor, w_XOI: torch.Tensor, ends_X: torch.Tensor) -> torch.Tensor:
    return x_MI.new_empty((x_MI.shape[0], w_XOI.shape[1]))


@_grouped_outer_product.register_fake
def _(g_MO: torch.Tensor, x_MI: torch.Tensor, ends_X: torch.Tensor) -> torch.Tensor:
    return x_MI.new_empty((ends_X.shape[0], g_MO.shape[1], x_MI.shape[1]))


def _keep(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, g_MO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x_MI, w_XOI, ends_X = ctx.saved_tensors
    g_MO = g_MO.contiguous()
    grad_x = _grouped_product(g_MO, w_XOI.mT, ends_X) if ctx.needs_input_grad[0] else None
    grad_w = _grouped_outer_product(g_MO, x_MI, ends_X) if ctx.needs_input_grad[1] else None
    return grad_x, grad_w, None


_grouped_product.register_autograd(_backward, setup_context=_keep)
