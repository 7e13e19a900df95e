"""Expert parallelism: ranks share the experts, and each token's rows go to the ranks of its experts.

Nothing is dropped: counts are exchanged first, then as many rows as there are.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from colossus.models import Decoder
from colossus.models.experts import Experts, Order
from colossus.models.router import Router
from colossus.parallel.collectives import (
    Group,
    all_gather,
    all_reduce,
    all_to_all,
    exchange,
    gather,
    scatter_sum,
)
from colossus.parallel.mesh import Meshes
from colossus.parallel.placements import place


def apply_expert_parallel(model: Decoder, meshes: Meshes) -> None:
    """Cuts experts over `ep`, and each expert's columns over `etp`; sums what routers count of sequences."""
    assert meshes.expert is not None
    ep, etp = Group(meshes.expert.get_group("ep")), Group(meshes.expert.get_group("etp"))
    sequence = Group(meshes.sequence)
    for module in model.modules():
        if isinstance(module, Router) and sequence.size > 1:
            module.sum_over_sequence = partial(all_reduce, group=sequence)
        if not isinstance(module, Experts):
            continue
        if ep.size > 1 or etp.size > 1:
            mesh = meshes.expert["ep", "etp"]
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    columns = _columns(name)
                    divisor = etp.size if columns is None else 1  # each rank of etp adds it to a sum
                    place(module, name, mesh, [0, columns], divisor)
        if ep.size > 1:
            module.exchange = partial(RowExchange, ep)
        if etp.size > 1:
            module.register_forward_pre_hook(partial(_gather_tokens, etp))
            module.register_forward_hook(partial(_sum_at_tokens, etp))


def _columns(name: str) -> int | None:
    """The dimension of an expert's columns that `etp` shares; None of what comes after its last product."""
    if name == "w_down_bias":
        return None
    return 2 if name == "w_down" else 1


def _gather_tokens(
    group: Group, module: nn.Module, args: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    x_ND, weights_NK, experts_NK = args
    return gather(x_ND, group, 0), gather(weights_NK, group, 0), all_gather(experts_NK, group)


def _sum_at_tokens(group: Group, module: nn.Module, args: Any, y_ND: torch.Tensor) -> torch.Tensor:
    return scatter_sum(y_ND, group, 0)


def row_counts(sums_2R: torch.Tensor, num_rows: int) -> tuple[list[int], list[int]]:
    """How many of this rank's `num_rows` go to each rank, and how many come from it. The host must know: the
    one wait of a layer of experts. (A dry run, whose tensors hold no numbers, has an answer of its own.)"""
    sent, received = sums_2R.tolist()
    assert sum(sent) == num_rows, f"{sum(sent)} of {num_rows} rows are sent"
    return sent, received


class RowExchange:
    """Of one forward pass: see `models.experts.Exchange`."""

    def __init__(self, group: Group) -> None:
        self.group = group

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # how many rows go where is known at run time alone
    def send(self, rows_MD: torch.Tensor, order: Order) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ranks = self.group.size
        counts_X = order.ends_X.diff(prepend=order.ends_X.new_zeros(1)).long()
        ones = [len(counts_X) // ranks] * ranks
        counts_RX = all_to_all(counts_X, self.group, ones, ones).view(ranks, -1)  # from each rank, by expert
        sums = torch.stack((counts_X.view(ranks, -1).sum(1), counts_RX.sum(1)))
        self.sent: list[int]
        self.received: list[int]
        self.sent, self.received = row_counts(sums, len(rows_MD))
        rows = exchange(rows_MD, self.group, self.received, self.sent)
        num_here = counts_RX.shape[1]
        experts = torch.arange(num_here, device=rows.device).repeat(ranks)
        experts = experts.repeat_interleave(counts_RX.flatten(), output_size=len(rows))
        experts, self.order = experts.sort(stable=True)
        ends_X = counts_RX.sum(0).cumsum(0).to(torch.int32)
        rows = rows.index_select(0, self.order)
        for varies in (rows, experts):
            torch._dynamo.maybe_mark_dynamic(varies, 0)  # or each number of rows would be compiled
        return rows, ends_X, experts

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def bring_back(self, y_RD: torch.Tensor) -> torch.Tensor:
        back = torch.empty_like(self.order).scatter(
            0, self.order, torch.arange(len(self.order), device=y_RD.device)
        )
        return exchange(y_RD.index_select(0, back), self.group, self.sent, self.received)
