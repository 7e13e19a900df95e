"""AdamW, decoupled weight decay (arXiv 1711.05101), by PyTorch's fused kernel.

Each rank updates its own parts. Given DTensors, PyTorch's optimizer would look for a sharding of every list
of them at the first step: seconds of Python for a large model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim.adamw import adamw

from colossus.models.box import local


class AdamW:
    """Updates parameters, sharded or not, all at one rate. State: two moments a parameter, sharded alike."""

    def __init__(
        self,
        parameters: Sequence[torch.Tensor],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        self.parameters = list(parameters)
        self.exp_avg = [torch.zeros_like(p) for p in self.parameters]
        self.exp_avg_sq = [torch.zeros_like(p) for p in self.parameters]
        self._steps = [torch.zeros((), device=local(p).device) for p in self.parameters]
        self.follow(lr, betas, eps, weight_decay)

    def follow(self, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        """From the next update on, these hold."""
        self._lr, self._betas, self._eps, self._weight_decay = lr, betas, eps, weight_decay

    def count(self, num_steps: int) -> None:
        """Takes the updates made so far as `num_steps`."""
        for step in self._steps:
            step.fill_(float(num_steps))

    @torch.no_grad()
    def step(self, lr_factor: float, taken: torch.Tensor | None = None) -> None:
        """One update from the gradients that are there; a parameter without one is left as it is, and so is
        all where `taken`, [] on the device, is false."""
        rows = [
            (local(p), local(p.grad), local(mean), local(square), step)
            for p, mean, square, step in zip(
                self.parameters, self.exp_avg, self.exp_avg_sq, self._steps, strict=True
            )
            if p.grad is not None
        ]
        if not rows:
            return
        weights, gradients, means, squares, steps = (list(column) for column in zip(*rows, strict=True))
        adamw(
            weights,
            gradients,
            means,
            squares,
            [],
            steps,
            fused=True,
            found_inf=None if taken is None else (~taken).float(),
            amsgrad=False,
            beta1=self._betas[0],
            beta2=self._betas[1],
            lr=self._lr * lr_factor,
            weight_decay=self._weight_decay,
            eps=self._eps,
            maximize=False,
        )
