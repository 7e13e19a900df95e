"""A layer of experts against a loop over tokens and their experts in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from colossus.architecture import Architecture, Experts
from colossus.models.experts import Experts as Stacks
from colossus.models.experts import MoE, sort_by_expert
from colossus.models.grouped import grouped_product
from colossus.parallel.binaries import choose_cache
from tests.models.reference import architecture

X, K, D, N = 5, 2, 32, 11


def arch(mlp: str = "swiglu", bias: bool = False, **experts: object) -> Architecture:
    settings = {"num_experts": X, "per_token": K, "intermediate_size": 24, "bias": bias} | experts
    return architecture(mlp=mlp, experts=Experts.model_validate(settings))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for seed, tensor in enumerate(module.parameters()):
            tensor.copy_(random(*tensor.shape, seed=100 + seed) / 4)
    return module


def of_expert(stacks: Stacks, mlp: str, x_D: torch.Tensor, expert: int) -> torch.Tensor:
    """One expert's output for one token."""

    def product(name: str, x: torch.Tensor) -> torch.Tensor:
        y = getattr(stacks, name)[expert] @ x
        bias = getattr(stacks, f"{name}_bias")
        return y if bias is None else y + bias[expert]

    up = product("w_up", x_D)
    if mlp == "gelu":
        return product("w_down", F.gelu(up, approximate="tanh"))
    gate = product("w_gate", x_D)
    if mlp == "clamped_swiglu":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return product("w_down", (up + 1) * gate * torch.sigmoid(1.702 * gate))
    return product("w_down", F.silu(gate) * up)


def by_loop(
    stacks: Stacks, mlp: str, x_ND: torch.Tensor, weights_NK: torch.Tensor, experts_NK: torch.Tensor
) -> torch.Tensor:
    rows = []
    for n, x_D in enumerate(x_ND):
        visits = zip(weights_NK[n], experts_NK[n].tolist(), strict=True)
        rows.append(sum((w * of_expert(stacks, mlp, x_D, expert) for w, expert in visits), torch.zeros(D)))
    return torch.stack(rows)


CHOICES = {
    "any": torch.stack([torch.randperm(X, generator=torch.Generator().manual_seed(n))[:K] for n in range(N)]),
    "some are empty": torch.tensor([[1, 3]] * N),
    "all to one": torch.tensor([[4, 4]] * N),
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(("mlp", "bias"), [("swiglu", False), ("gelu", False), ("clamped_swiglu", True)])
def test_a_loop_over_tokens(choice: str, mlp: str, bias: bool) -> None:
    """Outputs, and the gradients of inputs, weights and every matrix."""
    stacks = filled(Stacks(arch(mlp, bias)).double())
    assert isinstance(stacks, Stacks)
    found, expected = [], []
    for compute, results in ((stacks, found), (lambda *args: by_loop(stacks, mlp, *args), expected)):
        x_ND = random(N, D).requires_grad_()
        weights_NK = random(N, K, seed=1).abs().requires_grad_()
        y_ND = compute(x_ND, weights_NK, CHOICES[choice])
        grads = torch.autograd.grad(
            (y_ND * random(N, D, seed=2)).sum(), [x_ND, weights_NK, *stacks.parameters()]
        )
        results += [y_ND, *grads]
    assert len(found) == 3 + len(list(stacks.parameters()))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_shared_experts_are_added() -> None:
    layer = filled(MoE(arch(num_shared=2)).double())
    assert isinstance(layer, MoE) and layer.shared is not None
    x_BTD = random(2, 4, D)
    y_BTD, load = layer(x_BTD)
    routed = layer.experts(x_BTD.flatten(0, 1), *layer.router(x_BTD, None)[:2]).view_as(x_BTD)
    assert load is None and layer.shared.w_up.weight.shape == (48, D)
    torch.testing.assert_close(y_BTD, routed + layer.shared(x_BTD), rtol=1e-12, atol=1e-12)


def test_the_order_of_visits() -> None:
    order = sort_by_expert(torch.tensor([[2, 0], [0, 4], [2, 4]]), X)
    assert order.experts_M.tolist() == [0, 0, 2, 2, 4, 4]
    assert order.visits_M.tolist() == [1, 2, 0, 4, 3, 5]
    assert order.tokens_M.tolist() == [0, 1, 0, 2, 1, 2]
    assert order.places_NK.tolist() == [[2, 0], [1, 4], [3, 5]]
    assert order.ends_X.tolist() == [2, 2, 4, 4, 6] and order.ends_X.dtype == torch.int32


@pytest.mark.parametrize("ends", [[2, 5, 7], [0, 7, 7], [7, 7, 7]])
def test_gradients_of_the_grouped_product(ends: list[int]) -> None:
    x_MI, w_XOI = random(7, 4).requires_grad_(), random(3, 5, 4, seed=1).requires_grad_()
    ends_X = torch.tensor(ends, dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda x, w: grouped_product(x, w, ends_X), (x_MI, w_XOI))
    y_MO = grouped_product(x_MI, w_XOI, ends_X)
    experts_M = [sum(m >= end for end in ends) for m in range(7)]
    expected = torch.stack([w_XOI[e] @ x for e, x in zip(experts_M, x_MI, strict=True)])
    torch.testing.assert_close(y_MO, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", [(16, 32), (5, 7), (6, 32)])
@pytest.mark.parametrize("ends", [[20, 20, 64], [0, 0, 64], [8, 40, 64]])
def test_fp32_is_near_float64(ends: list[int], sizes: tuple[int, int]) -> None:
    """PyTorch's own kernel, which takes no float64, and no rows but of whole 16 bytes; empty groups have
    gradients of zero."""
    num_in, num_out = sizes
    ends_X = torch.tensor(ends, dtype=torch.int32)
    results = []
    for dtype in (torch.float32, torch.float64):
        x_MI = random(64, num_in).to(dtype).requires_grad_()
        w_XOI = random(3, num_out, num_in, seed=1).to(dtype).requires_grad_()
        y_MO = grouped_product(x_MI, w_XOI, ends_X)
        grads = torch.autograd.grad(y_MO, (x_MI, w_XOI), random(64, num_out, seed=2).to(dtype))
        results.append([y_MO, *grads])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)
    empty = [e for e in range(3) if ends[e] == (ends[e - 1] if e else 0)]
    assert all(not results[0][2][e].any() for e in empty)


def test_bf16_with_fp32_weights() -> None:
    layer = filled(MoE(arch(num_experts=8)))
    assert isinstance(layer, MoE)
    x_BTD = random(1, 8, D)
    y_BTD, _ = layer(x_BTD.bfloat16())
    y_BTD.float().sum().backward()
    assert y_BTD.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
    exact, _ = layer.double()(x_BTD.bfloat16().double())
    assert (y_BTD.double() - exact).norm() <= 0.02 * exact.norm()


def test_a_compiled_layer_is_the_same_in_fp32() -> None:
    """Loads, outputs and every gradient, those of the balance's terms included."""
    layer = filled(MoE(arch(num_experts=8, balance_loss=0.1, z_loss=0.01)))
    assert isinstance(layer, MoE)
    layer.router.shares.copy_(random(8).softmax(0))
    x_BTD, share_B = random(2, 8, D).float(), torch.tensor([1 / 16, 0.0])
    results = []
    for compiled in (False, True):
        if compiled:
            choose_cache()  # binaries of wider vectors, of another run, write beyond what is narrower
            layer.compile(dynamic=False, fullgraph=True)
        y_BTD, load = layer(x_BTD, share_B)
        grads = torch.autograd.grad(y_BTD.square().mean(), list(layer.parameters()))
        results.append([y_BTD, load, *grads])
    for eager, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)
