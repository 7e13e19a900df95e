"""The decoder against an independent implementation, and against itself under packing and caching."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from colossus.architecture import parameter_table
from colossus.models import Decoder, KVCache, build
from tests.models.reference import (
    LLAMA31,
    architecture,
    random_architecture,
    random_tokens,
    reference_name,
    transformers_twin,
)

VARIANTS = {
    "plain": {},
    "tied": {"tie_embeddings": True},
    "multi-query": {"num_kv_heads": 1},
    "no grouping": {"num_kv_heads": 4},
    "llama 3.1 positions": {"rope_scaling": LLAMA31},
    "wide heads": {"head_dim": 16, "rope_theta": 500_000.0},
}


@pytest.mark.parametrize("seed", range(20))
def test_parameters_are_exactly_the_table(seed: int) -> None:
    arch = random_architecture(seed)
    with torch.device("meta"):
        model = Decoder(arch)
    built = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert built == {p.name: p.shape for p in parameter_table(arch)}
    assert list(built) == [p.name for p in parameter_table(arch)]
    assert all(p.is_meta and p.dtype == torch.float32 for p in model.parameters())
    assert not list(model.buffers())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_logits_loss_and_gradients_equal_transformers(
    variant: str, dtype: torch.dtype, tolerance: float
) -> None:
    model = build(architecture(**VARIANTS[variant]), seed=1, dtype=dtype)
    twin = transformers_twin(model)
    tokens_BT = random_tokens(model.arch, 3, 33)
    targets_BT = random_tokens(model.arch, 3, 33, seed=1).index_fill(1, torch.tensor([4, 20]), -100)

    expected_BTV = twin(tokens_BT).logits
    torch.testing.assert_close(model(tokens_BT), expected_BTV, rtol=0, atol=tolerance)

    expected = F.cross_entropy(expected_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum")
    loss, num_targets = model(tokens_BT, targets_BT)
    assert int(num_targets) == 3 * 31
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)

    (loss / num_targets).backward()
    (expected / num_targets).backward()
    theirs = dict(twin.named_parameters())
    for name, ours in model.named_parameters():
        grad = theirs[reference_name(name)].grad
        assert ours.grad is not None and grad is not None
        assert torch.linalg.norm(ours.grad - grad) <= tolerance * torch.linalg.norm(grad), name


def test_qk_norm_normalises_each_head_before_the_rotation() -> None:
    """Scaling all query weights changes nothing where queries are normalised."""
    model = build(architecture(qk_norm=True, norm_eps=1e-30), seed=1, dtype=torch.float64)
    tokens_BT = random_tokens(model.arch, 2, 9)
    before_BTV = model(tokens_BT)
    with torch.no_grad():
        model.layers[0].attention.wq.weight.mul_(7.0)
        model.layers[1].attention.wk.weight.mul_(0.3)
    torch.testing.assert_close(model(tokens_BT), before_BTV, rtol=0, atol=1e-10)
    with torch.no_grad():
        model.layers[0].attention.q_norm.weight.mul_(2.0)
    assert (model(tokens_BT) - before_BTV).abs().max() > 1e-3


@pytest.mark.parametrize("tied", [False, True])
def test_packed_documents_equal_each_document_alone(tied: bool) -> None:
    """Loss, logits and every gradient, although documents begin at other positions when packed."""
    lengths = [[5, 1, 11, 7], [24]]
    model = build(architecture(tie_embeddings=tied), seed=2, dtype=torch.float64)
    alone = build(architecture(tie_embeddings=tied), seed=2, dtype=torch.float64)
    tokens_BT, targets_BT = random_tokens(model.arch, 2, 24), random_tokens(model.arch, 2, 24, seed=3)
    documents_BT = torch.stack(
        [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths]
    )

    loss, _ = model(tokens_BT, targets_BT, documents_BT.int())
    loss.backward()
    total = torch.zeros((), dtype=torch.float64)
    for row, sizes in enumerate(lengths):
        for tokens_T, targets_T in zip(
            tokens_BT[row].split(sizes), targets_BT[row].split(sizes), strict=True
        ):
            part, _ = alone(tokens_T[None], targets_T[None])
            part.backward()
            total += part.detach()
    # Rotations are of fp32 angles: equal differences of positions differ by their rounding.
    torch.testing.assert_close(loss.detach(), total, rtol=1e-6, atol=0)
    for (name, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert torch.linalg.norm(ours.grad - theirs.grad) <= 1e-5 * torch.linalg.norm(theirs.grad), name


def test_no_gradient_crosses_a_document() -> None:
    model = build(architecture(), seed=2, dtype=torch.float64)
    tokens_BT = torch.tensor([[7, 8, 9, 10, 11, 12]])
    targets_BT = torch.tensor([[-100, -100, -100, 1, 2, 3]])
    model(tokens_BT, targets_BT, torch.tensor([[0, 0, 0, 1, 1, 1]]))[0].backward()
    seen = model.embedding.weight.grad.abs().sum(-1).nonzero().flatten().tolist()
    assert seen == [10, 11, 12]


@pytest.mark.parametrize("pieces", [[1] * 20, [20], [7, 1, 1, 5, 6]])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_cached_logits_equal_those_of_the_whole_text(pieces: list[int], qk_norm: bool) -> None:
    model = build(architecture(qk_norm=qk_norm), seed=4, dtype=torch.float64)
    tokens_BT = random_tokens(model.arch, 3, 20)
    cache = KVCache(model.arch, batch=3, max_tokens=20, dtype=torch.float64)
    with torch.no_grad():
        parts = [model(piece, cache=cache) for piece in tokens_BT.split(pieces, dim=1)]
        assert cache.length == 20
        torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens_BT), rtol=0, atol=1e-10)


def test_bf16_activations_over_fp32_weights() -> None:
    model = build(architecture(), seed=5)
    tokens_BT, targets_BT = random_tokens(model.arch, 2, 16), random_tokens(model.arch, 2, 16, seed=6)
    exact, _ = model(tokens_BT, targets_BT)
    exact.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model.compute_dtype = torch.bfloat16
    loss, _ = model(tokens_BT, targets_BT)
    assert loss.dtype == torch.float32
    loss.backward()
    assert model(tokens_BT).dtype == torch.bfloat16
    torch.testing.assert_close(loss, exact, rtol=1e-2, atol=0)
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.dtype == torch.float32
        assert torch.linalg.norm(p.grad - gradients[name]) < 0.1 * torch.linalg.norm(gradients[name]), name
