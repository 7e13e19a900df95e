"""Which experts a token visits, how its visits count, and what keeps the experts' loads alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from colossus.architecture import Architecture

TINY = 1e-20  # added to a sum of sigmoids before it divides


class Routes(NamedTuple):
    """weights_NK, experts_NK: of the K visits of each of N tokens. load: see `Router.forward`; None outside
    training. objective: the sum of the terms that keep loads alike, [] in fp32 or better; None where there
    are none."""

    weights_NK: torch.Tensor
    experts_NK: torch.Tensor
    load: torch.Tensor | None = None
    objective: torch.Tensor | None = None


class Router(nn.Module):
    """Scores of all experts for each token, in fp32 or better, of weights that are read in the tokens' type.

    selection_bias: added to scores where experts are chosen; moved between steps (see `Balance`), and no
    gradient. shares: of the last step's visits, an expert; what the loss over the batch multiplies.
    sum_over_sequence: of what ranks count that share the tokens of a sequence (see `parallel.expert`).
    """

    sum_over_sequence: Callable[[torch.Tensor], torch.Tensor] | None = None

    selection_bias: torch.Tensor
    shares: torch.Tensor

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        assert arch.experts is not None
        self.settings = settings = arch.experts
        self.weight = nn.Parameter(torch.empty(settings.num_experts, arch.hidden_size))
        self.bias = nn.Parameter(torch.empty(settings.num_experts)) if settings.router_bias else None
        if settings.selection_bias:
            self.register_buffer("selection_bias", torch.zeros(settings.num_experts))
        if self.has_shares:
            self.register_buffer("shares", torch.zeros(settings.num_experts))

    @property
    def has_shares(self) -> bool:
        return self.settings.balance_loss > 0 and self.settings.balance_over == "batch"

    def forward(self, x_BTD: torch.Tensor, token_share: torch.Tensor | None) -> Routes:
        """Routes of the B x T tokens.

        token_share: in training, of each row, [B]: 1 / tokens of the global batch, 0 where the row is no
            sample of it. The terms that keep loads alike are sums over tokens or sequences, times this.
        The load is [X + 3]: visits of each expert, the sum over tokens of the entropy of their scores, and
        the terms of the objective: `balance_loss` and `z_loss`.
        """
        exact = torch.promote_types(x_BTD.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(x_BTD.dtype).to(exact)
        logits_BTX = F.linear(x_BTD.to(exact), self.weight.to(x_BTD.dtype).to(exact), bias)
        cap = self.settings.soft_cap
        if cap is not None:
            logits_BTX = cap * torch.tanh(logits_BTX / cap)
        scores_BTX = logits_BTX.softmax(-1) if self.settings.scores == "softmax" else logits_BTX.sigmoid()
        experts_BTK = self._choose(scores_BTX.detach())
        weights_BTK = scores_BTX.gather(-1, experts_BTK)
        if self.settings.normalise:
            weights_BTK = weights_BTK / (weights_BTK.sum(-1, keepdim=True) + TINY)
        weights_BTK = weights_BTK * self.settings.scale
        shares_BTX = scores_BTX
        if self.settings.scores == "sigmoid":
            shares_BTX = scores_BTX / (scores_BTX.sum(-1, keepdim=True) + TINY)
        routes = Routes(weights_BTK.flatten(0, 1), experts_BTK.flatten(0, 1))
        if token_share is None:
            return routes
        ones_BV = torch.ones_like(weights_BTK.detach().flatten(1))
        visits_BX = torch.zeros_like(logits_BTX[:, 0].detach()).scatter_add(
            1, experts_BTK.flatten(1), ones_BV
        )
        entropy_B = torch.special.entr(shares_BTX.detach()).sum((1, 2))
        load_BL = torch.cat((visits_BX, entropy_B[:, None]), dim=1)
        load = load_BL.masked_fill(token_share[:, None] == 0, 0.0).sum(0)
        terms = self._terms(logits_BTX, shares_BTX, visits_BX, token_share)
        told = [load.new_zeros(()) if term is None else term.detach() for term in terms]
        joined = [term for term in terms if term is not None]
        objective = torch.stack(joined).sum() if joined else None
        return routes._replace(load=torch.cat((load, torch.stack(told))), objective=objective)

    def _choose(self, scores_BTX: torch.Tensor) -> torch.Tensor:
        """The experts that each token visits, [B, T, K]."""
        settings = self.settings
        if settings.selection_bias:
            scores_BTX = scores_BTX + self.selection_bias.to(scores_BTX.dtype)
        if settings.num_groups > 1:
            grouped = scores_BTX.unflatten(-1, (settings.num_groups, -1))
            best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
            kept = torch.zeros_like(best, dtype=torch.bool)
            kept = kept.scatter(-1, best.topk(settings.groups_per_token, dim=-1).indices, True)
            scores_BTX = grouped.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(-2)
        return scores_BTX.topk(settings.per_token, dim=-1).indices

    def _terms(
        self,
        logits_BTX: torch.Tensor,
        shares_BTX: torch.Tensor,
        visits_BX: torch.Tensor,
        token_share: torch.Tensor,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """balance_loss x X x sum over experts of (share of visits x mean score), as in Switch (Fedus et al.
        2021, arXiv 2101.03961, section 2.2), and z_loss x logsumexp^2 (Zoph et al. 2022, arXiv 2202.08906).
        """
        settings, share_B = self.settings, token_share.to(logits_BTX.dtype)
        balance_B = z_B = None
        if settings.balance_loss and settings.balance_over == "batch":
            shares_X = self.shares.to(shares_BTX.dtype)
            balance_B = settings.balance_loss * settings.num_experts * (shares_BTX @ shares_X).sum(1)
        elif settings.balance_loss:
            if self.sum_over_sequence is not None:
                visits_BX = self.sum_over_sequence(visits_BX)
            visited_BX = visits_BX / visits_BX.sum(-1, keepdim=True)
            sums_BX = shares_BTX.sum(1)  # the mean over a sequence, times its tokens
            balance_B = settings.balance_loss * settings.num_experts * (visited_BX * sums_BX).sum(1)
        if settings.z_loss:
            z_B = settings.z_loss * logits_BTX.logsumexp(-1).square().sum(1)
        return tuple(None if term_B is None else term_B.dot(share_B) for term_B in (balance_B, z_B))  # type: ignore[return-value]


class _WithObjective(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, objective: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return grad, grad.new_ones((), dtype=torch.promote_types(grad.dtype, torch.float32))


def with_objective(x: torch.Tensor, objective: torch.Tensor | None) -> torch.Tensor:
    """`x`, through which `objective` becomes a term of whatever is minimised: its gradient there is 1.

    So a layer adds to the objective wherever it is, also on a stage of a pipeline, and the loss that is
    returned stays the cross entropy.
    """
    return x if objective is None else _WithObjective.apply(x, objective)
