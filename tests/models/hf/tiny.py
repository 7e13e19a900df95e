"""Tiny models of every published family, made and saved by `transformers`, with weights that all matter."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from colossus.architecture import IGNORED
from colossus.checkpoints.weights import Weights
from colossus.data.json_tokenizer import JsonTokenizer
from colossus.models import Decoder
from colossus.models.hf.published import open_published

Make = Callable[[random.Random], Any]

VOCAB = 40
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "rope_theta": 1000.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 500.0,
}


def _sizes(rng: random.Random, **others: Any) -> dict[str, Any]:
    """Of a model with grouped heads. Products of experts on a CPU take rows of whole 16 bytes."""
    kv = rng.choice((1, 2, 3))
    return {
        "vocab_size": VOCAB,
        "hidden_size": 2 * kv * rng.choice((4, 6, 8)),
        "num_hidden_layers": rng.randint(2, 3),
        "num_attention_heads": 2 * kv,
        "num_key_value_heads": kv,
        "intermediate_size": 4 * rng.randint(3, 7),
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    } | others


def _experts(rng: random.Random, name: str, **others: Any) -> dict[str, Any]:
    num = rng.randint(3, 6)
    return {name: num, "num_experts_per_tok": rng.randint(1, num - 1)} | others


def _gpt2(rng: random.Random) -> Any:
    from transformers import GPT2Config

    heads = rng.randint(1, 4)
    return GPT2Config(
        vocab_size=VOCAB,
        n_positions=64,
        n_embd=heads * rng.randint(3, 8),
        n_head=heads,
        n_layer=2,
        n_inner=rng.choice((None, 21)),
        activation_function=rng.choice(("gelu_new", "gelu")),
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    )


def _llama(rng: random.Random) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        **_sizes(rng), head_dim=8, tie_word_embeddings=rng.random() < 0.5, rope_parameters=dict(LLAMA3)
    )


def _llama_with_biases(rng: random.Random) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        **_sizes(rng), head_dim=6, attention_bias=True, mlp_bias=True, rope_parameters=dict(YARN)
    )


def _mistral(rng: random.Random) -> Any:
    from transformers import MistralConfig

    return MistralConfig(**_sizes(rng), head_dim=8, sliding_window=rng.randint(3, 9))


def _mixtral(rng: random.Random) -> Any:
    from transformers import MixtralConfig

    return MixtralConfig(**_sizes(rng), **_experts(rng, "num_local_experts"), sliding_window=5)


def _qwen3(rng: random.Random) -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(**_sizes(rng), head_dim=8, tie_word_embeddings=True, attention_bias=rng.random() < 0.5)


def _qwen3_with_windows(rng: random.Random) -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(
        **_sizes(rng),
        head_dim=10,
        use_sliding_window=True,
        sliding_window=rng.randint(3, 9),
        max_window_layers=0,
    )


def _qwen3_moe(rng: random.Random) -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        **_sizes(rng, head_dim=8),
        **_experts(rng, "num_experts"),
        moe_intermediate_size=8,
        norm_topk_prob=rng.random() < 0.5,
        mlp_only_layers=[0],
    )


def _olmo2(rng: random.Random) -> Any:
    from transformers import Olmo2Config

    return Olmo2Config(**_sizes(rng))


def _gpt_oss(rng: random.Random) -> Any:
    from transformers import GptOssConfig

    yarn = YARN | {"truncate": False, "factor": 32.0}
    return GptOssConfig(
        **_sizes(rng),
        **_experts(rng, "num_local_experts"),
        head_dim=8,
        sliding_window=rng.randint(3, 9),
        rope_parameters=yarn,
    )


def _deepseek_v3(rng: random.Random, **changed: Any) -> Any:
    from transformers import DeepseekV3Config

    heads, groups = rng.randint(1, 3), rng.choice((1, 2, 3))
    values = dict(
        **_sizes(rng, num_attention_heads=heads, num_key_value_heads=heads),
        rms_norm_eps=1e-5,  # that of the layers; the latent vectors' stays 1e-6
        q_lora_rank=rng.randint(5, 12),
        kv_lora_rank=rng.randint(5, 12),
        qk_rope_head_dim=rng.choice((4, 6)),
        qk_nope_head_dim=rng.randint(3, 9),
        v_head_dim=rng.randint(3, 9),
        n_routed_experts=3 * groups,
        n_group=groups,
        topk_group=rng.randint(1, groups),
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        moe_intermediate_size=8,
        n_shared_experts=rng.randint(1, 2),
        rope_parameters=YARN | {"mscale": 0.7, "mscale_all_dim": rng.choice((0.7, 1.0))},
    )
    return DeepseekV3Config(**values | changed)


def _deepseek_v3_straight(rng: random.Random) -> Any:
    """As Moonlight's and DeepSeek-V2-Lite's: queries by one matrix."""
    return _deepseek_v3(rng, q_lora_rank=None)


def _glm4_moe(rng: random.Random) -> Any:
    from transformers import Glm4MoeConfig

    return Glm4MoeConfig(
        **_sizes(rng, head_dim=8),
        **_experts(rng, "n_routed_experts"),
        first_k_dense_replace=1,
        moe_intermediate_size=8,
        use_qk_norm=rng.random() < 0.5,
        attention_bias=True,
        routed_scaling_factor=1.7,
    )


MODELS: dict[str, Make] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "llama with biases": _llama_with_biases,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "qwen3": _qwen3,
    "qwen3 with windows": _qwen3_with_windows,
    "qwen3_moe": _qwen3_moe,
    "olmo2": _olmo2,
    "gpt_oss": _gpt_oss,
    "deepseek_v3": _deepseek_v3,
    "deepseek_v3 with straight queries": _deepseek_v3_straight,
    "glm4_moe": _glm4_moe,
}


def make(name: str, seed: int = 0) -> nn.Module:
    """The model of `transformers`: fp32, eager, every weight random, none of them small or neutral."""
    from transformers import AutoModelForCausalLM

    config = MODELS[name](random.Random(f"{name}, {seed}"))
    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_config(config, **options).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(noise * tensor.shape[-1] ** -0.5 if tensor.ndim > 1 else 0.3 * noise)
        for label, tensor in model.named_parameters():
            if "norm" in label or "ln_" in label:
                tensor.add_(1.0 if label.endswith("weight") else 0.0)
    _restore_frequencies(model)
    return model


def _restore_frequencies(model: Any) -> None:
    """Rotary frequencies are buffers that follow from the configuration."""
    for module in model.modules():
        if hasattr(module, "original_inv_freq"):
            module.inv_freq.copy_(type(module)(module.config).inv_freq)


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(length))


def gradient_differences(
    theirs: Any, ours: Decoder, tokens_BT: torch.Tensor, folder: Path
) -> dict[str, float]:
    """Of the mean loss, by norm and tensor, over the norm of ours.

    Theirs are saved to `folder` as if they were weights, and read through the mapping. A tensor whose
    gradient is but rounding (the biases of keys: added to all keys, they move all scores of a query alike) is
    compared with the norm over all tensors.
    """
    targets = tokens_BT.roll(-1, 1)
    targets[:, -1] = IGNORED
    theirs.zero_grad()
    ours.zero_grad()
    logits = theirs(tokens_BT).logits
    F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED).backward()
    loss, num_targets = ours(tokens_BT, targets)
    (loss / num_targets).backward()
    weights = {name: parameter.detach().clone() for name, parameter in theirs.named_parameters()}
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad if parameter.grad is not None else 0.0)
        save(theirs, folder)
        for name, parameter in theirs.named_parameters():
            parameter.copy_(weights[name])
    expected = open_published(folder).tensors
    found = {name: cast(torch.Tensor, parameter.grad) for name, parameter in ours.named_parameters()}
    total = torch.stack([gradient.norm() for gradient in found.values()]).norm()
    return {
        name: float((gradient - expected[name].read()).norm() / max(gradient.norm(), 1e-2 * total))
        for name, gradient in found.items()
    }


def save(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder


def load(folder: Path) -> Decoder:
    """Ours, from a Hugging Face folder."""
    opened = open_published(folder)
    model = Decoder(opened.arch)
    Weights(folder, opened.arch, folder, opened.tensors).load_into(model)
    return model.eval()


def as_json(tree: dict[str, Any]) -> bytes:
    return json.dumps(tree).encode()


def tokenizer(folder: Path) -> JsonTokenizer:
    """Writes a tokenizer of letters and two special tokens: two fewer than the models have."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    letters = {letter: index for index, letter in enumerate("abcdefghijklmnopqrstuvwxyz0123456789")}
    made = tokenizers.Tokenizer(models.BPE(letters, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    found = JsonTokenizer(made.to_str(), len(letters), len(letters) + 1)
    found.save(folder)
    return found
