"""The published families: for each, what `config.json` says and what the tensors are called.

Names, shapes and defaults are those of huggingface/transformers 5.24 (`models/*/configuration_*.py`,
`modeling_*.py`, and what `save_pretrained` writes), which are those of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from colossus.architecture import Architecture
from colossus.models.hf.config import (
    FULL,
    WINDOWED,
    Always,
    Choice,
    Config,
    Dense,
    Follows,
    HeadDim,
    Key,
    Nullable,
    Only,
    Says,
    Term,
    Window,
    whole,
)
from colossus.models.hf.mapping import Fused, PerExpert, Permuted, Rule, Same, Turned
from colossus.models.hf.rotary import Rotary


@dataclass(frozen=True)
class Published:
    """A family as `transformers` knows it.

    aliases: other names of its model_type. prefix: of all names but the head's, which checkpoints of the bare
    model leave out. skipped: patterns of tensors that are no part of the model: buffers that are computed.
    mtp: checkpoints may go on with layers that predict further tokens, which are left out.
    """

    name: str
    architecture: str
    terms: tuple[Term, ...]
    rules: tuple[Rule, ...]
    aliases: tuple[str, ...] = ()
    prefix: str = "model."
    skipped: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)
    mtp: bool = False


def _heads(config: Config) -> object:
    return config.get("num_attention_heads")


def _sizes(eps: float, tied: bool = False) -> tuple[Term, ...]:
    """What every family but GPT-2 calls the same."""
    return (
        Key("vocab_size", "vocab_size"),
        Key("hidden_size", "hidden_size"),
        Key("num_hidden_layers", "num_layers"),
        Key("num_attention_heads", "num_heads"),
        Key("intermediate_size", "intermediate_size"),
        Key("max_position_embeddings", "max_seq_len"),
        Key("rms_norm_eps", "norm_eps", eps),
        Key("initializer_range", "initializer_range", 0.02),
        Key("tie_word_embeddings", "tie_embeddings", tied),
        Only("hidden_act", "silu"),
    )


KV_HEADS = Key("num_key_value_heads", "num_kv_heads", _heads)
BIASES = Key("attention_bias", "attention_bias", False, also="attention_out_bias")
HEAD_NORMS = Always({"qk_norm": True})
NO_NORMS = Always({"qk_norm": False})


def _both(ours: str, theirs: str) -> Iterator[Rule]:
    """A matrix, and its bias where the model has one."""
    for part in ("weight", "bias"):
        yield Same((f"{ours}.{part}",), (f"{theirs}.{part}",))


def _same(*pairs: tuple[str, str]) -> tuple[Rule, ...]:
    return tuple(Same((ours,), (theirs,)) for ours, theirs in pairs)


ENDS = _same(
    ("embedding.weight", "model.embed_tokens.weight"),
    ("norm.weight", "model.norm.weight"),
    ("head.weight", "lm_head.weight"),
)
PRE_NORMS = _same(
    ("layers.#.attention_norm.weight", "model.layers.#.input_layernorm.weight"),
    ("layers.#.mlp_norm.weight", "model.layers.#.post_attention_layernorm.weight"),
)
POST_NORMS = _same(
    ("layers.#.attention_post_norm.weight", "model.layers.#.post_attention_layernorm.weight"),
    ("layers.#.mlp_post_norm.weight", "model.layers.#.post_feedforward_layernorm.weight"),
)
ATTENTION: tuple[Rule, ...] = (
    *_both("layers.#.attention.wq", "model.layers.#.self_attn.q_proj"),
    *_both("layers.#.attention.wk", "model.layers.#.self_attn.k_proj"),
    *_both("layers.#.attention.wv", "model.layers.#.self_attn.v_proj"),
    *_both("layers.#.attention.wo", "model.layers.#.self_attn.o_proj"),
)
QK_NORMS = _same(
    ("layers.#.attention.q_norm.weight", "model.layers.#.self_attn.q_norm.weight"),
    ("layers.#.attention.k_norm.weight", "model.layers.#.self_attn.k_norm.weight"),
)
MLP: tuple[Rule, ...] = (
    *_both("layers.#.mlp.w_gate", "model.layers.#.mlp.gate_proj"),
    *_both("layers.#.mlp.w_up", "model.layers.#.mlp.up_proj"),
    *_both("layers.#.mlp.w_down", "model.layers.#.mlp.down_proj"),
)


def _experts(part: str, gate: str, up: str, down: str, router: str = "gate") -> tuple[Rule, ...]:
    """Experts of one tensor each, in the part of a layer that is called so."""
    names = {"w_gate": gate, "w_up": up, "w_down": down}
    return (
        Same(("layers.#.moe.router.weight",), (f"model.layers.#.{part}.{router}.weight",)),
        *(
            PerExpert(
                (f"layers.#.moe.experts.{ours}",), (f"model.layers.#.{part}.experts.*.{theirs}.weight",)
            )
            for ours, theirs in names.items()
        ),
    )


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
EXPERTS = _experts("mlp", *PROJECTIONS)
SHARED = _same(
    ("layers.#.moe.router.selection_bias", "model.layers.#.mlp.gate.e_score_correction_bias"),
    ("layers.#.moe.shared.w_gate.weight", "model.layers.#.mlp.shared_experts.gate_proj.weight"),
    ("layers.#.moe.shared.w_up.weight", "model.layers.#.mlp.shared_experts.up_proj.weight"),
    ("layers.#.moe.shared.w_down.weight", "model.layers.#.mlp.shared_experts.down_proj.weight"),
)
DENSE_RULES = (*ENDS, *PRE_NORMS, *ATTENTION, *MLP)

# What DeepSeek-V3 and GLM-4.5 say of their experts; the loss that keeps loads alike is not in config.json.
SIGMOID_EXPERTS: tuple[Term, ...] = (
    Always(
        {
            "experts.scores": "sigmoid",
            "experts.selection_bias": True,
            "experts.balance_loss": 0.0001,
            "experts.balance_over": "sequence",
            "experts.bias_rate": 0.001,
        }
    ),
    Only("scoring_func", "sigmoid"),
    Only("topk_method", "noaux_tc"),
    Only("moe_layer_freq", 1),
    Key("n_routed_experts", "experts.num_experts"),
    Key("num_experts_per_tok", "experts.per_token", 8),
    Key("moe_intermediate_size", "experts.intermediate_size"),
    Key("n_shared_experts", "experts.num_shared", 1, at_least=1),
    Key("norm_topk_prob", "experts.normalise", True),
    Says("num_nextn_predict_layers", lambda arch: 0),
)


def _qwen3_layers(config: Config) -> list[str]:
    """Windows begin after `max_window_layers` layers."""
    first = config.get("max_window_layers", 28) if config.get("use_sliding_window") else None
    num = int(config.get("num_hidden_layers") or 0)
    return [WINDOWED if first is not None and layer >= first else FULL for layer in range(num)]


def _every_other(config: Config) -> list[str]:
    return [FULL if layer % 2 else WINDOWED for layer in range(int(config.get("num_hidden_layers") or 0))]


def _query_rows(arch: Architecture) -> list[int]:
    """Of each head's rotated rows, first those at even places, then the others.

    Published weights turn the coordinates (2i, 2i + 1) together; ours i and i + half.
    """
    assert arch.latent is not None
    plain, turned = arch.latent.nope_dim, arch.latent.rope_dim
    head = [*range(plain), *range(plain, plain + turned, 2), *range(plain + 1, plain + turned, 2)]
    return [first + row for first in range(0, arch.num_heads * arch.head_dim, plain + turned) for row in head]


def _key_rows(arch: Architecture) -> list[int]:
    """The same for the key that is one for all heads, behind the latent vector."""
    assert arch.latent is not None
    plain, end = arch.latent.kv_rank, arch.latent.kv_rank + arch.latent.rope_dim
    return [*range(plain), *range(plain, end, 2), *range(plain + 1, end, 2)]


GPT2 = Published(
    "gpt2",
    "GPT2LMHeadModel",
    terms=(
        Always(
            {
                "position": "learned",
                "norm": "layer",
                "mlp": "gelu",
                "mlp_bias": True,
                "attention_bias": True,
                "attention_out_bias": True,
                "qk_norm": False,
            }
        ),
        Key("vocab_size", "vocab_size"),
        Key("n_embd", "hidden_size"),
        Key("n_layer", "num_layers"),
        Key("n_head", "num_heads"),
        Follows("num_kv_heads", lambda config: config["n_head"]),
        Follows("head_dim", lambda config: whole(config["n_embd"], config["n_head"])),
        Key("n_positions", "max_seq_len"),
        Key("layer_norm_epsilon", "norm_eps", 1e-5),
        Key("initializer_range", "initializer_range", 0.02),
        Key("tie_word_embeddings", "tie_embeddings", True),
        Key("n_inner", "intermediate_size", lambda config: 4 * config["n_embd"]),
        Choice(
            "activation_function",
            {
                "gelu_new": {"gelu": "tanh"},
                "gelu": {"gelu": "erf"},
                "gelu_pytorch_tanh": {"gelu": "tanh"},
            },
            "gelu_new",
        ),
        Only("scale_attn_weights", True),
        Only("scale_attn_by_inverse_layer_idx", False),
        Only("add_cross_attention", False),
    ),
    rules=(
        *_same(
            ("embedding.weight", "transformer.wte.weight"),
            ("position_embedding.weight", "transformer.wpe.weight"),
            ("layers.#.attention_norm.weight", "transformer.h.#.ln_1.weight"),
            ("layers.#.attention_norm.bias", "transformer.h.#.ln_1.bias"),
            ("layers.#.mlp_norm.weight", "transformer.h.#.ln_2.weight"),
            ("layers.#.mlp_norm.bias", "transformer.h.#.ln_2.bias"),
            ("layers.#.attention.wo.bias", "transformer.h.#.attn.c_proj.bias"),
            ("layers.#.mlp.w_up.bias", "transformer.h.#.mlp.c_fc.bias"),
            ("layers.#.mlp.w_down.bias", "transformer.h.#.mlp.c_proj.bias"),
            ("norm.weight", "transformer.ln_f.weight"),
            ("norm.bias", "transformer.ln_f.bias"),
            ("head.weight", "lm_head.weight"),
        ),
        Fused(
            tuple(f"layers.#.attention.{name}.weight" for name in ("wq", "wk", "wv")),
            ("transformer.h.#.attn.c_attn.weight",),
            turned=True,
        ),
        Fused(
            tuple(f"layers.#.attention.{name}.bias" for name in ("wq", "wk", "wv")),
            ("transformer.h.#.attn.c_attn.bias",),
        ),
        Turned(("layers.#.attention.wo.weight",), ("transformer.h.#.attn.c_proj.weight",)),
        Turned(("layers.#.mlp.w_up.weight",), ("transformer.h.#.mlp.c_fc.weight",)),
        Turned(("layers.#.mlp.w_down.weight",), ("transformer.h.#.mlp.c_proj.weight",)),
    ),
    prefix="transformer.",
    skipped=(r".*\.attn\.(masked_)?bias",),  # the causal mask, which old checkpoints hold
)

LLAMA = Published(
    "llama",
    "LlamaForCausalLM",
    terms=(
        *_sizes(1e-6),
        KV_HEADS,
        HeadDim(),
        Rotary(),
        NO_NORMS,
        BIASES,
        Key("mlp_bias", "mlp_bias", False),
    ),
    rules=DENSE_RULES,
)

MISTRAL = Published(
    "mistral",
    "MistralForCausalLM",
    terms=(*_sizes(1e-6), KV_HEADS, HeadDim(), Rotary(), NO_NORMS, Window(4096)),
    rules=DENSE_RULES,
)

MIXTRAL = Published(
    "mixtral",
    "MixtralForCausalLM",
    terms=(
        *_sizes(1e-5),
        KV_HEADS,
        HeadDim(explicit=False),
        Rotary(1_000_000.0),
        NO_NORMS,
        Window(None),
        Key("num_local_experts", "experts.num_experts", 8),
        Key("num_experts_per_tok", "experts.per_token", 2),
        Key("router_aux_loss_coef", "experts.balance_loss", 0.001),
    ),
    rules=(*ENDS, *PRE_NORMS, *ATTENTION, *_experts("block_sparse_moe", "w1", "w3", "w2")),
)

QWEN3 = Published(
    "qwen3",
    "Qwen3ForCausalLM",
    terms=(
        *_sizes(1e-6),
        KV_HEADS,
        HeadDim(default=128),
        Rotary(),
        HEAD_NORMS,
        BIASES,
        Window(4096, switch=True, layer_types=_qwen3_layers),
    ),
    rules=(*DENSE_RULES, *QK_NORMS),
)

QWEN3_MOE = Published(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    terms=(
        *_sizes(1e-6),
        KV_HEADS,
        HeadDim(),
        Rotary(),
        HEAD_NORMS,
        BIASES,
        Window(4096, switch=True),
        Only("decoder_sparse_step", 1),
        Dense(),
        Key("num_experts", "experts.num_experts", lambda config: config.get("num_local_experts", 128)),
        Says("num_local_experts", lambda arch: arch.experts.num_experts if arch.experts else 0),
        Key("num_experts_per_tok", "experts.per_token", 8),
        Key("moe_intermediate_size", "experts.intermediate_size", 768),
        Key("norm_topk_prob", "experts.normalise", False),
        Key("router_aux_loss_coef", "experts.balance_loss", 0.001),
    ),
    rules=(*DENSE_RULES, *QK_NORMS, *EXPERTS),
)

OLMO2 = Published(
    "olmo2",
    "Olmo2ForCausalLM",
    terms=(
        *_sizes(1e-5),
        KV_HEADS,
        HeadDim(explicit=False),
        Rotary(),
        Always({"norm_placement": "post", "qk_norm": True, "qk_norm_over": "projection"}),
        BIASES,
    ),
    rules=(*ENDS, *POST_NORMS, *ATTENTION, *QK_NORMS, *MLP),
)

GPT_OSS = Published(
    "gpt_oss",
    "GptOssForCausalLM",
    terms=(
        *_sizes(1e-5),
        KV_HEADS,
        HeadDim(default=64),
        Rotary(
            150_000.0,
            missing={
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        ),
        Always(
            {
                "qk_norm": False,
                "mlp": "clamped_swiglu",
                "attention_sinks": True,
                "experts.router_bias": True,
                "experts.bias": True,
            }
        ),
        Key("attention_bias", "attention_bias", True, also="attention_out_bias"),
        Window(128, layer_types=_every_other),
        Only("swiglu_alpha", 1.702),
        Only("swiglu_limit", 7.0),
        Key("num_local_experts", "experts.num_experts", 128),
        Key("num_experts_per_tok", "experts.per_token", 4),
        Key("router_aux_loss_coef", "experts.balance_loss", 0.001),
    ),
    rules=(
        *ENDS,
        *PRE_NORMS,
        *ATTENTION,
        *_same(
            ("layers.#.attention.sinks", "model.layers.#.self_attn.sinks"),
            ("layers.#.moe.router.weight", "model.layers.#.mlp.router.weight"),
            ("layers.#.moe.router.bias", "model.layers.#.mlp.router.bias"),
            ("layers.#.moe.experts.w_down_bias", "model.layers.#.mlp.experts.down_proj_bias"),
        ),
        Turned(("layers.#.moe.experts.w_down",), ("model.layers.#.mlp.experts.down_proj",)),
        Fused(
            ("layers.#.moe.experts.w_gate", "layers.#.moe.experts.w_up"),
            ("model.layers.#.mlp.experts.gate_up_proj",),
            axis=1,
            in_turns=True,
            turned=True,
        ),
        Fused(
            ("layers.#.moe.experts.w_gate_bias", "layers.#.moe.experts.w_up_bias"),
            ("model.layers.#.mlp.experts.gate_up_proj_bias",),
            axis=1,
            in_turns=True,
        ),
    ),
)

DEEPSEEK_V3 = Published(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    aliases=("kimi_k2",),
    terms=(
        *_sizes(1e-6),
        Follows("num_kv_heads", lambda config: config["num_attention_heads"]),
        Follows("head_dim", lambda c: (c.get("qk_nope_head_dim") or 128) + (c.get("qk_rope_head_dim") or 64)),
        Says("num_key_value_heads", lambda arch: arch.num_heads),
        Key("qk_nope_head_dim", "latent.nope_dim", 128),
        Key("qk_rope_head_dim", "latent.rope_dim", 64),
        Key("v_head_dim", "latent.v_dim", 128),
        Nullable("q_lora_rank", "latent.q_rank", 1536),
        Key("kv_lora_rank", "latent.kv_rank", 512),
        Rotary(scales_scores=True),
        NO_NORMS,
        Only("attention_bias", False),
        Only("rope_interleave", True),
        Key("first_k_dense_replace", "experts.dense_layers", 3),
        Key("routed_scaling_factor", "experts.scale", 2.5),
        Key("n_group", "experts.num_groups", 8),
        Key("topk_group", "experts.groups_per_token", 4),
        *SIGMOID_EXPERTS,
    ),
    rules=(
        *ENDS,
        *PRE_NORMS,
        *_same(
            ("layers.#.attention.wq_down.weight", "model.layers.#.self_attn.q_a_proj.weight"),
            ("layers.#.attention.q_norm.weight", "model.layers.#.self_attn.q_a_layernorm.weight"),
            ("layers.#.attention.kv_norm.weight", "model.layers.#.self_attn.kv_a_layernorm.weight"),
            ("layers.#.attention.wkv_up.weight", "model.layers.#.self_attn.kv_b_proj.weight"),
            ("layers.#.attention.wo.weight", "model.layers.#.self_attn.o_proj.weight"),
        ),
        Permuted(("layers.#.attention.wq.weight",), ("model.layers.#.self_attn.q_proj.weight",), _query_rows),
        Permuted(
            ("layers.#.attention.wq_up.weight",), ("model.layers.#.self_attn.q_b_proj.weight",), _query_rows
        ),
        Permuted(
            ("layers.#.attention.wkv_down.weight",),
            ("model.layers.#.self_attn.kv_a_proj_with_mqa.weight",),
            _key_rows,
        ),
        *MLP,
        *EXPERTS,
        *SHARED,
    ),
    mtp=True,
)

GLM4_MOE = Published(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    terms=(
        *_sizes(1e-5),
        KV_HEADS,
        HeadDim(),
        Rotary(partial=0.5),
        Key("use_qk_norm", "qk_norm", False),
        Key("attention_bias", "attention_bias", False),
        Key("first_k_dense_replace", "experts.dense_layers", 1),
        Key("routed_scaling_factor", "experts.scale", 1.0),
        Key("n_group", "experts.num_groups", 1),
        Key("topk_group", "experts.groups_per_token", 1),
        *SIGMOID_EXPERTS,
    ),
    rules=(*DENSE_RULES, *QK_NORMS, *EXPERTS, *SHARED),
    mtp=True,
)

FAMILIES = {
    family.name: family
    for family in (LLAMA, QWEN3, MISTRAL, OLMO2, GPT2, MIXTRAL, QWEN3_MOE, GPT_OSS, DEEPSEEK_V3, GLM4_MOE)
}
"""By name; the simplest first: the first that a model fits is what it is exported as."""
