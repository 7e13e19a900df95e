"""The decoder's parts one by one: against transformers bit by bit, and against formulas in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from colossus.architecture import Architecture
from colossus.job import load_job
from colossus.models.mlp import MLP, gated
from colossus.models.norm import RMSNorm
from colossus.models.rope import inverse_frequencies, rotate, rotations
from tests.models.reference import LLAMA31, architecture

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rotary(arch: Architecture) -> LlamaRotaryEmbedding:
    """transformers' positions of the same model."""
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": arch.rope_theta}
    if arch.rope_scaling is not None:
        scaling = arch.rope_scaling.model_dump()
        scaling["original_max_position_embeddings"] = scaling.pop("original_max_seq_len")
        rope |= {"rope_type": "llama3", **scaling}
    config = LlamaConfig(
        hidden_size=arch.hidden_size,
        num_attention_heads=arch.num_heads,
        head_dim=arch.head_dim,
        max_position_embeddings=arch.max_seq_len,
        rope_parameters=rope,
    )
    return LlamaRotaryEmbedding(config)


def preset(name: str) -> Architecture:
    return load_job(None, [f"model={name}"]).model


@pytest.mark.parametrize("name", ["llama2-7b", "llama3-8b", "llama3.1-8b", "llama3.1-405b", "llama3.2-1b"])
def test_frequencies_are_bitwise_those_of_transformers(name: str) -> None:
    arch = preset(name)
    found = inverse_frequencies(arch, CPU)
    assert found.shape == (arch.head_dim // 2,) and found.dtype == torch.float32
    assert torch.equal(found, rotary(arch).inv_freq)


YARN = ["gpt-oss-20b", "gpt-oss-120b", "deepseek-v3", "kimi-k2"]


@pytest.mark.parametrize("name", YARN)
def test_yarns_frequencies_are_bitwise_those_of_transformers(name: str) -> None:
    """At full size: in a tiny model the ramp lies beyond the coordinates that there are."""
    arch = preset(name)
    assert arch.rope_scaling is not None
    width = arch.latent.rope_dim if arch.latent is not None else arch.head_dim
    scaling = arch.rope_scaling
    rope = {
        "rope_type": "yarn",
        "rope_theta": arch.rope_theta,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_seq_len,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "truncate": scaling.truncate,
    }
    config = LlamaConfig(head_dim=width, max_position_embeddings=arch.max_seq_len, rope_parameters=rope)
    expected, _ = ROPE_INIT_FUNCTIONS["yarn"](config, CPU)
    found = inverse_frequencies(arch, CPU)
    assert found.shape == (width // 2,)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("name", "unchanged", "slowed"),
    [
        # The coordinate that turns n times within the original length lies at
        # width x ln(length / (2 pi n)) / (2 ln theta); below it are faster ones.
        ("gpt-oss-20b", 9, 17),  # 64 wide, theta 150,000: at 8.093 (32 turns) and 17.398 (1), not rounded
        ("deepseek-v3", 11, 23),  # 64 wide, theta 10,000: at 10.473 and 22.514, rounded to 10 and 23
        ("kimi-k2", 20, 20),  # 64 wide, theta 50,000, both 1 turn: at 19.165, rounded to 19 and 20
    ],
)
def test_yarn_keeps_fast_turns_and_slows_slow_ones(name: str, unchanged: int, slowed: int) -> None:
    """The first `unchanged` frequencies are the plain ones, those from coordinate `slowed` + 1 on are divided
    by the factor, between them the share that is kept falls by equal steps (YaRN, arXiv 2309.00071, 3.2)."""
    arch = preset(name)
    assert arch.rope_scaling is not None
    found = inverse_frequencies(arch, CPU).double()
    plain = arch.rope_theta ** -(torch.arange(len(found), dtype=torch.float64) / len(found))
    factor = arch.rope_scaling.factor
    kept = (found / plain - 1 / factor) / (1 - 1 / factor)
    one, none = torch.ones(unchanged, dtype=torch.float64), torch.zeros(len(found) - slowed - 1).double()
    torch.testing.assert_close(kept[:unchanged], one, rtol=0, atol=1e-5)
    torch.testing.assert_close(kept[slowed + 1 :], none, rtol=0, atol=1e-5)
    steps = kept[unchanged - 1 : slowed + 1].diff()[1:-1]
    assert torch.all(steps < 0) or not len(steps)
    torch.testing.assert_close(steps, steps.mean().expand_as(steps), rtol=0, atol=1e-5)


def test_llama_31_slows_low_frequencies_alone() -> None:
    """By the published rule, in float64: 8 for waves beyond 8,192 tokens, 1 within 2,048, a line between."""
    arch = preset("llama3.1-8b")
    ratios = []
    for e, found in enumerate(inverse_frequencies(arch, CPU).tolist()):
        plain = 500_000.0 ** (-2 * e / 128)
        turns = 8192 * plain / (2 * math.pi)  # within the length that it was trained on before
        share = min(1.0, max(0.0, (turns - 1) / (4 - 1)))
        ratios.append(found / plain)
        assert ratios[-1] == pytest.approx(share + (1 - share) / 8, rel=1e-5)
    assert ratios[0] == pytest.approx(1) and ratios[-1] == pytest.approx(1 / 8)
    assert any(0.2 < ratio < 0.9 for ratio in ratios)


@pytest.mark.parametrize("scaling", [None, LLAMA31])
def test_turned_heads_are_bitwise_those_of_transformers(scaling: object) -> None:
    arch = architecture(rope_scaling=scaling, head_dim=16)
    positions_T = torch.arange(30, 71)
    q_BTHE, k_BTKE = (random(2, 41, heads, 16, seed=heads, dtype=torch.float32) for heads in (4, 2))
    cos, sin = rotary(arch)(q_BTHE, positions_T[None])
    theirs = apply_rotary_pos_emb(q_BTHE, k_BTKE, cos, sin, unsqueeze_dim=2)
    turns_2TE = rotations(arch, positions_T, torch.float32)
    for x, expected in zip((q_BTHE, k_BTKE), theirs, strict=True):
        assert torch.equal(rotate(x, turns_2TE), expected)
        with torch.no_grad():
            assert torch.equal(rotate(x, turns_2TE), expected)


def test_a_rotation_turns_pairs_of_coordinates_as_complex_numbers() -> None:
    arch, positions_T = architecture(), torch.tensor([0, 1, 7, 63])
    x_BTHE = random(2, 4, 3, 8)
    angles = positions_T.double()[:, None] * 10_000.0 ** (-torch.arange(4).double() / 4)
    turns = torch.polar(torch.ones_like(angles), angles)[None, :, None, :]
    expected = torch.complex(x_BTHE[..., :4], x_BTHE[..., 4:]) * turns
    found = rotate(x_BTHE, rotations(arch, positions_T, torch.float64))
    torch.testing.assert_close(found, torch.cat((expected.real, expected.imag), -1), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.norm(dim=-1), x_BTHE.norm(dim=-1), rtol=1e-6, atol=0)
    assert torch.equal(found[:, 0], x_BTHE[:, 0])


def test_scores_depend_on_differences_of_positions_alone() -> None:
    arch = architecture(rope_scaling=LLAMA31)
    q_BTHE, k_BTHE = random(1, 1, 2, 8), random(1, 1, 2, 8, seed=1)

    def score(query: int, key: int) -> torch.Tensor:
        turned = [
            rotate(x, rotations(arch, torch.tensor([position]), torch.float64))
            for x, position in ((q_BTHE, query), (k_BTHE, key))
        ]
        return (turned[0] * turned[1]).sum(-1)

    torch.testing.assert_close(score(9, 4), score(60, 55), rtol=0, atol=1e-5)
    assert (score(9, 4) - score(9, 5)).abs().max() > 1e-2


def test_a_head_in_bf16_is_turned_in_fp32_and_rounded_once() -> None:
    arch, positions_T = architecture(), torch.arange(20)
    x_BTHE = random(1, 20, 2, 8).bfloat16()
    found = rotate(x_BTHE, rotations(arch, positions_T, torch.float32))
    exact = rotate(x_BTHE.double(), rotations(arch, positions_T, torch.float64))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-6)


def norm(width: int, eps: float, dtype: torch.dtype = torch.float32) -> RMSNorm:
    made = RMSNorm(width, eps).to(dtype)
    with torch.no_grad():
        made.weight.copy_(random(width, seed=5))
    return made


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("eps", [1e-5, 1.0])
def test_rms_norm_is_its_formula(dtype: torch.dtype, tolerance: float, eps: float) -> None:
    ours, x = norm(12, eps, dtype), random(3, 5, 12, dtype=dtype)
    rows, weight = x.double().numpy(), ours.weight.detach().double().numpy()
    expected = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + eps) * weight
    assert ours(x).dtype == dtype
    np.testing.assert_allclose(
        ours(x).detach().double().numpy(), expected, rtol=10 * tolerance, atol=tolerance
    )


def test_rms_norm_is_that_of_transformers() -> None:
    ours, theirs = norm(32, 1e-5), LlamaRMSNorm(32, 1e-5)
    theirs.load_state_dict(ours.state_dict())
    x = random(4, 32, dtype=torch.float32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-7)


def test_rms_norm_of_bf16_is_computed_in_fp32_and_rounded_once() -> None:
    """Squares of 300 would lose their digits in bf16; weights are those that ranks would gather."""
    ours, x = norm(64, 1e-5), (300 * random(5, 64)).bfloat16()
    found = ours(x)
    reference = norm(64, 1e-5, torch.float64)
    reference.weight.data = ours.weight.data.bfloat16().double()
    exact = reference(x.double())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-12)


def test_rms_norm_of_zeros_is_zero_and_has_a_gradient() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    out = norm(8, 1e-5)(x)
    out.sum().backward()
    assert not out.any() and x.grad is not None and bool(x.grad.isfinite().all())


def test_swiglu_and_its_gradient_are_the_formula() -> None:
    """Shazeer 2020, in NumPy; the gradient by differences."""
    mlp = MLP(architecture(hidden_size=6), 10).double()
    with torch.no_grad():
        for seed, weight in enumerate(mlp.parameters()):
            weight.copy_(random(*weight.shape, seed=seed))
    gate, up, down = (m.weight.detach().numpy() for m in (mlp.w_gate, mlp.w_up, mlp.w_down))
    assert (gate.shape, up.shape, down.shape) == ((10, 6), (10, 6), (6, 10))

    def formula(x: np.ndarray) -> np.ndarray:
        z = x @ gate.T
        return (z / (1 + np.exp(-z)) * (x @ up.T)) @ down.T

    x_BTD, along = random(2, 3, 6, seed=7).requires_grad_(), random(2, 3, 6, seed=8)
    out = mlp(x_BTD)
    x = x_BTD.detach().numpy()
    np.testing.assert_allclose(out.detach().numpy(), formula(x), rtol=1e-12, atol=1e-12)
    out.sum().backward()
    step = 1e-6 * along.numpy()
    slope = (formula(x + step).sum() - formula(x - step).sum()) / 2e-6
    assert float((x_BTD.grad * along).sum()) == pytest.approx(float(slope), rel=1e-6)


def test_every_kind_of_mlp_is_its_formula() -> None:
    """Far beyond where gpt-oss clamps: a gate from above at 7, an up from both sides."""
    gate, up = (
        torch.linspace(-30, 30, 61, dtype=torch.float64),
        torch.linspace(25, -25, 61, dtype=torch.float64),
    )
    kept, held = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    expected = {
        ("swiglu", "tanh"): gate / (1 + torch.exp(-gate)) * up,
        ("clamped_swiglu", "tanh"): (held + 1) * kept / (1 + torch.exp(-1.702 * kept)),
        ("geglu", "tanh"): 0.5 * gate * (1 + torch.tanh(inner)) * up,
        ("geglu", "erf"): 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2))) * up,
    }
    for (mlp, gelu), values in expected.items():
        arch = architecture().model_copy(update={"mlp": mlp, "gelu": gelu})
        torch.testing.assert_close(gated(arch, gate, up), values, rtol=1e-12, atol=1e-12)
    for gelu in ("tanh", "erf"):
        arch = architecture().model_copy(update={"mlp": "gelu", "gelu": gelu})
        alone = expected["geglu", gelu] / up.where(up != 0, 1.0)
        found = gated(arch, None, gate)
        torch.testing.assert_close(found[up != 0], alone[up != 0], rtol=1e-11, atol=1e-12)
