"""Keeps the loads of experts alike from step to step, by what the whole global batch asked of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from colossus.models import Decoder
from colossus.models.router import Router


@dataclass(frozen=True)
class ExpertLoads:
    """How a step's visits were spread over experts, whose loads are alike where these are 1.

    expert_load: of the busiest expert over the mean, in the worst layer; expert_load_mean: its mean over
    layers. router_entropy: of the routers' scores, from 0 (always one expert) to 1 (any). balance_loss,
    router_z_loss: what these terms add to what is minimised, in nats a token, over all layers.
    dropped_visits: none ever is.
    """

    expert_load: float
    expert_load_mean: float
    router_entropy: float
    balance_loss: float
    router_z_loss: float
    dropped_visits: int = 0


class Balance:
    """Takes the loads of a model's forward passes, and moves the routers' buffers once a step.

    models: one, or the stages of a pipeline that this rank has.
    """

    def __init__(self, *models: Decoder) -> None:
        arch = models[0].arch
        self._models, self._settings = models, arch.experts
        self._layers = [layer for layer in range(arch.num_layers) if arch.has_experts(layer)]
        self._routers: dict[int, Router] = {}
        for model in models:
            of_model = [module for module in model.modules() if isinstance(module, Router)]
            self._routers |= dict(zip(self._layers_of(model), of_model, strict=True))

    def _layers_of(self, model: Decoder) -> list[int]:
        return [layer for layer in self._layers if layer in model.part]

    def take(self) -> torch.Tensor:
        """The loads of this rank's forward passes since the last call: of each layer of the whole model in
        turn, what `Router.forward` gives. Empty without experts. Summed over ranks they are what `update`
        takes."""
        device = next(self._models[0].parameters()).device
        if self._settings is None:
            return torch.zeros(0, dtype=torch.float64, device=device)
        size = (len(self._layers), self._settings.num_experts + 3)
        total_LX = torch.zeros(size, dtype=torch.float64, device=device)
        for model in self._models:
            rows = [self._layers.index(layer) for layer in self._layers_of(model)]
            if model.loads:
                load_LX = torch.stack([load.double() for load in model.loads]).sum(0)
                for row, load_X in zip(rows, load_LX, strict=True):
                    total_LX[row] = load_X
            model.loads.clear()
        return total_LX.flatten()

    @torch.no_grad()
    def update(self, loads: torch.Tensor, *, move: bool | torch.Tensor) -> None:
        """Lets the next step know the loads of this one's global batch, unless not `move`, which may be a
        truth on the device; no host waits for it.

        An expert's selection bias moves by `bias_rate`, up where its load is below the mean and down where it
        is above (Wang et al. 2024, arXiv 2408.15664). Its share of the visits is what the next step's loss
        over the batch multiplies. Where no token counted, both stay.
        """
        settings = self._settings
        if settings is None:
            return
        visits_LX = loads.view(len(self._layers), -1)[:, :-3]
        for layer, router in self._routers.items():
            visits_X = visits_LX[self._layers.index(layer)]
            total = visits_X.sum()
            moves = (total > 0) & move
            if settings.selection_bias:
                step_X = settings.bias_rate * (visits_X.mean() - visits_X).sign() * moves
                router.selection_bias += step_X.to(router.selection_bias)
            if router.has_shares:
                shares_X = (visits_X / total).to(router.shares)
                router.shares.copy_(torch.where(moves, shares_X, router.shares))

    def told(self, loads: Sequence[float]) -> ExpertLoads | None:
        """How alike they were; None without experts, and where no token counted."""
        settings = self._settings
        if settings is None:
            return None
        width = settings.num_experts + 3
        rows = [loads[start : start + width] for start in range(0, len(loads), width)]
        total = sum(rows[0][:-3])  # in every layer the same
        if not total:
            return None
        busiest = [max(row[:-3]) * settings.num_experts / total for row in rows]
        entropy = sum(row[-3] for row in rows) / len(rows) / (total / settings.per_token)
        return ExpertLoads(
            expert_load=max(busiest),
            expert_load_mean=sum(busiest) / len(busiest),
            router_entropy=entropy / (math.log(settings.num_experts) if settings.num_experts > 1 else 1.0),
            balance_loss=sum(row[-2] for row in rows),
            router_z_loss=sum(row[-1] for row in rows),
        )
