"""Grok-2 in float64 numpy, and small checkpoints in the form in which xAI published it.

xAI published weights and a configuration, no code. The computation is that of the engine which the Hub's
card names, sgl-project/sglang: `python/sglang/srt/models/grok.py`, `layers/moe/router.py`,
`layers/elementwise.py`, `layers/logits_processor.py` and the Triton attention kernels. Where engines
disagree there is a field: `gelu` (SGLang declares tanh for the dense layer and runs erf on GPUs;
Grok-1 is tanh), `router_logit_softcapping` and `attn_temperature_len` (llama.cpp has neither).
rope_type "original" leaves plain frequencies in SGLang: the factor 16 of the configuration is inert.

**The published form.** 39 files of tensors, bfloat16, [out, in]. `pytorch_model-000NN-TP-common.safetensors`
holds one kind of tensor for all layers (`COMMON_KINDS`). Kinds 6, 7 and 8, the experts' w1, w2, w3, are in
eight files each, `pytorch_model-000NN-TP-00R.safetensors`, cut for eight devices: file R holds, under the
same names, piece R of every expert of every layer; join w1 and w3 along axis 0, w2 along axis 1. Source:
the docstring of a Grok-2 loader for Tenstorrent devices (class with `load_weights_to_state_dict_no_experts`
and `load_experts_weights_to_state_dict`); SGLang's loader has the same patterns of names. No index file is
known of: llama.cpp's pull request 15539 finds the files by their names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.models.references.parts import (
    Array,
    Gelu,
    attend,
    bfloat16_bits,
    bfloat16_values,
    causal,
    expert_weights,
    gelu,
    rms_norm,
    rotate,
    soft_cap,
)

NUM_DEVICES = 8  # that the experts are cut for

COMMON_KINDS = {
    0: "model.embed_tokens",
    1: "lm_head",
    2: "model.norm",
    3: "mlp.gate_proj",
    4: "mlp.down_proj",
    5: "mlp.up_proj",
    9: "self_attn.k_proj",
    10: "self_attn.o_proj",
    11: "self_attn.q_proj",
    12: "self_attn.v_proj",
    13: "pre_attn_norm",
    14: "post_attn_norm",
    15: "pre_moe_norm",
    16: "post_moe_norm",
    17: "block_sparse_moe.gate",
}
EXPERT_KINDS = {6: ("w1", 0), 7: ("w2", 1), 8: ("w3", 0)}  # and the axis that is cut


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes, then the published numbers, under the names of config.json where it has them."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    num_local_experts: int
    num_experts_per_tok: int
    vocab_size: int
    embedding_multiplier_scale: float = 90.50966799187809
    output_multiplier_scale: float = 0.5
    attn_logit_softcapping: float = 30.0
    router_logit_softcapping: float = 30.0
    final_logit_softcapping: float = 50.0
    attn_temperature_len: int = 1024  # 0 or less: none
    rope_theta: float = 208533496.0
    rms_norm_eps: float = 1e-5
    residual_moe_scale: float = 1.0 / math.sqrt(2.0)  # SGLang's; no key of config.json
    gelu: Gelu = "tanh"  # of the dense layer and of the experts; no key of config.json


def config(**changed: int | float | str) -> Config:
    """A tiny model whose temperature acts from the sixth token on; `changed` replaces fields.

    moe_intermediate_size must divide by 8.
    """
    sizes: dict[str, int | float | str] = {
        "num_hidden_layers": 3,
        "hidden_size": 20,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 28,
        "moe_intermediate_size": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "vocab_size": 37,
        "attn_temperature_len": 4,
    }
    return Config(**(sizes | changed))  # type: ignore[arg-type]


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Of every parameter, by its published name; matrices [out, in]."""
    hidden, dense, inner = config.hidden_size, config.intermediate_size, config.moe_intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "lm_head.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(config.num_hidden_layers):
        of_layer: dict[str, tuple[int, ...]] = {
            "pre_attn_norm": (hidden,),
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "post_attn_norm": (hidden,),
            "pre_moe_norm": (hidden,),
            "mlp.gate_proj": (dense, hidden),
            "mlp.up_proj": (dense, hidden),
            "mlp.down_proj": (hidden, dense),
            "block_sparse_moe.gate": (config.num_local_experts, hidden),
            "post_moe_norm": (hidden,),
        }
        for expert in range(config.num_local_experts):
            of = f"block_sparse_moe.experts.{expert}"
            of_layer |= {
                f"{of}.w1": (inner, hidden),
                f"{of}.w2": (hidden, inner),
                f"{of}.w3": (inner, hidden),
            }
        found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
    return found


def random_weights(config: Config, seed: int) -> dict[str, Array]:
    """float64, of sizes at which every part shows in the logits: attention's and the final cap act."""
    draw = np.random.default_rng(seed)
    gains = {"q_proj": 2.5, "k_proj": 2.5, "gate": 3.0, "lm_head": 20.0}
    weights = {}
    for name, shape in shapes(config).items():
        values = draw.standard_normal(shape)
        if name.endswith("norm.weight"):
            weights[name] = 1.0 + 0.2 * values
        elif name == "model.embed_tokens.weight":
            weights[name] = 3.0 * values / config.embedding_multiplier_scale
        else:
            weights[name] = gains.get(name.split(".")[-2], 1.0) * values / np.sqrt(shape[1])
    return weights


def logits(config: Config, weights: Mapping[str, Array], tokens_BT: Array) -> Array:
    """float64 [B, T, V]. Causal; no token is a pad here."""
    tokens_BT = np.asarray(tokens_BT)
    w = {name: np.asarray(value, dtype=np.float64) for name, value in weights.items()}
    eps = config.rms_norm_eps

    h_BTD = w["model.embed_tokens.weight"][tokens_BT] * config.embedding_multiplier_scale
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        branch = attention(config, w, at, rms_norm(h_BTD, w[f"{at}.pre_attn_norm.weight"], eps))
        h_BTD = h_BTD + rms_norm(branch, w[f"{at}.post_attn_norm.weight"], eps)
        branch = feed_forward(config, w, at, rms_norm(h_BTD, w[f"{at}.pre_moe_norm.weight"], eps))
        h_BTD = h_BTD + rms_norm(branch, w[f"{at}.post_moe_norm.weight"], eps)
    h_BTD = rms_norm(h_BTD, w["model.norm.weight"], eps)
    scores_BTV = config.output_multiplier_scale * (h_BTD @ w["lm_head.weight"].T)
    return soft_cap(scores_BTV, config.final_logit_softcapping)


def heat(config: Config, num_tokens: int) -> Array:
    """[T]: log2(pos)/log2(length) for a query at pos > length, counted from 0; else 1."""
    length = config.attn_temperature_len
    return np.array(
        [math.log2(pos) / math.log2(length) if 0 < length < pos else 1.0 for pos in range(num_tokens)]
    )


def attention(config: Config, w: Mapping[str, Array], at: str, x_BTD: Array) -> Array:
    num_sequences, num_tokens, _ = x_BTD.shape
    heads: dict[str, Array] = {}
    for name in ("q_proj", "k_proj", "v_proj"):
        projected = x_BTD @ w[f"{at}.self_attn.{name}.weight"].T
        heads[name] = projected.reshape(num_sequences, num_tokens, -1, config.head_dim)
    mixed = attend(
        rotate(heads["q_proj"], config.rope_theta),
        rotate(heads["k_proj"], config.rope_theta),
        heads["v_proj"],
        1.0 / math.sqrt(config.head_dim),
        config.attn_logit_softcapping,
        heat(config, num_tokens),
        np.broadcast_to(causal(num_tokens), (num_sequences, num_tokens, num_tokens)),
    )
    return mixed @ w[f"{at}.self_attn.o_proj.weight"].T


def feed_forward(config: Config, w: Mapping[str, Array], at: str, x_BTD: Array) -> Array:
    """The dense layer and the experts side by side, on the same input."""

    def gated(gate: str, up: str, down: str) -> Array:
        inner = gelu(x_BTD @ w[f"{at}.{gate}.weight"].T, config.gelu) * (x_BTD @ w[f"{at}.{up}.weight"].T)
        return inner @ w[f"{at}.{down}.weight"].T

    out = gated("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    router_BTX = soft_cap(x_BTD @ w[f"{at}.block_sparse_moe.gate.weight"].T, config.router_logit_softcapping)
    weights_BTX = expert_weights(router_BTX, config.num_experts_per_tok)
    for expert in range(config.num_local_experts):
        of = f"block_sparse_moe.experts.{expert}"
        out = out + weights_BTX[..., expert, None] * gated(f"{of}.w1", f"{of}.w3", f"{of}.w2")
    return out * config.residual_moe_scale


def write_checkpoint(config: Config, weights: Mapping[str, Array], folder: Path) -> dict[str, Array]:
    """Writes config.json and the 39 files of tensors. Returns the weights rounded to bfloat16, float64."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(published_config(config), indent=2) + "\n")
    bits = {name: bfloat16_bits(value) for name, value in weights.items()}
    for number, kind in COMMON_KINDS.items():
        of_kind = {name: value for name, value in bits.items() if name.endswith(f"{kind}.weight")}
        write_bfloat16(folder / f"pytorch_model-{number:05d}-TP-common.safetensors", of_kind)
    for number, (kind, axis) in EXPERT_KINDS.items():
        of_kind = {name: value for name, value in bits.items() if name.endswith(f".{kind}.weight")}
        for rank in range(NUM_DEVICES):
            pieces = {name: np.split(value, NUM_DEVICES, axis)[rank] for name, value in of_kind.items()}
            write_bfloat16(folder / f"pytorch_model-{number:05d}-TP-{rank:03d}.safetensors", pieces)
    return {name: bfloat16_values(value) for name, value in bits.items()}


def published_config(config: Config) -> dict[str, object]:
    """The keys of xai-org/grok-2's config.json, as sgl-project/sglang-jax's tests repeat it."""
    return {
        "architectures": ["Grok1ForCausalLM"],
        "embedding_multiplier_scale": config.embedding_multiplier_scale,
        "output_multiplier_scale": config.output_multiplier_scale,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "moe_intermediate_size": config.moe_intermediate_size,
        "max_position_embeddings": 131072,
        "num_experts_per_tok": config.num_experts_per_tok,
        "num_local_experts": config.num_local_experts,
        "residual_moe": True,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "final_logit_softcapping": config.final_logit_softcapping,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "router_logit_softcapping": config.router_logit_softcapping,
        "rope_theta": config.rope_theta,
        "attn_temperature_len": config.attn_temperature_len,
        "sliding_window_size": -1,
        "global_attn_every_n": 1,
        "model_type": "git",
        "torch_dtype": "bfloat16",
        "rope_type": "original",
        "original_max_position_embeddings": 8192,
        "scaling_factor": 16.0,
        "extrapolation_factor": 1.0,
        "attn_factor": 1.0,
        "beta_fast": 8,
        "beta_slow": 1,
    }


def write_bfloat16(path: Path, tensors: Mapping[str, Array]) -> None:
    """The safetensors format: length of the header as 8 bytes, a JSON header, the tensors' bytes."""
    header: dict[str, object] = {}
    end = 0
    for name, value in tensors.items():
        begin, end = end, end + value.nbytes
        header[name] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in tensors.values():
            file.write(value.tobytes())
