"""Cross entropy over a large vocabulary that never holds all logits."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Protocol

import torch

from colossus.architecture import IGNORED
from colossus.perf.parts import chunk_tokens


class VocabShare(Protocol):
    """Where ranks share the rows of the output matrix: the first of this rank's, and reductions over them."""

    first: int

    def max(self, x: torch.Tensor) -> torch.Tensor: ...

    def sum(self, x: torch.Tensor) -> torch.Tensor: ...


def cross_entropy(
    x_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    share: VocabShare | None = None,
    keep_gradients: bool = False,
    compiled: bool = False,
    z_terms: list[torch.Tensor] | None = None,
    hardware: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross entropy (nats) of the logits x W^T, and the number of targets that are not ignored.

    Tokens are taken in chunks, and each chunk's gradient is computed with its loss: logits are computed
    once and live for one chunk. z_loss adds z_loss * logsumexp(logits)^2 for every target to what is
    minimised, which keeps logits from drifting (PaLM, section 5): through the gradient alone; its sum is
    appended to `z_terms`, and what is returned stays the cross entropy. soft_cap: the logits are soft_cap *
    tanh(x W^T / soft_cap). Sums are in fp32 or better. The products are of x's type; the weight's gradient is
    summed in the weight's own type or fp32, whichever is wider.

    share: `weight_VD` is this rank's part; x's gradient is of that part, to be summed over ranks.
    keep_gradients: for a backward pass that asks for the two gradients one after the other.
    compiled: on a GPU, what is made of a chunk's logits is one compiled kernel or two, not a dozen.
    hardware: "cpu" or "cuda", whose chunks it takes; None: those of the device that x is on.
    """
    with_gradient = torch.is_grad_enabled() and (x_ND.requires_grad or weight_VD.requires_grad)
    compiled = compiled and share is None and x_ND.device.type == "cuda"
    loss, z_term = _ChunkedCrossEntropy.apply(
        x_ND, weight_VD, targets_N, z_loss, soft_cap, share, keep_gradients, compiled, with_gradient,
        hardware or x_ND.device.type,
    )  # fmt: skip
    if z_terms is not None:
        z_terms.append(z_term)
    return loss, (targets_N != IGNORED).sum()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradients of a loss of 1 wait for the backward pass, which scales them; it can run once."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_N: torch.Tensor,
        z_loss: float,
        soft_cap: float | None,
        share: VocabShare | None,
        keep_gradients: bool,
        compiled: bool,
        with_gradient: bool,
        hardware: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        exact = torch.promote_types(x_ND.dtype, torch.float32)
        product_VD = weight_VD.to(x_ND.dtype)
        loss = z_term = torch.zeros((), dtype=exact, device=x_ND.device)
        grad_x_ND = torch.empty_like(x_ND) if with_gradient else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=exact) if with_gradient else None
        num = x_ND.shape[0]
        size = chunk_tokens(num, weight_VD.shape[0], hardware)
        for start in range(0, num, size):
            rows = slice(start, start + size)
            x_CD = x_ND[rows]
            logits_CV = torch.mm(x_CD, product_VD.t())
            if compiled:
                chunk_loss, chunk_z, grad_logits_CV = _compiled()(
                    logits_CV, targets_N[rows], z_loss, soft_cap
                )
            else:
                chunk_loss, chunk_z, grad_logits_CV = _loss_and_gradient(
                    logits_CV.to(exact), targets_N[rows], z_loss, soft_cap, share
                )
            del logits_CV
            loss, z_term = loss + chunk_loss, z_term + chunk_z
            if grad_x_ND is not None and grad_weight_VD is not None:
                grad_logits_CV = grad_logits_CV.to(x_ND.dtype)
                torch.mm(grad_logits_CV, product_VD, out=grad_x_ND[rows])
                _add_product(grad_weight_VD, grad_logits_CV.t(), x_CD)
            del grad_logits_CV  # before the next chunk's logits take as much again
        ctx.gradients, ctx.keep = (grad_x_ND, grad_weight_VD), keep_gradients
        ctx.weight_type = weight_VD.dtype
        ctx.mark_non_differentiable(z_term)
        return loss, z_term

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_loss: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        assert ctx.gradients is not None, "this loss was propagated back already"
        grad_x_ND, grad_weight_VD = ctx.gradients
        if ctx.keep:
            return grad_x_ND * grad_loss, (grad_weight_VD * grad_loss).to(ctx.weight_type), *8 * (None,)
        ctx.gradients = None
        # In place: at a vocabulary of 128k and width 4,096 a second copy would be 2 GiB.
        return grad_x_ND.mul_(grad_loss), grad_weight_VD.mul_(grad_loss).to(ctx.weight_type), *8 * (None,)


def _loss_and_gradient(
    logits_CV: torch.Tensor,
    targets_C: torch.Tensor,
    z_loss: float,
    soft_cap: float | None,
    share: VocabShare | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of a chunk: summed cross entropy, summed z-loss, and the gradient of both by the logits, which it
    overwrites.

    Every pass over the logits counts: in place and with one exponential a logit this takes two thirds of
    the time of `logsumexp` and a softmax, and no compiler does better (12M parameters, vocabulary 4,096).
    """
    slope_CV = None
    if soft_cap is not None:
        capped_CV = logits_CV.div_(soft_cap).tanh_()
        slope_CV = 1 - capped_CV.square()
        logits_CV = capped_CV.mul_(soft_cap)
    scored_C1 = (targets_C != IGNORED).unsqueeze(1)
    here_C1, first = scored_C1, 0 if share is None else share.first
    if share is not None:
        place_C1 = targets_C.unsqueeze(1) - first
        here_C1 = scored_C1 & (place_C1 >= 0) & (place_C1 < logits_CV.shape[1])
    index_C1 = (targets_C.unsqueeze(1) - first).where(here_C1, 0)
    max_C1 = logits_CV.amax(-1, keepdim=True)
    if share is not None:
        max_C1 = share.max(max_C1)
    shifted_CV = logits_CV.sub_(max_C1)
    target_C1 = shifted_CV.gather(1, index_C1)
    exp_CV = shifted_CV.exp_()
    sum_C1 = exp_CV.sum(-1, keepdim=True)
    if share is not None:
        sum_C1, target_C1 = share.sum(torch.stack((sum_C1, target_C1.where(here_C1, 0)))).unbind()
    log_sum_C1 = sum_C1.log() + max_C1
    loss_C1, z_C1 = sum_C1.log() - target_C1, z_loss * log_sum_C1.square()
    scale_C1 = (1 + 2 * z_loss * log_sum_C1) * scored_C1
    grad_CV = exp_CV.mul_(scale_C1 / sum_C1)
    grad_CV.scatter_add_(1, index_C1, -here_C1.to(grad_CV.dtype))
    if slope_CV is not None:
        grad_CV.mul_(slope_CV)
    return loss_C1.where(scored_C1, 0).sum(), z_C1.where(scored_C1, 0).sum(), grad_CV


@lru_cache(maxsize=1)
def _compiled() -> Any:
    return torch.compile(loss_and_gradient, dynamic=False)


def loss_and_gradient(
    logits_CV: torch.Tensor, targets_C: torch.Tensor, z_loss: float, soft_cap: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same written for a compiler, which reads the logits in their own type, keeps nothing in a wider one
    and writes the gradient in theirs."""
    scored_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    if soft_cap is not None:
        scored_CV = soft_cap * torch.tanh(scored_CV / soft_cap)
    is_scored_C1 = (targets_C != IGNORED).unsqueeze(1)
    index_C1 = targets_C.unsqueeze(1).where(is_scored_C1, 0)
    log_sum_C1 = scored_CV.logsumexp(-1, keepdim=True)
    loss_C1, z_C1 = log_sum_C1 - scored_CV.gather(1, index_C1), z_loss * log_sum_C1.square()
    scale_C1 = (1 + 2 * z_loss * log_sum_C1) * is_scored_C1
    is_target_CV = torch.arange(logits_CV.shape[1], device=logits_CV.device) == index_C1
    grad_CV = (scored_CV - log_sum_C1).exp() * scale_C1 - (is_target_CV & is_scored_C1).to(scored_CV.dtype)
    if soft_cap is not None:
        grad_CV = grad_CV * (1 - (scored_CV / soft_cap).square())
    sums = loss_C1.where(is_scored_C1, 0).sum(), z_C1.where(is_scored_C1, 0).sum()
    return *sums, grad_CV.to(logits_CV.dtype)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right; the product is of the factors' type, the sum of `total`'s."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(torch.mm(left, right))
