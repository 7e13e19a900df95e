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
from colossus.models.box import local
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
            (self._muon_share,) = {table[name].scale.muon for name in matrices}  # all sides grow together
            self._muon = Muon(
                list(matrices.values()),
                lr=settings.matrix_lr,
                momentum=settings.momentum,
                weight_decay=settings.weight_decay,
                matmul_type=matmul_type,
            )
        by_rate: dict[tuple[float, bool], list[tuple[str, torch.Tensor]]] = {}
        for name, parameter in named:
            if name not in matrices:
                group = (table[name].scale.adamw, table[name].group in DECAYED_GROUPS)
                by_rate.setdefault(group, []).append((name, parameter))
        betas = (settings.beta1, settings.beta2)
        self._adamw = [
            ([n for n, _ in members],
             AdamW([p for _, p in members], settings.lr, betas, settings.eps, settings.weight_decay))
            for members in by_rate.values()
        ]  # fmt: skip
        self._shares = list(by_rate)
        self._parameters = [parameter for _, parameter in named]
        self._num_steps = torch.zeros((), dtype=torch.int64, device=local(self._parameters[0]).device)
        self.follow(settings)

    def follow(self, settings: Settings) -> None:
        """From the next update on, the rates, decays and averages are those of `settings`."""
        betas = (settings.beta1, settings.beta2)
        for (share, decays), (_, adamw) in zip(self._shares, self._adamw, strict=True):
            decay = settings.weight_decay / share if decays else 0.0
            adamw.follow(settings.lr * share, betas, settings.eps, decay)
        if self._muon is not None:
            share = self._muon_share
            self._muon.follow(settings.matrix_lr * share, settings.momentum, settings.weight_decay / share)

    @property
    def num_steps(self) -> int:
        """Updates made so far: with `state()`, all that an optimizer knows. It is counted on the device."""
        return int(self._num_steps)

    @num_steps.setter
    def num_steps(self, count: int) -> None:
        self._num_steps.fill_(count)
        for _, adamw in self._adamw:
            adamw.count(count)

    def step(self, lr_factor: float, taken: torch.Tensor | None = None) -> None:
        """One update, at `lr_factor` of the rates. taken: a truth on the device, []; where it is false, all
        stays as it is, and no host learns of it. None: it is true."""
        turns = iter(()) if self._muon is None else self._muon.turns(lr_factor, taken)
        next(turns, None)  # Muon's first matrices travel while AdamW works
        for _, adamw in self._adamw:
            adamw.step(lr_factor, taken)
        for _ in turns:
            pass
        self._num_steps += 1 if taken is None else taken

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
