"""Our FLOPs against PyTorch's counter on a real decoder, and against published formulas and measurements."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from colossus.architecture import Architecture
from colossus.job import load_job
from colossus.measure.counter import flop_counter
from colossus.models import Decoder, build
from colossus.models.attend import attend
from colossus.models.sight import document_mask
from colossus.parallel.recompute import recompute_layers
from colossus.perf.flops import (
    attention_forward_flops,
    executed_flops_per_token,
    executed_forward_flops,
    forward_flops_per_token,
    matrix_parameters,
    model_flops_per_token,
)
from colossus.perf.parts import ATTENTION, FUSED, kernel_of, parts
from tests.models.reference import architecture, random_tokens
from tests.perf.tiny import PRESETS, tiny

BATCH, TOKENS = 2, 16  # so few that one block of attention's scores is the whole square
VARIANTS = {
    "plain": {},
    "tied": {"tie_embeddings": True},
    "wide heads": {"head_dim": 16, "num_kv_heads": 1},
    "normalised heads": {"qk_norm": True, "num_layers": 3},
}


LONG = ("mistral-7b-v0.1", "deepseek-v3", "gpt-oss-20b")  # each of another path


def counted(run: Callable[[], object]) -> dict[str, int]:
    """FLOPs a token of what `run` does, by operator, as PyTorch counts them."""
    with flop_counter() as counter:
        run()
    return {str(op): n // (BATCH * TOKENS) for op, n in counter.get_flop_counts()["Global"].items()}


def sample(variant: str) -> tuple[Architecture, Decoder, torch.Tensor]:
    arch = architecture(**VARIANTS[variant])
    return arch, build(arch, seed=0), random_tokens(arch, BATCH, TOKENS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_forward_pass_is_what_pytorch_counts(variant: str) -> None:
    """On a processor short windows take plain products, which the counter sees; SDPA it would not."""
    arch, model, tokens_BT = sample(variant)
    with torch.no_grad():
        found = counted(lambda: model(tokens_BT))
    assert found["aten.mm"] == 2 * matrix_parameters(arch)
    attention = found["aten.baddbmm"] + found["aten.bmm"]
    assert attention == attention_forward_flops(arch, TOKENS, causal=False)
    assert found.keys() == {"aten.mm", "aten.baddbmm", "aten.bmm"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_and_backward_are_what_pytorch_counts(variant: str) -> None:
    arch, model, tokens_BT = sample(variant)
    found = counted(lambda: model(tokens_BT).logsumexp(-1).sum().backward())
    assert sum(found.values()) == executed_flops_per_token(arch, TOKENS)


@pytest.mark.parametrize("variant", ["plain", "tied"])
def test_training_by_the_chunked_loss_is_what_pytorch_counts(variant: str) -> None:
    """No logit is computed twice."""
    arch, model, tokens_BT = sample(variant)
    found = counted(lambda: model(tokens_BT, tokens_BT)[0].backward())
    assert sum(found.values()) == executed_flops_per_token(arch, TOKENS)


@pytest.mark.parametrize(("preset", "length"), [*product(PRESETS, (16, 300)), *product(LONG, (1100,))])
def test_products_of_every_family_are_what_pytorch_counts(preset: str, length: int) -> None:
    """Forward and training, to the last FLOP: 300 tokens in blocks, 1,100 by the fused kernel."""
    arch = tiny(preset)
    model, tokens_BT = build(arch, seed=0), random_tokens(arch, BATCH, length)
    kernel, num_tokens = kernel_of(arch, length, "cpu"), BATCH * length
    with flop_counter() as counter, torch.no_grad():
        model(tokens_BT)
    forward = num_tokens * executed_forward_flops(arch, length, kernel=kernel)
    assert counter.get_total_flops() == pytest.approx(forward, abs=0.01)
    with flop_counter() as counter:
        model(tokens_BT, tokens_BT)[0].backward()
    both = num_tokens * executed_flops_per_token(arch, length, kernel=kernel)
    assert counter.get_total_flops() == pytest.approx(both, abs=0.01)


def test_experts_in_float64_count_as_in_float32() -> None:
    """Its products are taken one by one inside the operator, and count once."""
    arch = tiny("mixtral-8x7b")
    model, tokens_BT = build(arch, seed=0, dtype=torch.float64), random_tokens(arch, BATCH, TOKENS)
    model.compute_dtype = torch.float64
    found = counted(lambda: model(tokens_BT, tokens_BT)[0].backward())
    assert sum(found.values()) == executed_flops_per_token(arch, TOKENS)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
def test_a_processor_s_kernel_counts_as_pytorch_counts_those_of_gpus(heads: int, kv_heads: int) -> None:
    """The whole square although causal, and scores twice. PyTorch's counter gives 0 for the processor's."""
    q = torch.zeros(2, heads, 1100, 8, requires_grad=True)
    k, v = (torch.zeros(2, kv_heads, 1100, 8, requires_grad=True) for _ in range(2))
    with flop_counter() as counter:
        attend(q, k, v).sum().backward()
    theirs = sdpa_flop_count(q.shape, k.shape, v.shape)
    theirs += sdpa_backward_flop_count(q.shape, q.shape, k.shape, v.shape)
    assert counter.get_total_flops() == theirs
    arch = architecture(num_heads=heads, num_kv_heads=kv_heads, num_layers=1)
    table = [part for part in parts(arch, 1100, kernel=FUSED) if part.name in ATTENTION]
    assert 2 * 1100 * sum(part.executed + part.executed_backward for part in table) == theirs


def test_recomputation_is_what_pytorch_counts() -> None:
    arch, model, tokens_BT = sample("plain")
    recompute_layers(model)
    found = counted(lambda: model(tokens_BT).logsumexp(-1).sum().backward())
    executed = executed_flops_per_token(arch, TOKENS, recompute=True)
    # Its last product is not needed for any gradient, and PyTorch stops before it.
    spared = 2 * arch.num_layers * arch.hidden_size * arch.intermediate_size
    assert sum(found.values()) in (executed, executed - spared)


def test_causal_attention_is_the_half_of_the_square_that_the_mask_leaves() -> None:
    arch, seq_len = architecture(), 200
    pairs = int(document_mask(torch.zeros(1, seq_len), torch.arange(seq_len)).sum())
    by_hand = pairs / seq_len * arch.num_layers * arch.num_heads * (2 + 2) * arch.head_dim
    ours = attention_forward_flops(arch, seq_len, causal=True)
    assert ours == pytest.approx(by_hand, rel=1.01 / seq_len)
    assert 2 * ours == attention_forward_flops(arch, seq_len, causal=False)


@pytest.mark.parametrize(
    ("layers", "hidden", "vocab", "seq_len"), [(24, 2304, 51200, 2048), (3, 96, 1000, 8)]
)
def test_executed_flops_are_those_of_narayanan_et_al(
    layers: int, hidden: int, vocab: int, seq_len: int
) -> None:
    """Narayanan et al. 2021 (arXiv 2104.04473, section 5.1), with recomputation: 96 s l h^2 (1 + s/6h +
    V/16lh) a sequence, of layers with 12 h^2 weights; a gated MLP of 8/3 h has as many as an MLP of 4 h."""
    arch = architecture(
        num_layers=layers,
        hidden_size=hidden,
        vocab_size=vocab,
        num_heads=hidden // 48,
        num_kv_heads=hidden // 48,
        head_dim=48,
        intermediate_size=hidden * 8 // 3,
    )
    shares = seq_len / (6 * hidden) + vocab / (16 * layers * hidden)
    published = 96 * layers * hidden**2 * (1 + shares)
    assert executed_flops_per_token(arch, seq_len, recompute=True) == pytest.approx(published, rel=1e-12)
    shares = seq_len / (6 * hidden) + vocab / (12 * layers * hidden)
    assert executed_flops_per_token(arch, seq_len) == pytest.approx(
        72 * layers * hidden**2 * (1 + shares), rel=1e-12
    )


@pytest.mark.parametrize(
    ("model", "gpus", "step_seconds", "sequences", "mfu"),
    [("llama3.1-8b", 8, 12.91, 128, 0.5937), ("llama3.1-70b", 64, 14.72, 128, 0.5410)],
)
def test_the_full_square_gives_the_published_share_of_the_peak(
    model: str, gpus: int, step_seconds: float, sequences: int, mfu: float
) -> None:
    """NVIDIA/dgxc-benchmarking v24.11.1, llama3.1/README_8b.md and README_70b.md: bf16 on H100 (989 TFLOP/s),
    windows of 8,192 tokens. Its formula, stated there, counts the whole square and the output head."""
    arch = load_job(None, [f"model={model}"]).model
    tokens_per_second = sequences * 8192 / step_seconds / gpus
    ours = tokens_per_second * executed_flops_per_token(arch, 8192) / 989e12
    assert ours == pytest.approx(mfu, rel=3e-3)


def test_six_times_the_parameters_is_the_published_budget_of_llama_3_405b() -> None:
    """3.8e25 FLOPs on 15.6T tokens (Llama 3, arXiv 2407.21783, section 3): 6 x 405B x tokens, without
    attention and with the input embedding, which is 0.5% of that model."""
    arch = load_job(None, ["model=llama3.1-405b"]).model
    attention = 3 * attention_forward_flops(arch, 8192, causal=True)
    without_attention = model_flops_per_token(arch, 8192) - attention
    assert without_attention == 6 * (405_853_388_800 - 128_256 * 16_384)
    assert without_attention * 15.6e12 == pytest.approx(3.8e25, rel=1e-2)


def test_a_tied_head_is_counted_and_an_embedding_is_not() -> None:
    """Llama 3.2 1B: all 1,235,814,400 parameters where the embedding is the head as well."""
    tied = load_job(None, ["model=llama3.2-1b"]).model
    untied = load_job(None, ["model=llama3.2-1b", "model.tie_embeddings=false"]).model
    by_hand = 2 * 1_235_814_400 + 2 * 16 * 32 * 64 * 4096  # the causal half of 4 x heads x width x keys
    assert forward_flops_per_token(tied, 4096) == forward_flops_per_token(untied, 4096) == by_hand
    assert model_flops_per_token(tied, 4096) == 3 * by_hand


def test_model_flops_of_experts_count_those_that_a_token_visits() -> None:
    """Mixtral 8x7B by hand: 12,879,925,248 active parameters, less the input embedding."""
    arch = load_job(None, ["model=mixtral-8x7b"]).model
    by_hand = 2 * (12_879_925_248 - 32_000 * 4096) + 2 * 32 * 32 * 128 * 4096
    assert forward_flops_per_token(arch, 4096) == by_hand


def test_latent_attention_has_keys_and_values_of_two_widths() -> None:
    """DeepSeek-V3: 61 layers of 128 heads, keys of 192 and values of 128 coordinates."""
    arch = load_job(None, ["model=deepseek-v3"]).model
    assert attention_forward_flops(arch, 4096, causal=False) == 61 * 128 * 2 * (192 + 128) * 4096


def test_learned_positions_are_looked_up_and_count_nothing() -> None:
    """GPT-2 124M: its 124,439,808 parameters, less 1,024 positions of 768."""
    arch = load_job(None, ["model=gpt2-124m"]).model
    matrices = forward_flops_per_token(arch, 1024) - attention_forward_flops(arch, 1024, causal=True)
    assert matrices == 2 * (124_439_808 - 1024 * 768)
