"""Collectives that gradients pass through, by PyTorch's functional operators.

They take groups by name and return plain tensors that are there: what compilers can trace. An asynchronous
tensor that enters a compiled block has silently cost gradients (the embedding's under tensor parallelism).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

_ops = torch.ops._c10d_functional


class Group:
    """A process group as collectives take it: its name, its size and this rank's number in it."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.name: str = group.group_name
        self.size: int = group.size()
        self.rank: int = group.rank()


def gather(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """All ranks' parts, one after the other along `dim`. The gradient is summed over ranks and cut again."""
    return x if group.size == 1 else _Gather.apply(x, group, dim)


def scatter_sum(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """The sum over ranks, of which each keeps its part along `dim`. The gradient is gathered."""
    return x if group.size == 1 else _ScatterSum.apply(x, group, dim)


def sum_over(x: torch.Tensor, group: Group) -> torch.Tensor:
    """The sum over ranks, on each of them. So is its gradient: each rank's loss is a part of the whole."""
    return x if group.size == 1 else _Sum.apply(x, group)


def exchange(x: torch.Tensor, group: Group, received: list[int], sent: list[int]) -> torch.Tensor:
    """All-to-all of rows: `sent[r]` go to rank r, `received[r]` come from it. The gradient goes back."""
    return x if group.size == 1 else _Exchange.apply(x, group, received, sent)


def all_gather(x: torch.Tensor, group: Group, dim: int = 0) -> torch.Tensor:
    """As `gather`, without a gradient."""
    if group.size == 1:
        return x
    whole = _ops.wait_tensor(_ops.all_gather_into_tensor(x.contiguous(), group.size, group.name))
    return whole if dim == 0 else torch.cat(whole.chunk(group.size), dim=dim)


def reduce_scatter(x: torch.Tensor, group: Group, dim: int = 0) -> torch.Tensor:
    """As `scatter_sum`, without a gradient."""
    if dim != 0:
        x = torch.cat(x.chunk(group.size, dim=dim))
    return _ops.wait_tensor(_ops.reduce_scatter_tensor(x.contiguous(), "sum", group.size, group.name))


def all_reduce(x: torch.Tensor, group: Group, op: str = "sum") -> torch.Tensor:
    """The sum or "max" over ranks, without a gradient."""
    if group.size == 1:
        return x
    return _ops.wait_tensor(_ops.all_reduce(x.contiguous(), op, group.name))


def all_to_all(x: torch.Tensor, group: Group, received: list[int], sent: list[int]) -> torch.Tensor:
    """As `exchange`, without a gradient."""
    if group.size == 1:
        return x
    return _ops.wait_tensor(_ops.all_to_all_single(x.contiguous(), received, sent, group.name))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
        ctx.group, ctx.dim = group, dim
        return all_gather(x, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return reduce_scatter(grad, ctx.group, ctx.dim), None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
        ctx.group, ctx.dim = group, dim
        return reduce_scatter(x, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return all_gather(grad, ctx.group, ctx.dim), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return all_reduce(grad, ctx.group), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, group: Group, received: list[int], sent: list[int]
    ) -> torch.Tensor:
        ctx.group, ctx.received, ctx.sent = group, received, sent
        return all_to_all(x, group, received, sent)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        return all_to_all(grad, ctx.group, ctx.sent, ctx.received), None, None, None
