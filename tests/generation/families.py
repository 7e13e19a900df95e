"""Every published model made tiny, with all that sets its family apart."""

from __future__ import annotations

from typing import Any

from colossus.architecture import Architecture
from colossus.job import load_job
from colossus.section import Section

NAMES = (
    "deepseek-v3", "glm-4.5", "gpt-oss-20b", "gpt2-124m", "gpt3-125m", "grok-1", "grok-2", "kimi-k2",
    "llama2-7b", "llama3.1-8b", "mistral-7b-v0.1", "mixtral-8x7b", "olmo2-7b", "qwen3-0.6b", "qwen3-30b-a3b",
)  # fmt: skip
WINDOW = 24


def tiny(name: str, vocab_size: int) -> Architecture:
    """Of two or three layers and a context of 24 tokens, decided by large initial values."""
    full: Architecture = load_job(None, [f"model={name}"]).model
    values = _set(full)
    values |= {"vocab_size": vocab_size, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "head_dim": 8}
    values |= {"num_kv_heads": 4 if full.num_kv_heads == full.num_heads else 2, "intermediate_size": 48}
    values |= {"max_seq_len": WINDOW, "initializer_range": 0.3}
    if full.rotary_dim is not None:
        values["rotary_dim"] = 4
    if full.window is not None:
        values["window"] = 5
    if full.attention_temperature_len is not None:
        values["attention_temperature_len"] = 6
    if full.pad_token is not None:
        values["pad_token"] = 32  # a space, so that some prompts hold it
    if full.rope_scaling is not None:
        values["rope_scaling"] = _set(full.rope_scaling) | {"original_max_seq_len": 8}
    if full.latent is not None:
        values["latent"] = {"q_rank": 12, "kv_rank": 10, "nope_dim": 4, "rope_dim": 4, "v_dim": 6}
        values["attention_scale"] = 0.4
    if full.experts is not None:
        sizes = {"num_experts": 4, "per_token": 2, "intermediate_size": 24}
        if full.experts.dense_layers:
            sizes["dense_layers"] = 1
        if full.experts.num_groups > 1:
            sizes |= {"num_groups": 2, "groups_per_token": 1}
        values["experts"] = _set(full.experts) | sizes
    return Architecture.model_validate(values)


def _set(section: Section) -> dict[str, Any]:
    return section.model_dump(exclude_unset=True)


def seen(tokens: list[int], window: int) -> list[int]:
    """What of a text a model of this window predicts the next token from, by the rule in docs/generate.md:
    where the window is full it moves on by half of itself."""
    begin = 0
    while len(tokens) - begin > window:
        begin += window // 2
    return tokens[begin:]
