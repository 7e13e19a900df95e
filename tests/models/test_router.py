"""Routing against a loop over tokens in float64, written here; and the terms that keep loads alike."""

from __future__ import annotations

import math

import pytest
import torch

from colossus.architecture import Architecture, Experts
from colossus.models.router import Router, Routes, with_objective
from tests.models.reference import architecture

B, T = 3, 5
SETTINGS: list[dict[str, object]] = [
    {},
    {"normalise": False, "scale": 2.5},
    {"scores": "sigmoid", "scale": 1.5},
    {"scores": "sigmoid", "normalise": False},
    {"router_bias": True, "soft_cap": 0.7},
    {"selection_bias": True, "per_token": 1},
    {"scores": "sigmoid", "selection_bias": True, "num_groups": 4, "groups_per_token": 2, "per_token": 3},
    {"num_groups": 2, "groups_per_token": 1, "per_token": 4},
]


def made(**experts: object) -> Router:
    """In float64, with values that are all different."""
    router = Router(arch(**experts)).double()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (*router.parameters(), *router.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=draw, dtype=torch.float64) / 3)
        if router.has_shares:
            router.shares.copy_(router.shares.softmax(0))
    return router


def arch(**experts: object) -> Architecture:
    return architecture(experts=Experts.model_validate({"num_experts": 8} | experts))


def tokens(seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(B, T, 32, generator=draw, dtype=torch.float64)


def all_scores(router: Router, x_D: torch.Tensor) -> tuple[list[float], list[float]]:
    """(logits, scores) of one token."""
    settings = router.settings
    logits = [float(row @ x_D) for row in router.weight.detach()]
    if router.bias is not None:
        logits = [logit + float(bias) for logit, bias in zip(logits, router.bias.detach(), strict=True)]
    if settings.soft_cap is not None:
        logits = [settings.soft_cap * math.tanh(logit / settings.soft_cap) for logit in logits]
    if settings.scores == "sigmoid":
        return logits, [1 / (1 + math.exp(-logit)) for logit in logits]
    total = sum(map(math.exp, logits))
    return logits, [math.exp(logit) / total for logit in logits]


def chosen(router: Router, scores: list[float]) -> list[int]:
    settings, size = router.settings, 8 // router.settings.num_groups
    biased = list(scores)
    if settings.selection_bias:
        biased = [s + float(b) for s, b in zip(scores, router.selection_bias, strict=True)]

    def of_group(group: int) -> float:
        return sum(sorted(biased[group * size : (group + 1) * size])[-2:])

    best = sorted(range(settings.num_groups), key=of_group)[-settings.groups_per_token :]
    allowed = [expert for expert in range(8) if expert // size in best]
    return sorted(sorted(allowed, key=lambda expert: biased[expert])[-settings.per_token :])


def shares(row: torch.Tensor) -> torch.Tensor:
    return row / row.sum()


@pytest.mark.parametrize("settings", SETTINGS)
def test_choices_and_weights(settings: dict[str, object]) -> None:
    router, x_BTD = made(**settings), tokens()
    routes = router(x_BTD, None)
    assert routes.load is None and routes.objective is None
    for n, x_D in enumerate(x_BTD.flatten(0, 1)):
        _, scores = all_scores(router, x_D)
        experts = chosen(router, scores)
        found = dict(zip(routes.experts_NK[n].tolist(), routes.weights_NK[n].tolist(), strict=True))
        assert sorted(found) == experts
        total = sum(scores[e] for e in experts) if router.settings.normalise else 1.0
        for expert in experts:
            expected = router.settings.scale * scores[expert] / total
            assert found[expert] == pytest.approx(expected, rel=1e-12)


def test_the_selection_bias_chooses_and_weighs_nothing() -> None:
    router = made(selection_bias=True, normalise=False)
    x_BTD = tokens()
    before = router(x_BTD, None)
    router.selection_bias[3] = 100.0
    after = router(x_BTD, None)
    assert (after.experts_NK == 3).any(1).all() and not (before.experts_NK == 3).any(1).all()
    for n, x_D in enumerate(x_BTD.flatten(0, 1)):
        weight = after.weights_NK[n][after.experts_NK[n] == 3].item()
        assert weight == pytest.approx(all_scores(router, x_D)[1][3], rel=1e-12)
    assert not router.selection_bias.requires_grad


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("over", ["batch", "sequence"])
def test_terms_and_loads_by_hand(scores: str, over: str) -> None:
    """A row that is no sample counts for nothing, whatever is in it."""
    router = made(scores=scores, balance_over=over, balance_loss=0.3, z_loss=0.2)
    x_BTD = tokens()
    token_share = torch.tensor([1 / 40, 0.0, 1 / 40], dtype=torch.float64)
    routes = router(x_BTD, token_share)
    visits, entropy, balance, z = torch.zeros(3, 8, dtype=torch.float64), 0.0, 0.0, 0.0
    for b in (0, 2):
        mean_X = torch.zeros(8, dtype=torch.float64)
        for x_D in x_BTD[b]:
            logits, found = all_scores(router, x_D)
            share_X = shares(torch.tensor(found, dtype=torch.float64))
            mean_X += share_X / T
            entropy -= float((share_X * share_X.log()).sum())
            visits[b, chosen(router, found)] += 1
            z += 0.2 * math.log(sum(map(math.exp, logits))) ** 2 / 40
        used_X = router.shares if over == "batch" else shares(visits[b])
        balance += 0.3 * 8 * float((used_X * mean_X).sum()) * T / 40
    assert routes.load is not None and routes.objective is not None
    assert routes.load[:8].tolist() == visits.sum(0).tolist() and routes.load[:8].sum() == 2 * T * 2
    assert routes.load[8:].tolist() == pytest.approx([entropy, balance, z], rel=1e-12)
    assert float(routes.objective.detach()) == pytest.approx(balance + z, rel=1e-12)


def test_without_coefficients_there_is_no_term() -> None:
    routes = made(balance_loss=0.0)(tokens(), torch.full((B,), 0.1))
    assert routes.objective is None and isinstance(routes, Routes) and routes.load is not None


def test_entropies_of_routers_that_know_nothing_and_everything() -> None:
    router = made()
    share_B = torch.full((B,), 1 / (B * T), dtype=torch.float64)
    with torch.no_grad():
        router.weight.zero_()
        assert float(router(tokens(), share_B).load[8]) == pytest.approx(B * T * math.log(8), rel=1e-12)
        router.weight[0] = 1e4
        assert float(router(tokens().abs(), share_B).load[8]) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_computed_in_fp32(dtype: torch.dtype) -> None:
    router = Router(arch())
    with torch.no_grad():
        router.weight.copy_(torch.randn(8, 32, generator=torch.Generator().manual_seed(2)))
    x_BTD = tokens().to(dtype)
    routes = router(x_BTD, None)
    assert routes.weights_NK.dtype == torch.float32
    router.weight.data = router.weight.data.to(dtype)  # as it is read
    exact = router.double()(x_BTD.double(), None)
    torch.testing.assert_close(routes.weights_NK, exact.weights_NK.float(), rtol=1e-5, atol=1e-6)


def test_an_objective_joins_what_is_minimised() -> None:
    """Its gradient is 1 whatever the loss's is, and the values that it goes through stay."""
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    w = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    y = with_objective(x * w, 5 * w)
    assert torch.equal(y, x * w)
    (0.25 * y.sum()).backward()
    assert w.grad is not None and float(w.grad) == 0.25 * 3 + 5
    assert with_objective(x, None) is x
