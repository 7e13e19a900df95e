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

from colossus.architecture import Architecture, Group, parameter_table
from colossus.models.init import logical_name
from colossus.optim.adamw import AdamW
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
        by_rate: dict[tuple[float, float], list[tuple[str, torch.Tensor]]] = {}
        for name, parameter in named:
            if name not in matrices:
                share = table[name].scale.adamw
                decay = settings.weight_decay / share if table[name].group in DECAYED_GROUPS else 0.0
                by_rate.setdefault((share, decay), []).append((name, parameter))
        betas = (settings.beta1, settings.beta2)
        self._adamw = [
            ([n for n, _ in members],
             AdamW([p for _, p in members], settings.lr * share, betas, settings.eps, decay))
            for (share, decay), members in by_rate.items()
        ]  # fmt: skip
        self._parameters = [parameter for _, parameter in named]
        self._num_steps = 0

    @property
    def num_steps(self) -> int:
        """Updates made so far: with `state()`, all that an optimizer knows."""
        return self._num_steps

    @num_steps.setter
    def num_steps(self, count: int) -> None:
        self._num_steps = count
        for _, adamw in self._adamw:
            adamw.count(count)

    def step(self, lr_factor: float) -> None:
        """One update, at `lr_factor` of the rates."""
        for _, adamw in self._adamw:
            adamw.step(lr_factor)
        if self._muon is not None:
            self._muon.step(lr_factor)
        self._num_steps += 1

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def state(self) -> dict[tuple[str, str], torch.Tensor]:
        """The tensors themselves, by (parameter, "exp_avg" | "exp_avg_sq" | "momentum")."""
        return dict(self.named_state())

    def named_state(self) -> Iterator[tuple[tuple[str, str], torch.Tensor]]:
        """The same one by one: two stages of a pipeline on one rank may have a parameter of one name."""
        for names, adamw in self._adamw:
            for name, mean, square in zip(names, adamw.exp_avg, adamw.exp_avg_sq, strict=True):
                yield (name, "exp_avg"), mean
                yield (name, "exp_avg_sq"), square
        if self._muon is not None:
            for name, momentum in zip(self._muon_names, self._muon.momentum, strict=True):
                yield (name, "momentum"), momentum


def build(model: nn.Module, arch: Architecture, settings: Settings, matmul_type: torch.dtype) -> Optimizer:
    """The optimizer that `settings` names, over the parameters of `model`, sharded or not."""
    return Optimizer(model, arch, settings, matmul_type)
