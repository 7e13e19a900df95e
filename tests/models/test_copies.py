"""Packed copies never answer for weights that have changed, however they were changed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from colossus.data.bytes_tokenizer import BytesTokenizer
from colossus.generation import generate, ready
from colossus.generation.generate import stream
from colossus.models import Decoder, build
from colossus.models.copies import owners_of
from colossus.models.linear import Linear
from tests.generation.families import tiny

TOKENIZER = BytesTokenizer()
FAMILIES = ["gpt2-124m", "llama3.1-8b", "mixtral-8x7b"]


def packed(name: str) -> Decoder:
    torch.set_num_threads(1)
    model = build(tiny(name, TOKENIZER.vocab_size), seed=3).eval()
    patched = pytest.MonkeyPatch()
    with patched.context() as patch:
        patch.setattr(ready, "_packs", lambda model, dtype: True)
        ready.make_ready(model, torch.float32)
    assert model.copies is not None
    return model


def logits(model: Decoder) -> torch.Tensor:
    """[1, T, V], in training's way: no copy serves there."""
    tokens_BT = torch.arange(40, 60)[None]
    return model(tokens_BT).detach()


def served(model: Decoder) -> torch.Tensor:
    """[1, T, V], by what generation takes."""
    assert model.copies is not None
    model.copies.refresh(model)
    with torch.no_grad(), model.copies.serving():
        return model(torch.arange(40, 60)[None])


def through_data(weight: nn.Parameter) -> None:
    weight.data.mul_(-1.5)


def through_numpy(weight: nn.Parameter) -> None:
    weight.detach().numpy()[...] *= -1.5


def one_value(weight: nn.Parameter) -> None:
    weight.data[0, 0] += 30.0


def two_rows_swapped(weight: nn.Parameter) -> None:
    weight.data[:2] = weight.data[:2].flip(0).clone()


def other_memory(weight: nn.Parameter) -> None:
    weight.data = -1.5 * weight.data


def not_contiguous(weight: nn.Parameter) -> None:
    weight.data = (-1.5 * weight.data).T.contiguous().T


def within_inference_mode(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(-1.5)


CHANGES = [
    through_data,
    through_numpy,
    one_value,
    two_rows_swapped,
    other_memory,
    not_contiguous,
    within_inference_mode,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_changed_matrix(name: str, change: Callable[[nn.Parameter], None]) -> None:
    """Each of them in turn, those that are packed together with others too."""
    model = packed(name)
    before = logits(model)
    for owners in owners_of(model)[:3] + owners_of(model)[-2:]:
        for owner in owners:
            kept = owner.weight.detach().clone()
            change(owner.weight)
            with torch.no_grad():  # as an evaluation or a user's own call: no copy is asked
                assert torch.equal(model(torch.arange(40, 60)[None]), logits(model))
            torch.testing.assert_close(served(model), logits(model), rtol=1e-4, atol=1e-5)
            assert not torch.allclose(logits(model), before, rtol=1e-4, atol=1e-5)
            owner.weight.data = kept


@pytest.mark.parametrize("name", FAMILIES)
def test_a_changed_bias_and_another_parameter_or_module(name: str) -> None:
    model = packed(name)
    linear = next(module for module in model.modules() if isinstance(module, Linear))
    linear.weight = nn.Parameter(-1.5 * linear.weight.detach())
    if linear.bias is not None:
        linear.bias.data.add_(1.0)
    torch.testing.assert_close(served(model), logits(model), rtol=1e-4, atol=1e-5)
    block = model.get_submodule("layers.0.attention")
    block.wv = Linear(block.wv.in_features, block.wv.out_features, bias=block.wv.bias is not None)
    nn.init.normal_(block.wv.weight)
    if block.wv.bias is not None:
        nn.init.zeros_(block.wv.bias)
    torch.testing.assert_close(served(model), logits(model), rtol=1e-4, atol=1e-5)


def test_an_adapter_around_a_linear() -> None:
    class Adapter(nn.Module):
        def __init__(self, base: Linear) -> None:
            super().__init__()
            self.base, self.scale = base, nn.Parameter(torch.tensor(-2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale * self.base(x)

    for name in ("wq", "wk"):
        model = packed("llama3.1-8b")
        before = logits(model)
        attention = model.get_submodule("layers.0.attention")
        setattr(attention, name, Adapter(getattr(attention, name)))
        torch.testing.assert_close(served(model), logits(model), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(logits(model), before, rtol=1e-4, atol=1e-5)


def test_generate_and_stream_after_a_change() -> None:
    """An average of two models, written into one of them through `.data`."""
    model, other = packed("llama3.1-8b"), build(tiny("llama3.1-8b", TOKENIZER.vocab_size), seed=7).eval()
    first = generate(model, TOKENIZER, ["ab"], max_tokens=12)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        ours.data.copy_((ours.data + 3 * theirs.data) / 4)
    plain = copy.deepcopy(model)
    plain.copies = None
    expected = generate(plain, TOKENIZER, ["ab"], max_tokens=12)
    assert expected != first
    assert generate(model, TOKENIZER, ["ab"], max_tokens=12) == expected
    assert "".join(stream(model, TOKENIZER, "ab", max_tokens=12)) == expected[0]


def test_nothing_is_packed_anew_where_nothing_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed("llama3.1-8b")
    monkeypatch.setattr("colossus.models.copies.pack", None)
    generate(model, TOKENIZER, ["ab"], max_tokens=2)


def test_a_copy_of_a_model_has_its_own() -> None:
    for twin in (copy.deepcopy(packed("llama3.1-8b")), pickle.loads(pickle.dumps(packed("llama3.1-8b")))):
        twin.head.weight.data.neg_()
        torch.testing.assert_close(served(twin), logits(twin), rtol=1e-4, atol=1e-5)
