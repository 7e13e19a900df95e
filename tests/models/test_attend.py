"""Attention by plain products against PyTorch's own, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from colossus.models import attend as attend_module
from colossus.models.attend import Scores, attend, attend_by_products
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


def by_hand(
    inputs: Sample,
    scale: float,
    cap: float | None = None,
    temperature_BT: torch.Tensor | None = None,
    sinks_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention, a row of scores at a time, in float64."""
    q, k, v = (x.detach().double() for x in inputs)
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    for b in range(len(q)):
        for h in range(heads):
            for t in range(q.shape[2]):
                scores = scale * (k[b, h // group, : t + 1] @ q[b, h, t])
                scores = scores if cap is None else cap * torch.tanh(scores / cap)
                scores = scores if temperature_BT is None else scores * temperature_BT[b, t]
                sink = torch.zeros(0) if sinks_H is None else sinks_H[h : h + 1].double()
                shares = torch.cat((scores, sink)).softmax(0)[: t + 1]
                out[b, h, t] = shares @ v[b, h // group, : t + 1]
    return out


SPECIAL = {
    "cap": {"cap": 3.0},
    "temperature": {"temperature_BT": torch.linspace(0.5, 2.0, 24).view(2, 12)},
    "sinks": {"sinks_H": torch.tensor([-1.0, 0.0, 2.0, 5.0])},
}
SPECIAL["all"] = {name: value for row in SPECIAL.values() for name, value in row.items()}


@pytest.mark.parametrize("which", SPECIAL)
def test_what_only_products_can_do_is_as_worked_out_by_hand(
    which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row of the batch with temperatures of its own; in blocks, and for the last query alone."""
    monkeypatch.setattr(attend_module, "ROWS", 5)
    inputs, special = sample(12, 2), SPECIAL[which]
    expected = by_hand(inputs, 0.7, **special)
    scores = Scores(0.7, special.get("cap"))
    heat, sinks = special.get("temperature_BT"), special.get("sinks_H")
    found = attend(*inputs, None, scores, heat, sinks)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    q, k, v = inputs
    last = attend(q[:, :, -1:], k, v, None, scores, None if heat is None else heat[:, -1:], sinks)
    torch.testing.assert_close(last, expected[:, :, -1:], rtol=1e-12, atol=1e-12)
    later = attend(q[:, :, 5:], k, v, None, scores, None if heat is None else heat[:, 5:], sinks)
    torch.testing.assert_close(later, expected[:, :, 5:], rtol=1e-12, atol=1e-12)


def test_scores_of_special_attention_are_scaled_and_shared_out_in_fp32() -> None:
    """Scores of up to 100 have steps of a half in bf16: shares would be off by a third."""
    inputs = sample(24, 2, torch.bfloat16)
    scores, temperature = Scores(2.9), torch.full((24,), 1.0)
    found = attend(*inputs, None, scores, temperature).detach()
    q, k, _ = (x.detach() for x in inputs)
    rounded = tuple(x.double() for x in (q, k, inputs[2].detach()))
    products = (q @ k.repeat_interleave(2, dim=1).mT).double()  # as they come out of the product, in bf16
    hidden = torch.full((24, 24), -torch.inf, dtype=torch.float64).triu(1)
    shares = (2.9 * products + hidden).softmax(-1)
    expected = shares @ rounded[2].repeat_interleave(2, dim=1)
    assert (2.9 * products).abs().max() > 50
    assert float((found.double() - expected).abs().max()) < 0.05


def test_new_tokens_behind_a_long_text_see_all_of_it_and_none_beyond_themselves() -> None:
    """More keys than are taken in blocks, in any type: the kernel's own causal mask begins at the first."""
    q, k, v = (x.detach() for x in sample(1500, 2, torch.float32))
    whole = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    for num_new in (1, 2, 50):
        found = attend(q[:, :, -num_new:], k, v)
        torch.testing.assert_close(found, whole[:, :, -num_new:], rtol=1e-5, atol=1e-5)
