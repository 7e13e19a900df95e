"""Muon: momentum whose matrices are made orthogonal before they are applied.

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/); the size of an update follows Liu et al.
2025 (arXiv 2502.16982): 0.2 x sqrt(larger side), about the root mean square that AdamW's has, so that one
rate serves matrices of every shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from colossus.models.box import local
from colossus.optim.exchange import at_owners
from colossus.optim.owners import Matrix, families_of, matrix_of

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al.: steepest at zero, all values to [0.7, 1.2]
ITERATIONS = 5
RMS = 0.2


class Muon:
    """Updates matrices [out, in] and stacks of them [X, out, in], sharded or not. State: one fp32 momentum a
    parameter. Each matrix is made orthogonal once, by one of the ranks that share it.

    matmul_type: of the orthogonalisation's products, the quickest of the machine.
    """

    def __init__(
        self,
        parameters: Sequence[torch.Tensor],
        lr: float,
        momentum: float,
        weight_decay: float,
        matmul_type: torch.dtype,
    ) -> None:
        self.parameters = list(parameters)
        self.momentum = [torch.zeros_like(p) for p in self.parameters]
        self.follow(lr, momentum, weight_decay)
        self._matmul_type = matmul_type
        matrices: list[Matrix] = []
        self._places: list[tuple[int, Any]] = []  # of each: its parameter, and where in this rank's part
        for number, parameter in enumerate(self.parameters):
            places = range(len(local(parameter))) if parameter.ndim == 3 else [...]
            matrices += [matrix_of(parameter)] * len(places)
            self._places += [(number, place) for place in places]
        self._families = families_of(matrices)

    def follow(self, lr: float, momentum: float, weight_decay: float) -> None:
        """From the next update on, these hold."""
        self._lr, self._beta, self._weight_decay = lr, momentum, weight_decay

    def step(self, lr_factor: float, taken: torch.Tensor | None = None) -> None:
        """One update from the gradients that are there; none where `taken`, [] on the device, is false."""
        for _ in self.turns(lr_factor, taken):
            pass

    @torch.no_grad()
    def turns(self, lr_factor: float, taken: torch.Tensor | None = None) -> Iterator[None]:
        """The same, between whose turns matrices travel: until all are taken, gradients must stay."""
        if taken is None:
            taken = torch.ones((), dtype=torch.bool, device=local(self.parameters[0]).device)
        lr = self._lr * lr_factor
        keep = 1 - lr * self._weight_decay * taken.double()  # of a weight
        for parameter, momentum in zip(self.parameters, self.momentum, strict=True):
            assert parameter.grad is not None
            kept = local(momentum)
            kept.copy_(torch.where(taken, kept.lerp(local(parameter.grad), 1 - self._beta), kept))
        for updates in at_owners(self._families, self._nesterov, self._orthogonalised):
            for index, update in updates.items():
                number, place = self._places[index]
                parameter = self.parameters[number]
                size = lr * RMS * math.sqrt(max(parameter.shape[-2:]))
                local(parameter)[place].mul_(keep).add_(torch.where(taken, update, 0), alpha=-size)
            yield

    def _nesterov(self, index: int) -> torch.Tensor:
        """This rank's part of what is made orthogonal."""
        number, place = self._places[index]
        grad = self.parameters[number].grad
        assert grad is not None
        return local(grad)[place].lerp(local(self.momentum[number])[place], self._beta)

    def _orthogonalised(self, matrices_NOI: torch.Tensor) -> torch.Tensor:
        return orthogonalised(matrices_NOI, self._matmul_type)


def orthogonalised(matrices_NOI: torch.Tensor, matmul_type: torch.dtype) -> torch.Tensor:
    """Each matrix, its singular values brought near 1 by Newton-Schulz iterations; type and shape stay."""
    a, b, c = COEFFICIENTS
    tall = matrices_NOI.shape[1] > matrices_NOI.shape[2]
    x = matrices_NOI.mT if tall else matrices_NOI
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-12)).to(matmul_type)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices_NOI.dtype)
