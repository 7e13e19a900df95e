"""A tiny model of every published family: a preset's parts at small sizes."""

from __future__ import annotations

from functools import cache

from colossus.architecture import Architecture
from colossus.job import load_job

PRESETS = (
    "gpt2-124m", "llama3.1-8b", "mistral-7b-v0.1", "mixtral-8x7b", "qwen3-8b", "qwen3-30b-a3b", "olmo2-7b",
    "gpt-oss-20b", "deepseek-v3", "deepseek-v3, straight queries", "kimi-k2", "glm-4.5", "grok-1", "grok-2",
)  # fmt: skip


@cache
def tiny(preset: str, **changed: object) -> Architecture:
    """`preset` with all its parts, small: 5 layers of width 32."""
    preset, _, straight = preset.partition(", ")
    arch = load_job(None, [f"model={preset}"]).model
    small: dict[str, object] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_layers": 5,
        "num_heads": 4,
        "num_kv_heads": 4 if arch.latent or arch.num_kv_heads == arch.num_heads else 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "max_seq_len": 2048,
        "initializer_range": 0.2,
    }
    if arch.rotary_dim is not None:
        small["rotary_dim"] = 4
    if arch.window is not None:
        small["window"] = 5
    if arch.latent is not None:
        latent = {"kv_rank": 12, "nope_dim": 4, "rope_dim": 4, "v_dim": 6}
        small["latent"] = latent if straight else latent | {"q_rank": 16}
    if arch.experts is not None:
        sizes: dict[str, object] = {"num_experts": 8, "per_token": 2, "intermediate_size": 24}
        if arch.experts.num_groups > 1:
            sizes |= {"num_groups": 4, "groups_per_token": 2}
        if arch.experts.dense_layers:
            sizes["dense_layers"] = 2
        small["experts"] = arch.experts.model_dump(exclude_unset=True) | sizes
    return Architecture.model_validate(arch.model_dump(exclude_unset=True) | small | changed)
