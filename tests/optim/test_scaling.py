"""Width: factors against numbers by hand, a coordinate check of both optimizers, and the base itself."""

from __future__ import annotations

import math

import pytest
import torch

from colossus import optim
from colossus.architecture import Architecture, Parameter, parameter_table
from colossus.models import Decoder, build
from colossus.optim.optimizer import Optimizer
from colossus.scaling import depth_scale
from colossus.sections import Optimizer as Settings
from tests.models.reference import architecture, random_tokens

BASE, RATE = 32, 0.01
VALUES = {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12, "momentum": 0.95}


def arch(width: int, base: int | None = BASE, **changed: object) -> Architecture:
    """Every side grows with the width; heads keep theirs."""
    sizes: dict[str, object] = {
        "hidden_size": width,
        "num_heads": width // 8,
        "num_kv_heads": width // 16,
        "intermediate_size": 3 * width,
        "initializer_range": 0.1,
        "qk_norm": True,
        "base_width": base,
    }
    return architecture(**(sizes | changed))


def table(*args: object, **changed: object) -> dict[str, Parameter]:
    return {p.name: p for p in parameter_table(arch(*args, **changed))}  # type: ignore[arg-type]


def made(described: Architecture, name: str, dtype: torch.dtype) -> tuple[Decoder, Optimizer]:
    model = build(described, seed=1, dtype=dtype)
    settings = Settings(name=name, lr=RATE, matrix_lr=RATE, **VALUES)
    return model, optim.build(model, described, settings, dtype)


def step(model: Decoder, optimizer: Optimizer, tokens_BT: torch.Tensor) -> None:
    loss, count = model(tokens_BT, tokens_BT.roll(-1, dims=1))
    (loss / count).backward()
    optimizer.step(1.0)
    optimizer.zero_grad()


@pytest.mark.parametrize(
    ("width", "matrix", "residual", "head", "rate", "muon"),
    [(32, 0.1, 0.05, 0.1, 1.0, 1.0), (128, 0.05, 0.025, 0.025, 0.25, 0.5)],
)
def test_factors_are_those_worked_out_by_hand(
    width: int, matrix: float, residual: float, head: float, rate: float, muon: float
) -> None:
    """Two layers: the residual products begin at a half of the others, 1/sqrt(2 x 2)."""
    found = table(width)
    expected = {
        "embedding.weight": (0.1, 1.0),
        "layers.1.attention.wq.weight": (matrix, rate),
        "layers.1.attention.wk.weight": (matrix, rate),
        "layers.1.attention.wo.weight": (residual, rate),
        "layers.1.mlp.w_up.weight": (matrix, rate),
        "layers.0.mlp.w_down.weight": (residual, rate),
        "head.weight": (head, rate),
    }
    for name, (std, share) in expected.items():
        assert found[name].std == pytest.approx(std, rel=1e-12), name
        assert found[name].scale.adamw == share, name
    assert all(p.scale.muon == muon for p in found.values() if p.group == "matrix")
    assert all(p.scale.init == p.scale.adamw == 1 for p in found.values() if p.group == "norm")


def test_values_of_a_built_model_are_as_wide_as_said() -> None:
    model = build(arch(128), seed=1)
    for parameter in parameter_table(arch(128)):
        values = model.get_parameter(parameter.name).detach()
        if parameter.init == "normal":
            assert float(values.std()) == pytest.approx(parameter.std, rel=0.05), parameter.name


def test_the_norm_before_a_tied_output_divides_it() -> None:
    tied = table(128, tie_embeddings=True)
    assert (tied["norm.weight"].scale.init, tied["norm.weight"].scale.adamw) == (0.25, 0.25)
    assert (tied["embedding.weight"].std, tied["embedding.weight"].scale.adamw) == (0.1, 1.0)
    assert tied["layers.0.mlp_norm.weight"].scale.init == 1
    model = build(arch(128, tie_embeddings=True), seed=1)
    assert torch.equal(model.norm.weight, torch.full((128,), 0.25))
    assert torch.equal(model.layers[0].mlp_norm.weight, torch.ones(128))


@pytest.mark.parametrize("scheme", ["gpt2", "llama", "plain"])
def test_depth_makes_the_products_smaller_that_a_scheme_names(scheme: str) -> None:
    found = table(32, None, init_scheme=scheme, num_layers=3)
    by_layer = {"gpt2": [6, 6, 6], "llama": [2, 4, 6], "plain": [1, 1, 1]}[scheme]
    for layer, outputs in enumerate(by_layer):
        std = 0.1 / math.sqrt(outputs)
        assert depth_scale(scheme, layer, 3) == pytest.approx(1 / math.sqrt(outputs))  # type: ignore[arg-type]
        assert found[f"layers.{layer}.attention.wo.weight"].std == pytest.approx(std)
        assert found[f"layers.{layer}.mlp.w_down.weight"].std == pytest.approx(std)
        up = std if scheme == "llama" else 0.1
        assert found[f"layers.{layer}.mlp.w_up.weight"].std == pytest.approx(up)
        assert found[f"layers.{layer}.mlp.w_gate.weight"].std == 0.1


def changes(name: str, width: int, base: int, tied: bool) -> list[float]:
    """Root mean square of what a few steps change in each layer's output, then in the logits."""
    model, optimizer = made(arch(width, base, tie_embeddings=tied), name, torch.float64)
    tokens_BT = random_tokens(model.arch, 4, 16)

    @torch.no_grad()
    def seen() -> list[torch.Tensor]:
        outputs: list[torch.Tensor] = []
        hooks = [
            layer.register_forward_hook(lambda _module, _inputs, output: outputs.append(output[0]))
            for layer in model.layers
        ]
        logits = model(tokens_BT)
        for hook in hooks:
            hook.remove()
        return [*outputs, logits]

    before = seen()
    for _ in range(4):
        step(model, optimizer, tokens_BT)
    pairs = zip(before, seen(), strict=True)
    return [float((after - start).square().mean().sqrt()) for start, after in pairs]


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_steps_change_activations_alike_at_all_widths(name: str, tied: bool) -> None:
    """Yang et al.'s coordinate check, at four times the base width; without the rule they change far more."""
    narrow = changes(name, BASE, BASE, tied)
    scaled, standard = changes(name, 4 * BASE, BASE, tied), changes(name, 4 * BASE, 4 * BASE, tied)
    *layers, logits = [wide / start for wide, start in zip(scaled, narrow, strict=True)]
    assert all(0.85 < ratio < 1.15 for ratio in layers)
    assert 0.5 < logits < 1.1
    *layers, logits = [wide / start for wide, start in zip(standard, narrow, strict=True)]
    assert all(ratio > 7 for ratio in layers)
    assert logits > 2


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_at_the_base_width_nothing_changes_a_bit(name: str) -> None:
    (plain, ours), (based, theirs) = (made(arch(32, base), name, torch.float32) for base in (None, 32))
    for seed in range(3):
        for model, optimizer in ((plain, ours), (based, theirs)):
            step(model, optimizer, random_tokens(plain.arch, 2, 8, seed=seed))
    for (key, tensor), other in zip(plain.named_parameters(), based.parameters(), strict=True):
        assert torch.equal(tensor, other), key


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_of_a_scaled_model_goes_on_bitwise(name: str) -> None:
    """By the same names as that of any other, and with the same rates when it is loaded."""
    model, optimizer = made(arch(64, tie_embeddings=True), name, torch.float32)
    tokens_BT = random_tokens(model.arch, 2, 8)
    step(model, optimizer, tokens_BT)
    loaded, other = made(arch(64, tie_embeddings=True), name, torch.float32)
    loaded.load_state_dict(model.state_dict())
    assert (
        other.state().keys()
        == made(arch(64, None, tie_embeddings=True), name, torch.float32)[1].state().keys()
    )
    for key, tensor in other.state().items():
        tensor.copy_(optimizer.state()[key])
    other.num_steps = optimizer.num_steps
    for each in ((model, optimizer), (loaded, other)):
        step(*each, tokens_BT)
    for (key, tensor), again in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(tensor, again), key


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weights_are_forgotten_alike_at_all_widths(name: str) -> None:
    """Without a gradient a step shrinks matrices by rate x decay, whatever their share of the rate."""
    model, optimizer = made(arch(64), name, torch.float64)
    before = {key: tensor.detach().clone() for key, tensor in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.5)
    for parameter in parameter_table(model.arch):
        kept = 1 - 0.5 * RATE * 0.1 if parameter.group == "matrix" else 1.0
        after = model.get_parameter(parameter.name).detach()
        torch.testing.assert_close(after, before[parameter.name] * kept, rtol=1e-14, atol=0)
