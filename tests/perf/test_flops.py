"""Our FLOPs against PyTorch's counter on a real decoder, and against published formulas and measurements."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from colossus.architecture import Architecture
from colossus.job import load_job
from colossus.models import Decoder, build
from colossus.models.sight import document_mask
from colossus.parallel.apply import recompute_layers
from colossus.perf.flops import (
    attention_forward_flops,
    executed_flops_per_token,
    forward_flops_per_token,
    matrix_parameters,
    model_flops_per_token,
)
from tests.models.reference import architecture, random_tokens

BATCH, TOKENS = 2, 16  # so few that one block of attention's scores is the whole square
VARIANTS = {
    "plain": {},
    "tied": {"tie_embeddings": True},
    "wide heads": {"head_dim": 16, "num_kv_heads": 1},
    "normalised heads": {"qk_norm": True, "num_layers": 3},
}


def counted(run: Callable[[], object]) -> dict[str, int]:
    """FLOPs a token of what `run` does, by operator, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter:
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
    """No logit is computed twice. The counter does not know `addmm_`, the head's gradient in fp32."""
    arch, model, tokens_BT = sample(variant)
    found = counted(lambda: model(tokens_BT, tokens_BT)[0].backward())
    unseen = 2 * arch.vocab_size * arch.hidden_size
    assert sum(found.values()) + unseen == executed_flops_per_token(arch, TOKENS)


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
    pairs = int(document_mask(torch.zeros(1, seq_len, dtype=torch.int)).sum())
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
