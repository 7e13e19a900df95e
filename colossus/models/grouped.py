"""Products of rows that are sorted by expert, each group with its expert's matrix, in one call."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

WASTE = 1.5  # rows of equal groups over those that there are, at most: beyond it groups stay as they are


def grouped_product(
    x_MI: torch.Tensor, w_XOI: torch.Tensor, ends_X: torch.Tensor, equal: bool = False
) -> torch.Tensor:
    """Row m of group x (rows ends[x-1] to ends[x]) times the transposed matrix of expert x: [M, O].

    ends_X: int32, non-decreasing; the last is M. Groups may be empty.
    equal: groups are filled up to the largest one, and are then one batched product, unless that would be
        WASTE times as many rows. On a processor PyTorch's own may be several times slower.
    """
    return _grouped_product(x_MI, w_XOI, ends_X, equal)


# One operator for the compiler, which cannot trace PyTorch's own in fp32.
@torch.library.custom_op("colossus::grouped_product", mutates_args=())
def _grouped_product(
    x_MI: torch.Tensor, w_XOI: torch.Tensor, ends_X: torch.Tensor, equal: bool
) -> torch.Tensor:
    places = _Places(ends_X, x_MI.shape[0]) if equal else None
    if places is not None and places.are_few:
        return places.take(torch.bmm(places.fill(x_MI), w_XOI.mT))
    if not _has_kernel(x_MI, w_XOI.shape[1]):
        parts = x_MI.tensor_split(ends_X[:-1].cpu().long())
        return torch.cat([rows @ w_OI.t() for rows, w_OI in zip(parts, w_XOI, strict=True)])
    return F.grouped_mm(x_MI, w_XOI.mT, offs=ends_X)


@torch.library.custom_op("colossus::grouped_outer_product", mutates_args=())
def _grouped_outer_product(
    g_MO: torch.Tensor, x_MI: torch.Tensor, ends_X: torch.Tensor, equal: bool
) -> torch.Tensor:
    """The sum over a group's rows of their outer products: [X, O, I]."""
    places = _Places(ends_X, x_MI.shape[0]) if equal else None
    if places is not None and places.are_few:
        return torch.bmm(places.fill(g_MO).mT, places.fill(x_MI))
    if not _has_kernel(x_MI, g_MO.shape[1]):
        cuts = ends_X[:-1].cpu().long()
        pairs = zip(g_MO.tensor_split(cuts), x_MI.tensor_split(cuts), strict=True)
        return torch.stack([g.t() @ x for g, x in pairs])
    return F.grouped_mm(g_MO.mT, x_MI, offs=ends_X)


class _Places:
    """Where each of M rows stands among groups that are all as long as the longest."""

    def __init__(self, ends_X: torch.Tensor, num_rows: int) -> None:
        self.ends_X, self.num_rows, self.num_groups = ends_X.long(), num_rows, ends_X.shape[0]
        self.counts_X = self.ends_X.diff(prepend=self.ends_X.new_zeros(1))
        self.longest = int(self.counts_X.max())

    @property
    def are_few(self) -> bool:
        return 0 < self.num_groups * self.longest <= WASTE * self.num_rows

    def _rows_M(self) -> torch.Tensor:
        gaps_X = torch.arange(self.num_groups, device=self.ends_X.device) * self.longest
        shifts_X = gaps_X - (self.ends_X - self.counts_X)
        rows_M = torch.arange(self.num_rows, device=self.ends_X.device)
        return rows_M + shifts_X.repeat_interleave(self.counts_X, output_size=self.num_rows)

    def fill(self, x_MI: torch.Tensor) -> torch.Tensor:
        """[X, longest, I], with zeros where a group has no row."""
        full = x_MI.new_zeros(self.num_groups * self.longest, x_MI.shape[1])
        return full.index_copy_(0, self._rows_M(), x_MI).view(self.num_groups, self.longest, -1)

    def take(self, y_XRO: torch.Tensor) -> torch.Tensor:
        """The rows that there are: [M, O]."""
        return y_XRO.flatten(0, 1).index_select(0, self._rows_M())


def _has_kernel(x_MI: torch.Tensor, num_out: int) -> bool:
    """PyTorch's takes no float64, and rows of whole 16 bytes alone."""
    item = x_MI.element_size()
    return x_MI.dtype != torch.float64 and x_MI.shape[1] * item % 16 == 0 and num_out * item % 16 == 0


@_grouped_product.register_fake
def _(x_MI: torch.Tensor, w_XOI: torch.Tensor, ends_X: torch.Tensor, equal: bool) -> torch.Tensor:
    return x_MI.new_empty((x_MI.shape[0], w_XOI.shape[1]))


@_grouped_outer_product.register_fake
def _(g_MO: torch.Tensor, x_MI: torch.Tensor, ends_X: torch.Tensor, equal: bool) -> torch.Tensor:
    return x_MI.new_empty((ends_X.shape[0], g_MO.shape[1], x_MI.shape[1]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.equal = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, g_MO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x_MI, w_XOI, ends_X = ctx.saved_tensors
    g_MO = g_MO.contiguous()
    grad_x = _grouped_product(g_MO, w_XOI.mT, ends_X, ctx.equal) if ctx.needs_input_grad[0] else None
    grad_w = _grouped_outer_product(g_MO, x_MI, ends_X, ctx.equal) if ctx.needs_input_grad[1] else None
    return grad_x, grad_w, None, None


_grouped_product.register_autograd(_backward, setup_context=_keep)
