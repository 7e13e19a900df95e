"""Muon: momentum whose matrices are made orthogonal before they are applied.

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/); the size of an update follows Liu et al.
2025 (arXiv 2502.16982): 0.2 x sqrt(larger side), about the root mean square that AdamW's has, so that one
rate serves matrices of every shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.distributed.tensor import DTensor

from colossus.models.box import box, local, whole

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al.: steepest at zero, all values to [0.7, 1.2]
ITERATIONS = 5
RMS = 0.2


class Muon:
    """Updates matrices [out, in] and stacks of them [..., out, in], sharded or not. State: one fp32 momentum
    a parameter.

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

    def follow(self, lr: float, momentum: float, weight_decay: float) -> None:
        """From the next update on, these hold."""
        self._lr, self._beta, self._weight_decay = lr, momentum, weight_decay

    @torch.no_grad()
    def step(self, lr_factor: float, taken: torch.Tensor | None = None) -> None:
        """One update from the gradients that are there; none where `taken`, [] on the device, is false."""
        if taken is None:
            taken = torch.ones((), dtype=torch.bool, device=local(self.parameters[0]).device)
        lr = self._lr * lr_factor
        keep = 1 - lr * self._weight_decay * taken.double()  # of a weight
        by_shape: dict[tuple[int, ...], list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for parameter, momentum in zip(self.parameters, self.momentum, strict=True):
            assert parameter.grad is not None
            grad, kept = local(parameter.grad), local(momentum)
            kept.copy_(torch.where(taken, kept.lerp(grad, 1 - self._beta), kept))
            nesterov = grad.lerp(kept, self._beta)
            if _holds_matrices(parameter):
                update = orthogonalised(nesterov, self._matmul_type)
                self._apply(lr, local(parameter), torch.where(taken, update, 0), keep)
                continue
            by_shape.setdefault(tuple(parameter.shape), []).append((parameter, whole(nesterov, parameter)))
        for pairs in by_shape.values():
            matrices = torch.stack([update for _, update in pairs])
            flat_NOI = matrices.flatten(0, -3)  # stacks of experts too
            updates = orthogonalised(flat_NOI, self._matmul_type).view_as(matrices)
            for (parameter, _), update in zip(pairs, updates, strict=True):
                part = torch.where(taken, _part(update, parameter), 0)
                self._apply(lr, local(parameter), part, keep, max(parameter.shape[-2:]))

    def _apply(
        self, lr: float, here: torch.Tensor, update: torch.Tensor, keep: torch.Tensor, side: int = 0
    ) -> None:
        """side: the larger one of the whole matrix; of the update's where it is not given."""
        size = lr * RMS * math.sqrt(side or max(update.shape[-2:]))
        here.mul_(keep).add_(update, alpha=-size)


def orthogonalised(matrices_NOI: torch.Tensor, matmul_type: torch.dtype) -> torch.Tensor:
    """Each matrix, its singular values brought near 1 by Newton-Schulz iterations; type and shape stay."""
    if not len(matrices_NOI):  # more ranks than experts
        return matrices_NOI
    a, b, c = COEFFICIENTS
    tall = matrices_NOI.shape[1] > matrices_NOI.shape[2]
    x = matrices_NOI.mT if tall else matrices_NOI
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-12)).to(matmul_type)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices_NOI.dtype)


def _holds_matrices(tensor: torch.Tensor) -> bool:
    """Whether it is a stack of which this rank holds whole matrices."""
    if tensor.ndim != 3 or not isinstance(tensor, DTensor):
        return tensor.ndim == 3
    return box(tensor)[1][1:] == tuple(tensor.shape[1:])


def _part(matrix: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's part of a matrix that all ranks hold."""
    offset, shape = box(like)
    return matrix[tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))]
