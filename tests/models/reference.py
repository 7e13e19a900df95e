"""Independent references for the decoder, and small architectures to try them on."""

from __future__ import annotations

import random

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from colossus.architecture import Architecture, RopeScaling
from colossus.models import Decoder

NAMES = (
    ("attention_norm", "input_layernorm"),
    ("mlp_norm", "post_attention_layernorm"),
    ("attention.wq", "self_attn.q_proj"),
    ("attention.wk", "self_attn.k_proj"),
    ("attention.wv", "self_attn.v_proj"),
    ("attention.wo", "self_attn.o_proj"),
    ("mlp.w_gate", "mlp.gate_proj"),
    ("mlp.w_up", "mlp.up_proj"),
    ("mlp.w_down", "mlp.down_proj"),
    ("embedding", "model.embed_tokens"),
    ("head", "lm_head"),
)
LLAMA31 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=64)


def architecture(**changed: object) -> Architecture:
    """A tiny model; `changed` replaces fields."""
    fields: dict[str, object] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "max_seq_len": 64,
        "rope_theta": 10_000.0,
        "norm_eps": 1e-5,
        "tie_embeddings": False,
        "qk_norm": False,
        "initializer_range": 0.2,
    }
    return Architecture.model_validate(fields | changed)


def random_architecture(seed: int) -> Architecture:
    draw = random.Random(seed)
    kv_heads = draw.randint(1, 3)
    return architecture(
        vocab_size=draw.randint(2, 300),
        hidden_size=draw.randint(1, 64),
        num_layers=draw.randint(1, 4),
        num_kv_heads=kv_heads,
        num_heads=kv_heads * draw.randint(1, 3),
        head_dim=2 * draw.randint(1, 16),
        intermediate_size=draw.randint(1, 100),
        tie_embeddings=draw.random() < 0.5,
        qk_norm=draw.random() < 0.5,
    )


def reference_name(name: str) -> str:
    """The name that transformers gives to a parameter of ours."""
    if name == "norm.weight":
        return "model.norm.weight"
    for ours, theirs in NAMES:
        name = name.replace(f"{ours}.weight", f"{theirs}.weight")
    return f"model.{name}" if name.startswith("layers.") else name


def transformers_twin(model: Decoder) -> LlamaForCausalLM:
    """transformers' Llama of the same shape, type and weights. It has no qk_norm."""
    arch = model.arch
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": arch.rope_theta}
    if arch.rope_scaling is not None:
        scaling = arch.rope_scaling.model_dump()
        scaling["original_max_position_embeddings"] = scaling.pop("original_max_seq_len")
        rope |= {"rope_type": "llama3", **scaling}
    config = LlamaConfig(
        vocab_size=arch.vocab_size,
        hidden_size=arch.hidden_size,
        num_hidden_layers=arch.num_layers,
        num_attention_heads=arch.num_heads,
        num_key_value_heads=arch.num_kv_heads,
        head_dim=arch.head_dim,
        intermediate_size=arch.intermediate_size,
        max_position_embeddings=arch.max_seq_len,
        rope_parameters=rope,
        rms_norm_eps=arch.norm_eps,
        tie_word_embeddings=arch.tie_embeddings,
        attn_implementation="sdpa",
    )
    twin = LlamaForCausalLM(config).to(model.embedding.weight.dtype)
    _replace_norms(twin)
    weights = {reference_name(name): tensor.detach().clone() for name, tensor in model.named_parameters()}
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return twin


def _replace_norms(module: nn.Module) -> None:
    """transformers' norm computes in fp32 whatever its input; torch's own keeps float64."""
    for name, child in module.named_children():
        if isinstance(child, LlamaRMSNorm):
            weight = child.weight
            norm = nn.RMSNorm(weight.shape[0], eps=child.variance_epsilon, dtype=weight.dtype)
            setattr(module, name, norm)
        else:
            _replace_norms(child)


def random_tokens(arch: Architecture, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(arch.vocab_size, (batch, length), generator=generator)
