"""The chunked cross entropy against the plain one, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from colossus.models import loss as loss_module
from colossus.models.loss import cross_entropy, loss_and_gradient
from colossus.perf import parts


def plain(
    x_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, z_loss: float = 0.0
) -> torch.Tensor:
    """What is minimised: with `z_loss`."""
    logits_NV = x_ND @ weight_VD.t()
    scored_N = targets_N != -100
    z = (logits_NV.logsumexp(-1).square() * scored_N).sum()
    return F.cross_entropy(logits_NV, targets_N, reduction="sum") + z_loss * z


def sample(
    tokens: int, width: int, vocab: int, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    x_ND = torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(dtype)
    weight_VD = torch.randn(vocab, width, generator=generator, dtype=torch.float64)
    targets_N = torch.randint(vocab, (tokens,), generator=generator)
    targets_N[torch.rand(tokens, generator=generator) < 0.2] = -100
    return x_ND.requires_grad_(), weight_VD.requires_grad_(), targets_N


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 64, 100])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_loss_and_gradients_in_float64(monkeypatch: pytest.MonkeyPatch, tokens: int, z_loss: float) -> None:
    """Chunks of 16 tokens: fewer, exactly one, several, and a last one that is not full."""
    monkeypatch.setattr(parts, "MIN_CHUNK", 16)
    monkeypatch.setitem(parts.CHUNK_LOGITS, "cpu", 0)
    x_ND, weight_VD, targets_N = sample(tokens, 12, 37)
    z_terms: list[torch.Tensor] = []
    loss, num_targets = cross_entropy(x_ND, weight_VD, targets_N, z_loss, z_terms=z_terms)
    assert int(num_targets) == int((targets_N != -100).sum())
    (3.0 * loss).backward()
    ours = x_ND.grad, weight_VD.grad
    x_ND.grad = weight_VD.grad = None
    expected = plain(x_ND, weight_VD, targets_N, z_loss)
    (3.0 * expected).backward()
    without = plain(x_ND, weight_VD, targets_N)
    torch.testing.assert_close(loss, without, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(z_terms, [(expected - without).detach()], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours[0], x_ND.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours[1], weight_VD.grad, rtol=1e-10, atol=1e-12)


def test_all_targets_ignored_is_zero_without_nan() -> None:
    x_ND, weight_VD, targets_N = sample(20, 8, 11)
    loss, num_targets = cross_entropy(x_ND, weight_VD, torch.full_like(targets_N, -100), z_loss=1e-3)
    loss.backward()
    assert float(loss.detach()) == 0.0 and int(num_targets) == 0
    assert float(x_ND.grad.abs().max()) == 0.0 and float(weight_VD.grad.abs().max()) == 0.0


def test_huge_logits_stay_finite() -> None:
    x_ND, weight_VD, targets_N = sample(8, 8, 11)
    loss, _ = cross_entropy(x_ND * 1e4, weight_VD, targets_N)
    loss.backward()
    assert loss.isfinite() and x_ND.grad.isfinite().all()


def test_no_gradient_is_kept_where_none_is_asked() -> None:
    x_ND, weight_VD, targets_N = sample(20, 8, 11)
    with torch.no_grad():
        loss, _ = cross_entropy(x_ND, weight_VD, targets_N)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain(x_ND, weight_VD, targets_N, 0.0).detach())


def test_only_one_side_needs_a_gradient() -> None:
    x_ND, weight_VD, targets_N = sample(20, 8, 11)
    cross_entropy(x_ND.detach(), weight_VD, targets_N)[0].backward()
    plain_grad = torch.autograd.grad(plain(x_ND, weight_VD, targets_N, 0.0), weight_VD)[0]
    torch.testing.assert_close(weight_VD.grad, plain_grad)


def test_a_second_backward_is_refused() -> None:
    x_ND, weight_VD, targets_N = sample(4, 8, 11)
    loss, _ = cross_entropy(x_ND, weight_VD, targets_N)
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="already"):
        loss.backward()


@pytest.mark.parametrize("tokens", [48, 50])
def test_bf16_activations_sum_in_fp32(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setattr(parts, "MIN_CHUNK", 16)
    monkeypatch.setitem(parts.CHUNK_LOGITS, "cpu", 0)
    x_ND, weight_VD, targets_N = sample(tokens, 16, 32, torch.bfloat16)
    weight32_VD = weight_VD.detach().float().requires_grad_()
    loss, _ = cross_entropy(x_ND, weight32_VD, targets_N)
    assert loss.dtype == torch.float32
    loss.backward()
    assert x_ND.grad.dtype == torch.bfloat16 and weight32_VD.grad.dtype == torch.float32
    exact = plain(x_ND.double(), weight_VD, targets_N, 0.0)
    grad_x, grad_weight = torch.autograd.grad(exact, (x_ND, weight_VD))
    torch.testing.assert_close(loss.double(), exact, rtol=1e-2, atol=0)
    assert torch.linalg.norm(x_ND.grad - grad_x) < 2e-2 * torch.linalg.norm(grad_x)
    assert torch.linalg.norm(weight32_VD.grad - grad_weight) < 2e-2 * torch.linalg.norm(grad_weight)


@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_what_is_written_for_the_compiler_is_the_same(soft_cap: float | None, z_loss: float) -> None:
    x_ND, weight_VD, targets_N = sample(50, 12, 37)
    logits_NV = (x_ND @ weight_VD.t()).detach()
    want = loss_module._loss_and_gradient(logits_NV.clone(), targets_N, z_loss, soft_cap, None)
    got = loss_and_gradient(logits_NV, targets_N, z_loss, soft_cap)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_where_a_second_backward_pass_is_to_come_both_have_the_same_gradients() -> None:
    """As schedules that split it take them: first of the inputs, then of the weights."""
    x_ND, weight_VD, targets_N = sample(40, 8, 30)
    loss, _ = cross_entropy(x_ND, weight_VD, targets_N, keep_gradients=True)
    expected = torch.autograd.grad(3 * plain(x_ND, weight_VD, targets_N), (x_ND, weight_VD))
    for _ in range(2):
        found = torch.autograd.grad(3 * loss, (x_ND, weight_VD), retain_graph=True)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_what_is_ignored_has_no_gradient(soft_cap: float | None) -> None:
    x_ND, weight_VD, targets_N = sample(20, 8, 30)
    targets_N[::3] = -100
    loss, count = cross_entropy(x_ND, weight_VD, targets_N, soft_cap=soft_cap)
    logits_NV = x_ND @ weight_VD.t()
    capped_NV = logits_NV if soft_cap is None else soft_cap * torch.tanh(logits_NV / soft_cap)
    other = F.cross_entropy(capped_NV, targets_N, reduction="sum")
    assert int(count) == int((targets_N != -100).sum())
    torch.testing.assert_close(loss, other, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(loss, (x_ND, weight_VD))
    expected = torch.autograd.grad(other, (x_ND, weight_VD))
    assert not found[0][targets_N == -100].any()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
