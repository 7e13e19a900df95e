"""Attention by plain products against PyTorch's own, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from colossus.models import attend as attend_module
from colossus.models.attend import attend, attend_by_products
from colossus.models.sight import document_mask

Sample = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def sample(num_tokens: int, kv_heads: int, dtype: torch.dtype = torch.float64) -> Sample:
    generator = torch.Generator().manual_seed(num_tokens)

    def made(heads: int) -> torch.Tensor:
        x_BTHE = torch.randn(2, num_tokens, heads, 8, generator=generator, dtype=torch.float64)
        return (2 * x_BTHE).to(dtype).transpose(1, 2).requires_grad_()

    return made(4), made(kv_heads), made(kv_heads)


def gradients(out_BHTE: torch.Tensor, inputs: Sample) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_BHTE.shape, generator=generator, dtype=torch.float64)
    return torch.autograd.grad((out_BHTE * weight).sum(), inputs, retain_graph=True)


@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9, 30])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("documents", [False, True])
def test_products_equal_the_fused_kernel(
    monkeypatch: pytest.MonkeyPatch, num_tokens: int, kv_heads: int, documents: bool
) -> None:
    """Blocks of 8 queries: fewer, exactly one, several, and a last one that is not full."""
    monkeypatch.setattr(attend_module, "ROWS", 8)
    inputs = sample(num_tokens, kv_heads)
    documents_BT = torch.stack([torch.arange(num_tokens) // 5, torch.arange(num_tokens) // 11])
    mask = document_mask(documents_BT, torch.arange(documents_BT.shape[1])) if documents else None
    expected = F.scaled_dot_product_attention(
        *inputs, attn_mask=mask, is_causal=mask is None, enable_gqa=kv_heads != 4
    )
    found = attend_by_products(*inputs, mask)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_bf16_is_as_near_to_float64_as_the_fused_kernel() -> None:
    inputs = sample(24, 2, torch.bfloat16)
    exact_inputs = tuple(x.detach().double().requires_grad_() for x in inputs)
    exact = attend_by_products(*exact_inputs)
    fused = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    found = attend_by_products(*inputs)
    assert found.dtype == torch.bfloat16

    def errors(out: torch.Tensor) -> list[float]:
        pairs = zip((out, *gradients(out, inputs)), (exact, *gradients(exact, exact_inputs)), strict=True)
        return [float((x - y).detach().norm() / y.detach().norm()) for x, y in pairs]

    for ours, theirs in zip(errors(found), errors(fused), strict=True):
        assert ours < max(1e-2, 2 * theirs)


def test_long_windows_and_single_tokens_take_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> torch.Tensor:
        raise AssertionError

    monkeypatch.setattr(attend_module, "attend_by_products", refuse)
    monkeypatch.setattr(attend_module, "MAX_BLOCKED", 16)
    q, k, v = sample(17, 4)
    attend(q, k, v)
    attend(q[:, :, -1:], k, v, torch.ones(1, 17, dtype=torch.bool))
    with pytest.raises(AssertionError):
        attend(q[:, :, :16], k[:, :, :16], v[:, :, :16])
