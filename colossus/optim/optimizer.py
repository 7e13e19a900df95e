"""The optimizer of a run: AdamW for all, or Muon for the layers' matrices and AdamW for the rest.

Groups come from the parameter table: `weight_decay` applies to matrices of the layers, those of experts and
routers too (OLMoE, arXiv 2409.02060, decays all parameters); embeddings, the output head, norms and biases
have none. Muon takes the matrices; a router's rows are directions of single experts, and stay with AdamW. A
parameter's rate is its share (`Parameter.scale`) of the optimizer's; its decay is divided by that share, so
that rate x decay stays (see `scaling`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from colossus.architecture import Architecture, Group, parameter_table
from colossus.models.init import logical_name
from colossus.optim.muon import Muon
from colossus.sections import Optimizer as Settings

MUON_GROUPS: tuple[Group, ...] = ("matrix", "expert")
DECAYED_GROUPS: tuple[Group, ...] = (*MUON_GROUPS, "router")


class Optimizer:
    """All optimizers of a model as one. State is named (parameter, kind), and made at once, so that it can
    be loaded before the first step."""

    def __init__(
        self, model: nn.Module, arch: Architecture, settings: Settings, matmul_type: torch.dtype
    ) -> None:
        table = {parameter.name: parameter for parameter in parameter_table(arch)}
        named = [(logical_name(name), parameter) for name, parameter in model.named_parameters()]
        matrices = {n: p for n, p in named if settings.name == "muon" and table[n].group in MUON_GROUPS}
        self._muon: Muon | None = None
        if matrices:
            self._muon_names = list(matrices)
            (share,) = {table[name].scale.muon for name in matrices}  # all sides grow together
            self._muon = Muon(
                list(matrices.values()),
                lr=settings.matrix_lr * share,
                momentum=settings.momentum,
                weight_decay=settings.weight_decay / share,
                matmul_type=matmul_type,
            )
        by_group: dict[tuple[float, float, object], list[tuple[str, torch.Tensor]]] = {}
        for name, parameter in sorted(named, key=lambda pair: table[pair[0]].group in DECAYED_GROUPS):
            if name not in matrices:
                share = table[name].scale.adamw
                decay = settings.weight_decay / share if table[name].group in DECAYED_GROUPS else 0.0
                mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
                by_group.setdefault((share, decay, mesh), []).append((name, parameter))
        groups = [
            {"params": [p for _, p in members], "lr": settings.lr * share, "weight_decay": weight_decay}
            for (share, weight_decay, _), members in by_group.items()
        ]
        self._adamw_names = [name for members in by_group.values() for name, _ in members]
        self._rates = [settings.lr * share for share, _, _ in by_group]
        betas = (settings.beta1, settings.beta2)
        self._adamw = torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps, fused=True)
        self._adamw_parameters = [p for group in self._adamw.param_groups for p in group["params"]]
        for parameter in self._adamw_parameters:
            self._adamw.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        self._num_steps = 0

    @property
    def num_steps(self) -> int:
        """Updates made so far: with `state()`, all that an optimizer knows."""
        return self._num_steps

    @num_steps.setter
    def num_steps(self, count: int) -> None:
        self._num_steps = count
        for parameter in self._adamw_parameters:
            self._adamw.state[parameter]["step"].fill_(float(count))

    def step(self, lr_factor: float) -> None:
        """One update, at `lr_factor` of the rates."""
        for group, rate in zip(self._adamw.param_groups, self._rates, strict=True):
            group["lr"] = rate * lr_factor
        self._adamw.step()
        if self._muon is not None:
            self._muon.step(lr_factor)
        self._num_steps += 1

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        self._adamw.zero_grad(set_to_none=True)
        if self._muon is not None:
            for parameter in self._muon.parameters:
                parameter.grad = None

    def state(self) -> dict[tuple[str, str], torch.Tensor]:
        """The tensors themselves, by (parameter, "exp_avg" | "exp_avg_sq" | "momentum")."""
        return dict(self.named_state())

    def named_state(self) -> Iterator[tuple[tuple[str, str], torch.Tensor]]:
        """The same one by one: two stages of a pipeline on one rank may have a parameter of one name."""
        for name, parameter in zip(self._adamw_names, self._adamw_parameters, strict=True):
            for kind in ("exp_avg", "exp_avg_sq"):
                yield (name, kind), self._adamw.state[parameter][kind]
        if self._muon is not None:
            for name, momentum in zip(self._muon_names, self._muon.momentum, strict=True):
                yield (name, "momentum"), momentum


def build(model: nn.Module, arch: Architecture, settings: Settings, matmul_type: torch.dtype) -> Optimizer:
    """The optimizer that `settings` names, over the parameters of `model`, sharded or not."""
    return Optimizer(model, arch, settings, matmul_type)
