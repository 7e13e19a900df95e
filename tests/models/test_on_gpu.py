"""Models on a GPU beside a processor: what they compute is the same, by the fused kernels too."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from colossus.architecture import IGNORED, Architecture
from colossus.data.bytes_tokenizer import BytesTokenizer
from colossus.generation import generate
from colossus.models import build
from colossus.models.attend import Scores, attend, attend_by_products
from colossus.models.grouped import grouped_product
from colossus.models.loss import cross_entropy
from colossus.parallel.apply import compile_layers
from colossus.perf.parts import CHUNK_LOGITS
from colossus.precision import apply_precision
from tests.generation.families import tiny as decided
from tests.models.reference import random_tokens
from tests.perf.tiny import PRESETS, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
BATCH, TOKENS = 2, 24


def loss_and_gradients(
    arch: Architecture, device: str, type: str, *, compiled: bool = False
) -> tuple[float, dict[str, torch.Tensor]]:
    model = apply_precision(build(arch, seed=0).to(device), type)  # a GPU draws other last digits
    if compiled:
        compile_layers(model)
    tokens_BT = random_tokens(arch, BATCH, TOKENS).to(device)
    targets_BT = random_tokens(arch, BATCH, TOKENS, seed=1).to(device)
    loss, count = model(tokens_BT, targets_BT)
    (loss / count).backward()
    gradients = {n: p.grad.cpu().double() for n, p in model.named_parameters() if p.grad is not None}
    return float((loss / count).detach()), gradients


def assert_near(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], allowed: float) -> None:
    """By norm; of gradients that are all but zero, as those of the keys' biases are, beside the largest."""
    assert got.keys() == want.keys()
    largest = max(float(gradient.norm()) for gradient in want.values())
    for name, gradient in want.items():
        error = float((got[name] - gradient).norm() / gradient.norm().clamp_min(1e-3 * largest))
        assert error < allowed, f"{name}: {error:.2g}"


@pytest.mark.parametrize("preset", PRESETS)
def test_every_family_has_the_losses_and_gradients_of_a_processor(preset: str) -> None:
    arch = tiny(preset)
    want, want_gradients = loss_and_gradients(arch, "cpu", "fp64")
    got, gradients = loss_and_gradients(arch, "cuda", "fp64")
    # angles of positions are computed in fp32 on both, and differ in the last digit
    assert got == pytest.approx(want, rel=1e-7)
    assert_near(gradients, want_gradients, 1e-6)


@pytest.mark.parametrize("preset", ["llama3.1-8b", "mixtral-8x7b", "deepseek-v3", "gpt-oss-20b"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_bf16_is_as_near_as_its_rounding(preset: str, compiled: bool) -> None:
    arch = tiny(preset, initializer_range=0.05, hidden_size=64, num_layers=4)
    want, want_gradients = loss_and_gradients(arch, "cpu", "fp64")
    got, gradients = loss_and_gradients(arch, "cuda", "bf16", compiled=compiled)
    assert got == pytest.approx(want, rel=2e-3)
    matrices = {
        n: g
        for n, g in want_gradients.items()
        if g.ndim == 2 and not n.endswith("_bias") and "router" not in n
    }
    assert_near({n: gradients[n] for n in matrices}, matrices, 0.08)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
def test_fused_attention_is_attention(width: int, groups: int, masked: bool) -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(heads: int) -> torch.Tensor:
        return torch.randn(2, heads, 384, width, device="cuda", generator=generator)

    q, k, v = draw(8), draw(8 // groups), draw(8 // groups)
    mask = None
    if masked:
        documents = torch.arange(384, device="cuda") // 100
        mask = (documents[:, None] == documents[None]).tril()
    want = attend_by_products(q.double(), k.double(), v.double(), mask)
    inputs = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    got = attend(*inputs, mask)
    assert float((got.double() - want).norm() / want.norm()) < 1e-2
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    g = torch.randn_like(want)
    wanted = torch.autograd.grad(attend_by_products(*exact, mask), exact, g)
    found = torch.autograd.grad(got, inputs, g.bfloat16())
    for a, b in zip(found, wanted, strict=True):
        assert float((a.double() - b).norm() / b.norm()) < 2e-2


# Of a long sequence, whose masks are kept by blocks: windows and sinks, a plain model, soft caps and
# temperatures, latents whose values are narrower than their keys.
LONG: dict[str, dict[str, object]] = {
    "gpt-oss-20b": {"head_dim": 64, "window": 200},
    "mistral-7b-v0.1": {"head_dim": 32, "window": 300},
    "llama3.1-8b": {"head_dim": 128},
    "grok-2": {"head_dim": 32, "attention_temperature_len": 512},
    "deepseek-v3": {
        "latent": {"q_rank": 16, "kv_rank": 32, "nope_dim": 128, "rope_dim": 64, "v_dim": 128},
        "head_dim": 192,
    },
}


def long(preset: str, **changed: object) -> Architecture:
    return Architecture.model_validate(tiny(preset).model_dump(exclude_unset=True) | LONG[preset] | changed)


def packed(length: int) -> torch.Tensor:
    """Documents of up to 700 tokens."""
    ends = torch.randint(1, 700, (BATCH, length), generator=torch.Generator().manual_seed(0)).cumsum(-1)
    return torch.searchsorted(ends, torch.arange(length).expand(BATCH, -1).contiguous(), right=True)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("preset", LONG)
def test_masks_by_blocks_give_the_losses_and_gradients_of_masks_of_pairs(preset: str, compiled: bool) -> None:
    """Of 1,500 tokens, which fill no whole number of blocks, in packed documents."""
    arch = long(preset, num_layers=3, initializer_range=0.05)
    tokens, targets = (random_tokens(arch, BATCH, 1500, seed=seed) for seed in (0, 1))
    passes: list[tuple[float, dict[str, torch.Tensor]]] = []
    for type, device in (("fp64", "cpu"), ("bf16", "cuda")):
        model = apply_precision(build(arch, seed=0).to(device), type)
        if compiled and device == "cuda":
            compile_layers(model)
        loss, count = model(tokens.to(device), targets.to(device), packed(1500).to(device))
        (loss / count).backward()
        gradients = {n: p.grad.cpu().double() for n, p in model.named_parameters() if p.grad is not None}
        passes.append((float((loss / count).detach()), gradients))
    (want, wanted), (got, found) = passes
    assert got == pytest.approx(want, rel=2e-3)
    # A router's choices may differ by their rounding, and with them what few tokens give to experts.
    names = [n for n in wanted if n.endswith("sinks") or ("attention.w" in n and wanted[n].ndim == 2)]
    assert_near({n: found[n] for n in names}, {n: wanted[n] for n in names}, 0.1)


@pytest.mark.parametrize("preset", ["gpt-oss-20b", "mistral-7b-v0.1", "grok-2"])
def test_masks_by_blocks_are_never_of_all_pairs(preset: str) -> None:
    """A forward and a backward pass over 32,768 tokens, in packed documents. A truth value for each pair
    would take 1.1 GB, an int64 8.6 GB; all that a layer of this size keeps is some 100 MB."""
    arch = long(preset, num_layers=1, max_seq_len=32_768)
    model = apply_precision(build(arch, seed=0).cuda(), "bf16")
    tokens_BT = random_tokens(arch, 1, 32_768).cuda()
    documents_BT = (torch.arange(32_768, device="cuda") // 5000).unsqueeze(0)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, count = model(tokens_BT, tokens_BT, documents_BT)
    (loss / count).backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 0.9e9, f"{peak / 1e9:.2f} GB"


def test_attention_by_blocks_repeats_to_the_bit() -> None:
    arch = long("gpt-oss-20b", num_layers=1)
    model = apply_precision(build(arch, seed=0).cuda(), "bf16")
    tokens_BT, documents_BT = random_tokens(arch, BATCH, 2048).cuda(), packed(2048).cuda()
    found = []
    for _ in range(3):
        model.zero_grad()
        model(tokens_BT, tokens_BT, documents_BT)[0].backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if "attention.w" in n})
    assert all(torch.equal(found[0][n], g) for again in found[1:] for n, g in again.items())


def test_queries_behind_a_cache_see_what_came_before() -> None:
    q, k, v = (torch.randn(2, 4, 96, 64, device="cuda") for _ in range(3))
    scores = Scores(1 / 8)
    whole = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), None, scores)
    part = attend(q[:, :, 64:].bfloat16(), k.bfloat16(), v.bfloat16(), None, scores)
    torch.testing.assert_close(part, whole[:, :, 64:], rtol=2e-2, atol=2e-2)


def test_grouped_products_are_products() -> None:
    x = torch.randn(300, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(5, 48, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ends = torch.tensor([10, 10, 100, 260, 300], device="cuda", dtype=torch.int32)
    y = grouped_product(x, w, ends)
    cuts = [0, *ends.tolist()]
    pairs = enumerate(itertools.pairwise(cuts))
    want = torch.cat([x[a:b].double() @ w[i].double().t() for i, (a, b) in pairs])
    assert float((y.double() - want).norm() / want.norm()) < 1e-2
    g = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, w), g)
    wanted = torch.autograd.grad(want, (x, w), g.double())
    for a, b in zip(found, wanted, strict=True):
        assert float((a.double() - b.double()).norm() / b.double().norm()) < 1e-2


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_chunked_loss_is_the_loss(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHUNK_LOGITS, "cuda", 600_000)
    x = torch.randn(1500, 64, device="cuda", requires_grad=True)
    w = (0.1 * torch.randn(1000, 64, device="cuda")).requires_grad_()
    targets = torch.randint(1000, (1500,), device="cuda")
    targets[::7] = IGNORED
    loss, count = cross_entropy(x, w, targets, z_loss=1e-4, compiled=compiled)
    found = torch.autograd.grad(loss, (x, w))
    logits = x.double() @ w.double().t()
    want = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    want = want + 1e-4 * (logits.logsumexp(-1).square() * (targets != IGNORED)).sum()
    assert int(count) == int((targets != IGNORED).sum())
    assert float(loss.detach()) == pytest.approx(float(want.detach()), rel=1e-3)
    for a, b in zip(found, torch.autograd.grad(want, (x, w)), strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-2


@pytest.mark.parametrize("name", ["llama3.1-8b", "mixtral-8x7b", "deepseek-v3", "gpt-oss-20b"])
def test_the_most_probable_tokens_are_those_of_a_processor(name: str) -> None:
    tokenizer = BytesTokenizer()
    on_cpu = apply_precision(build(decided(name, tokenizer.vocab_size), seed=3).eval(), "fp64")
    on_gpu = copy.deepcopy(on_cpu).cuda()
    prompts = ["def f(x):", "a b"]
    texts = [generate(model, tokenizer, prompts, max_tokens=12) for model in (on_cpu, on_gpu)]
    assert texts[0] == texts[1]
