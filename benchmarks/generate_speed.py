"""Generation beside `transformers`: tokens/s of a Llama of 134M parameters with the same weights.

Greedy, a prompt of 128 tokens and 128 new ones, for one prompt and for 8 at once; times are of whole calls,
reading the prompt included. Ours takes the type that `colossus generate` takes on this machine, and is called
through `colossus.generate`, text and all. The peer is tried in fp32 and bf16, with either of its attentions,
on a shorter text, and once with its static cache (which it compiles; left out where that has no compiler);
the quickest is measured. Then both generate in turns; figures are of the quickest turn of each, which what
else runs on the machine disturbs least.

    python -m benchmarks.generate_speed [--quick] [--out FILE] [--turns N] [--threads N]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from colossus.architecture import Architecture, num_parameters
from colossus.data.tokenizer import Tokenizer
from colossus.generation import generate
from colossus.generation.ready import generation_type, make_ready
from colossus.measure.machine import this_machine
from colossus.models import Decoder, build
from colossus.perf.receipts import Figure, print_figures, write_receipt
from colossus.precision.policy import TYPES

GOAL = ">= 1.5 x the peer"
NAMES = (
    ("attention_norm", "input_layernorm"),
    ("mlp_norm", "post_attention_layernorm"),
    ("attention.w", "self_attn."),
    ("self_attn.q.", "self_attn.q_proj."),
    ("self_attn.k.", "self_attn.k_proj."),
    ("self_attn.v.", "self_attn.v_proj."),
    ("self_attn.o.", "self_attn.o_proj."),
    ("mlp.w_gate", "mlp.gate_proj"),
    ("mlp.w_up", "mlp.up_proj"),
    ("mlp.w_down", "mlp.down_proj"),
)
OUTSIDE = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
OUTSIDE |= {"head.weight": "lm_head.weight"}


@dataclass(frozen=True)
class Sizes:
    """Of the texts: tokens of a prompt, and new ones."""

    prompt: int
    new: int
    tried: int  # new ones where settings are tried out


@dataclass(frozen=True)
class Setting:
    """Of the peer. attention: "sdpa" or "eager"; static: its static cache, compiled."""

    type: str
    attention: str
    static: bool = False

    def __str__(self) -> str:
        return f"{self.type}, {self.attention} attention{', static cache' if self.static else ''}"


class Numbers:
    """A tokenizer whose texts are the ids themselves, and which no text ends before its length."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.bos_id, self.eos_id, self.fingerprint = vocab_size, 1, -1, "numbers"
        self.begins, self.begin_id, self.prefix_id, self.chats = (1,), 1, 1, None
        self.ends, self.byte_ids, self.special_tokens = frozenset[int](), frozenset[int](), dict[str, int]()

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f" {i}" for i in ids)

    def save(self, folder: Path) -> None:
        raise NotImplementedError


def architecture(quick: bool) -> Architecture:
    width, layers, ffn, vocab = (64, 2, 192, 512) if quick else (768, 12, 2048, 32_000)
    return Architecture(
        vocab_size=vocab,
        hidden_size=width,
        num_layers=layers,
        num_heads=width // 64,
        num_kv_heads=width // 64,
        head_dim=64,
        intermediate_size=ffn,
        max_seq_len=512,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        tie_embeddings=False,
        qk_norm=False,
        initializer_range=0.02,
    )


def peer_name(name: str) -> str:
    """What transformers calls a parameter of ours."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    for ours, theirs in NAMES:
        name = name.replace(ours, theirs)
    return f"model.{name}"


def peer_model(weights: dict[str, torch.Tensor], arch: Architecture, setting: Setting) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=arch.vocab_size,
        hidden_size=arch.hidden_size,
        num_hidden_layers=arch.num_layers,
        num_attention_heads=arch.num_heads,
        intermediate_size=arch.intermediate_size,
        max_position_embeddings=arch.max_seq_len,
        rms_norm_eps=arch.norm_eps,
        tie_word_embeddings=arch.tie_embeddings,
        attn_implementation=setting.attention,  # type: ignore[call-arg]
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict({peer_name(name): tensor for name, tensor in weights.items()})
    for parameter in model.parameters():
        parameter.data = parameter.data.to(TYPES[setting.type])
    return model.eval()


def peer_seconds(model: LlamaForCausalLM, setting: Setting, ids_BT: torch.Tensor, new: int) -> float:
    extra = {"cache_implementation": "static"} if setting.static else {}
    started = time.perf_counter()
    with torch.inference_mode():
        found = model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            **extra,
        )
    assert found.shape[1] == ids_BT.shape[1] + new
    return time.perf_counter() - started


def our_seconds(model: Decoder, ids_BT: torch.Tensor, new: int) -> float:
    tokenizer = Numbers(model.arch.vocab_size)
    prompts = [tokenizer.decode(row[1:]) for row in ids_BT.tolist()]
    started = time.perf_counter()
    texts = generate(model, cast(Tokenizer, tokenizer), prompts, max_tokens=new)
    seconds = time.perf_counter() - started
    assert all(len(text.split()) == new for text in texts)
    return seconds


def prompt_ids(arch: Architecture, batch: int, length: int) -> torch.Tensor:
    """Random, but for the first, which is ours to begin with."""
    ids_BT = torch.randint(2, arch.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    ids_BT[:, 0] = 1
    return ids_BT


def best_peer(
    weights: dict[str, torch.Tensor], arch: Architecture, batch: int, sizes: Sizes, static: bool
) -> tuple[Setting, Callable[[], float]]:
    """The quickest setting, and what takes its time once."""
    ids_BT = prompt_ids(arch, batch, sizes.prompt)
    found: list[tuple[float, Setting]] = []

    def try_out(setting: Setting) -> None:
        model = peer_model(weights, arch, setting)
        warm_up = sizes.tried if setting.static else 2
        peer_seconds(model, setting, ids_BT, warm_up)
        seconds = min(peer_seconds(model, setting, ids_BT, sizes.tried) for _ in range(2))
        found.append((seconds, setting))
        print(f"  {setting}: {batch * sizes.tried / seconds:.1f} tokens/s", flush=True)

    bf16 = generation_type(torch.device("cpu")) == torch.bfloat16
    for name in ("fp32", "bf16") if bf16 else ("fp32",):
        for attention in ("sdpa", "eager"):
            try_out(Setting(name, attention))
    quickest = min(found, key=lambda pair: pair[0])[1]
    if static:
        try_out(Setting(quickest.type, "sdpa", static=True))
    setting = min(found, key=lambda pair: pair[0])[1]
    model = peer_model(weights, arch, setting)
    peer_seconds(model, setting, ids_BT, sizes.tried if setting.static else 2)
    return setting, lambda: peer_seconds(model, setting, ids_BT, sizes.new)


def measure(quick: bool, turns: int) -> list[Figure]:
    arch, machine = architecture(quick), this_machine()
    sizes = Sizes(16, 8, 4) if quick else Sizes(128, 128, 24)
    dtype = generation_type(torch.device("cpu"))
    model = build(arch, seed=0).eval()
    weights = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    started = time.perf_counter()
    make_ready(model, dtype)
    figures = [
        Figure("parameters", num_parameters(arch), "parameters"),
        Figure("making a loaded model ready", time.perf_counter() - started, "s"),
    ]
    static = machine.compiler is not None and not quick
    for batch in (1, 8):
        print(f"transformers, {batch} at once")
        setting, peer = best_peer(weights, arch, batch, sizes, static and batch == 1)
        ids_BT = prompt_ids(arch, batch, sizes.prompt)
        our_seconds(model, ids_BT, 2)
        rows = [(our_seconds(model, ids_BT, sizes.new), peer()) for _ in range(turns)]
        ours, theirs = (batch * sizes.new / min(column) for column in zip(*rows, strict=True))
        name = str(dtype).removeprefix("torch.").replace("bfloat16", "bf16").replace("float32", "fp32")
        figures.append(
            Figure(
                f"{batch} at once ({name}) against transformers ({setting})",
                ours,
                "tokens/s",
                None if quick else GOAL,
                theirs,
                ours / theirs,
            )
        )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a small model, short texts")
    parser.add_argument("--out", help="the receipt")
    parser.add_argument("--turns", type=int, default=None, help="default: 5; 2 if quick")
    parser.add_argument("--threads", type=int, default=None, help="default: the quickest number")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads or this_machine().best.threads)
    found = measure(arguments.quick, arguments.turns or (2 if arguments.quick else 5))
    print_figures(found)
    write_receipt("generate_speed", found, arguments.out, this_machine().to_dict())


if __name__ == "__main__":
    main()
