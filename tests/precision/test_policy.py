"""What a model computes with, and that its weights stay what they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from colossus.errors import UserError
from colossus.models import Decoder, build
from colossus.precision import apply_precision, torch_type
from tests.models.reference import architecture, random_tokens


def model_and_tokens() -> tuple[Decoder, torch.Tensor]:
    arch = architecture(qk_norm=True)
    return build(arch, seed=3), random_tokens(arch, 2, 9)


@pytest.mark.parametrize("name", ["bf61", "fp16", "float32", "FP32", ""])
def test_another_type_is_refused_and_changes_nothing(name: str) -> None:
    model, _ = model_and_tokens()
    apply_precision(model, "bf16")
    with pytest.raises(UserError, match=f"precision.type={name}: must be one of fp32, bf16"):
        apply_precision(model, name)
    assert model.compute_dtype == torch.bfloat16


def test_the_nearest_type_is_offered() -> None:
    with pytest.raises(UserError, match="did you mean 'bf16'"):
        torch_type("bf61")
    assert (torch_type("fp32"), torch_type("bf16")) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_weights_stay_and_products_follow(name: str, dtype: torch.dtype) -> None:
    model, tokens_BT = model_and_tokens()
    kept = {n: (p, p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters()}
    assert apply_precision(model, name) is model
    assert model.compute_dtype == dtype

    seen: set[torch.dtype] = set()
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(
                lambda _, inputs, output: seen.update({inputs[0].dtype, output.dtype})
            )
    loss, _ = model(tokens_BT, tokens_BT)
    loss.backward()
    assert seen == {dtype}
    assert loss.dtype == torch.float32
    for n, parameter in model.named_parameters():
        same, address, values = kept[n]
        assert parameter is same and parameter.data_ptr() == address, n
        assert parameter.dtype == torch.float32 and torch.equal(parameter.detach(), values), n
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, n


def test_going_back_to_fp32_gives_bitwise_the_same() -> None:
    model, tokens_BT = model_and_tokens()
    with torch.no_grad():
        before_BTV = model(tokens_BT)
        rounded_BTV = apply_precision(model, "bf16")(tokens_BT)
        after_BTV = apply_precision(model, "fp32")(tokens_BT)
    assert torch.equal(before_BTV, after_BTV)
    error = (rounded_BTV.float() - before_BTV).norm() / before_BTV.norm()
    assert 1e-4 < error < 3e-2  # bf16 keeps 8 bits: a product is rounded by up to 2^-9


def test_updates_below_the_steps_of_bf16_are_kept() -> None:
    """What the fp32 weights are for: 1 + 1e-4 is 1 in bf16, a hundred of them are not."""
    model, _ = model_and_tokens()
    apply_precision(model, "bf16")
    weight = model.layers[0].mlp.w_up.weight
    with torch.no_grad():
        weight.fill_(1.0)
        for _ in range(100):
            weight += 1e-4
    x = torch.ones(1, weight.shape[1], dtype=torch.bfloat16)
    out = model.layers[0].mlp.w_up(x)
    assert out.dtype == torch.bfloat16
    expected = torch.full_like(weight, 1.01).bfloat16().double().sum(1)
    torch.testing.assert_close(out[0].double(), expected, rtol=2**-8, atol=0)
    assert out[0].double().mean() > weight.shape[1]
