"""Keeps the loads of experts alike from step to step, by what the whole global batch asked of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from colossus.models import Decoder
from colossus.models.router import Router


@dataclass(frozen=True)
class ExpertLoads:
    """How a step's visits were spread over experts, whose loads are alike where these are 1.

    expert_load: of the busiest expert over the mean, in the worst layer; expert_load_mean: its mean over
    layers. router_entropy: of the routers' scores, from 0 (always one expert) to 1 (any). dropped_visits:
    none ever is.
    """

    expert_load: float
    expert_load_mean: float
    router_entropy: float
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

    def take(self) -> list[float]:
        """The loads of this rank's forward passes since the last call: of each layer of the whole model in
        turn, X visits and the sum of entropies. Empty without experts. Summed over ranks they are what
        `update` takes."""
        if self._settings is None:
            return []
        total_LX = torch.zeros(len(self._layers), self._settings.num_experts + 1, dtype=torch.float64)
        for model in self._models:
            rows = [self._layers.index(layer) for layer in self._layers_of(model)]
            if model.loads:
                total_LX[rows] = torch.stack([load.double() for load in model.loads]).sum(0).cpu()
            model.loads.clear()
        return total_LX.flatten().tolist()

    @torch.no_grad()
    def update(self, loads: list[float], *, move: bool) -> ExpertLoads | None:
        """Lets the next step know the loads of this one's global batch, unless not `move`; says how alike
        they were.

        An expert's selection bias moves by `bias_rate`, up where its load is below the mean and down where it
        is above (Wang et al. 2024, arXiv 2408.15664). Its share of the visits is what the next step's loss
        over the batch multiplies.
        """
        settings = self._settings
        if settings is None:
            return None
        loads_LX = torch.tensor(loads, dtype=torch.float64).view(len(self._layers), -1)
        visits_LX, entropy_L = loads_LX[:, :-1], loads_LX[:, -1]
        mean_L1 = visits_LX.mean(1, keepdim=True)
        for layer, router in self._routers.items():
            row = self._layers.index(layer)
            visits_X, mean = visits_LX[row], mean_L1[row]
            if move and settings.selection_bias:
                step_X = settings.bias_rate * (mean - visits_X).sign()
                router.selection_bias += step_X.to(router.selection_bias)
            if move and router.has_shares:
                router.shares.copy_(visits_X / visits_X.sum())
        busiest_L = (visits_LX / mean_L1).amax(1)
        num_tokens = float(visits_LX[0].sum()) / settings.per_token
        most = math.log(settings.num_experts) if settings.num_experts > 1 else 1.0
        return ExpertLoads(
            expert_load=float(busiest_L.max()),
            expert_load_mean=float(busiest_L.mean()),
            router_entropy=float(entropy_L.mean()) / num_tokens / most,
        )
