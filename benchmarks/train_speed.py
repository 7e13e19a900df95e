"""Training throughput of a model of 12M parameters, beside `transformers` on the same shapes.

On a GPU the model has 0.6 billion, steps have 4 sequences of 4,096 tokens, and shares are of products of
8,192.

Both take whole steps: forward, backward, gradients clipped by their norm, fused AdamW; 8 sequences of 512
tokens. Each first looks for its best setting here: ours compiled or not; the peer in fp32 or under bf16
autocast, with either of its attentions, the best two of these compiled as well. bf16 is left out where its
products are slower than those of fp32. A second peer keeps its weights in bf16 alone: less exact training
(ours always keeps fp32 weights), and less work. Then they take steps in turns, and before every turn square
products of 1024 are timed by type: what a step reaches is given as a share of the best of them, in the same
turn. Figures are medians over the turns.

FLOPs: "model" counts 6 x the matrices (with the output head) and attention over the causal half of the
square, the convention of MFU; "full square" counts the whole square, as PyTorch's own counter would. The
goal is held against the first, which is the lower.

    python -m benchmarks.train_speed [--quick] [--out FILE] [--turns N] [--threads N]
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from colossus.architecture import Architecture, num_parameters
from colossus.data.loader import Batch
from colossus.job import Job
from colossus.measure.machine import this_machine
from colossus.parallel.binaries import choose_cache
from colossus.parallel.world import World
from colossus.perf.flops import executed_flops_per_token, model_flops_per_token
from colossus.perf.receipts import Figure, print_figures, write_receipt
from colossus.precision import torch_type
from colossus.trainer.state import TrainState
from colossus.trainer.step import train_step

LR, WEIGHT_DECAY, BETAS, EPS, CLIP = 1e-3, 0.1, (0.9, 0.95), 1e-8, 1.0
FAST_BF16 = 1.5  # so many times as quick as fp32 in products: goals are those of such a processor
TURN_STEPS = 2


@dataclass(frozen=True)
class Setting:
    """type: "fp32" or "bf16", the peer's also "autocast". attention: of the peer, "sdpa" or "eager"."""

    type: str
    compile: bool
    attention: str = ""

    def __str__(self) -> str:
        attention = f", {self.attention} attention" if self.attention else ""
        return f"{self.type}{attention}, {'compiled' if self.compile else 'not compiled'}"


@dataclass
class Contestant:
    """Something that takes training steps, and what a few of them showed.

    step: takes one and returns its seconds. first_seconds: of the first, compilation included.
    """

    setting: Setting
    step: Callable[[], float]
    first_seconds: float = math.inf
    seconds: float = math.inf

    def try_out(self, steps: int) -> None:
        """The quickest of so many steps, after two that warm up."""
        self.first_seconds = self.step()
        self.step()
        self.seconds = min(self.step() for _ in range(steps))
        print(
            f"  {self.setting}: {self.seconds:.3f} s a step, the first {self.first_seconds:.1f} s", flush=True
        )


@dataclass(frozen=True)
class Shape:
    """What both train."""

    arch: Architecture
    sequences: int  # of a step

    @property
    def num_tokens(self) -> int:
        return self.sequences * self.arch.max_seq_len

    def ids(self, device: torch.device) -> torch.Tensor:
        """Random tokens and one more a sequence."""
        generator = torch.Generator().manual_seed(0)
        size = (self.sequences, self.arch.max_seq_len + 1)
        return torch.randint(self.arch.vocab_size, size, generator=generator).to(device)


def shape(quick: bool, device: str) -> Shape:
    width, layers, ffn, sequences, seq_len = (64, 2, 192, 2, 128) if quick else (384, 6, 1024, 8, 512)
    if device == "cuda" and not quick:
        width, layers, ffn, sequences, seq_len = (2048, 8, 8192, 4, 4096)
    arch = Architecture(
        vocab_size=32_000 if device == "cuda" else 4096,
        hidden_size=width,
        num_layers=layers,
        num_heads=width // 64,
        num_kv_heads=width // 64,
        head_dim=64,
        intermediate_size=ffn,
        max_seq_len=seq_len,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        tie_embeddings=True,
        qk_norm=False,
        initializer_range=0.02,
    )
    return Shape(arch, sequences)


def ours(shape: Shape, setting: Setting) -> Contestant:
    """This project's own training step."""
    values = {f"model.{name}": value for name, value in shape.arch.model_dump(exclude_none=True).items()} | {
        "optimizer.name": "adamw",
        "optimizer.lr": LR,
        "optimizer.weight_decay": WEIGHT_DECAY,
        "optimizer.beta1": BETAS[0],
        "optimizer.beta2": BETAS[1],
        "optimizer.eps": EPS,
        "optimizer.grad_clip": CLIP,
        "optimizer.z_loss": 0.0,
        "layout.compile": setting.compile,
        "layout.micro_batch": shape.sequences,
        "layout.recompute": "none",
        "precision.type": setting.type,
        "run.seed": 0,
    }
    job = Job().put(values, "argument")
    device = torch.device(this_machine().device)
    world = World(0, 1, device)
    state = TrainState.build(job, world)
    ids_BT, num = shape.ids(device), shape.num_tokens
    batch = Batch(0, 0, ids_BT[:, :-1].contiguous(), ids_BT[:, 1:].contiguous(), None, num, num)

    def step() -> float:
        started = time.perf_counter()
        train_step(state, batch, num, 1.0, job, world)
        finish(device)
        return time.perf_counter() - started

    return Contestant(setting, step)


def finish(device: torch.device) -> None:
    """Waits for what a GPU still does."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def peer(shape: Shape, setting: Setting) -> Contestant:
    """The usual training step around `transformers`' Llama."""
    torch.manual_seed(0)
    arch = shape.arch
    config = LlamaConfig(
        vocab_size=arch.vocab_size,
        hidden_size=arch.hidden_size,
        num_hidden_layers=arch.num_layers,
        num_attention_heads=arch.num_heads,
        intermediate_size=arch.intermediate_size,
        max_position_embeddings=arch.max_seq_len,
        rms_norm_eps=arch.norm_eps,
        tie_word_embeddings=arch.tie_embeddings,
        use_cache=False,
        attn_implementation=setting.attention,  # type: ignore[call-arg]
    )
    device = torch.device(this_machine().device)
    model = LlamaForCausalLM(config).train().to(device)
    if setting.type == "bf16":
        model = model.to(torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == num_parameters(arch)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True
    )
    choose_cache()  # else binaries of other instructions than this process is held to may be loaded
    forward = torch.compile(model, dynamic=False) if setting.compile else model
    ids_BT = shape.ids(device)[:, :-1].contiguous()

    def step() -> float:
        started = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=setting.type == "autocast"):
            loss = forward(input_ids=ids_BT, labels=ids_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        finish(device)
        return time.perf_counter() - started

    return Contestant(setting, step)


def tried(
    make: Callable[[Shape, Setting], Contestant], shape: Shape, settings: Iterable[Setting], steps: int
) -> list[Contestant]:
    """All of them, the quickest first."""
    contestants = []
    for setting in settings:
        contestants.append(make(shape, setting))
        contestants[-1].try_out(steps)
    return sorted(contestants, key=lambda contestant: contestant.seconds)


def product_rate(dtype: torch.dtype, seconds: float = 0.15) -> float:
    """FLOP/s of square products: the quickest of those that fit into `seconds`."""
    device = torch.device(this_machine().device)
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        started = time.perf_counter()
        torch.mm(left, right, out=out)
        finish(device)
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times)


def measure(quick: bool, turns: int) -> list[Figure]:
    machine, steps = this_machine(), 1 if quick else 3
    size, cuda = shape(quick, machine.device), machine.device == "cuda"
    bf16 = cuda or machine.best.type == "bf16"
    compile_too = machine.compiler is not None and not quick

    def best_peer(types: Iterable[str]) -> Contestant:
        attentions = ("sdpa",) if cuda else ("sdpa", "eager")
        plain = [Setting(t, False, attention) for t in types for attention in attentions]
        found = tried(peer, size, plain, steps)
        if compile_too:
            quickest = [replace(contestant.setting, compile=True) for contestant in found[: 1 if cuda else 2]]
            found = sorted([found[0], *tried(peer, size, quickest, steps)], key=lambda c: c.seconds)
        return found[0]

    print("transformers")
    peers = [best_peer(("autocast",) if cuda else ("fp32", "autocast") if bf16 else ("fp32",))]
    if bf16:
        peers.append(best_peer(("bf16",)))
    print("colossus")
    best = "bf16" if bf16 else machine.best.type
    settings = [Setting(best, compile_) for compile_ in (False, True)[: 1 + compile_too]]
    mine = tried(ours, size, settings, steps)[0]
    return in_turns(mine, peers, size, {"bf16"} if cuda else {"fp32", best}, turns)


def in_turns(
    mine: Contestant, peers: list[Contestant], size: Shape, types: Iterable[str], turns: int
) -> list[Figure]:
    """The figures of steps taken one after the other; peers: the first is the one that goals are about."""
    rates: dict[str, list[float]] = {name: [] for name in sorted(types)}
    rows: list[list[float]] = []  # of a turn: the best product rate, tokens/s of ours and of each peer
    for _ in range(turns):
        for name, found in rates.items():
            found.append(product_rate(torch_type(name)))
        seconds = [min(contestant.step() for _ in range(TURN_STEPS)) for contestant in (mine, *peers)]
        rows.append([max(found[-1] for found in rates.values()), *(size.num_tokens / s for s in seconds)])

    def median(of: Callable[[list[float]], float]) -> float:
        return statistics.median(of(row) for row in rows)

    model = model_flops_per_token(size.arch, size.arch.max_seq_len)
    full = executed_flops_per_token(size.arch, size.arch.max_seq_len)
    product = {name: statistics.median(found) for name, found in rates.items()}
    fast_bf16 = product.get("bf16", 0.0) > FAST_BF16 * product.get("fp32", 0.0)
    our_rate, our_share = median(lambda row: row[1]), median(lambda row: row[1] / row[0])
    figures = [
        Figure("parameters", num_parameters(size.arch), "parameters"),
        *(Figure(f"square products in {name}", rate, "FLOP/s") for name, rate in product.items()),
        Figure(f"training ({mine.setting})", our_rate, "tokens/s"),
        Figure("first step, with compilation", mine.first_seconds, "s"),
        Figure("model FLOPs", our_rate * model, "FLOP/s"),
        Figure(
            "MFU: model FLOPs over the best product rate",
            our_share * model,
            "",
            ">= 0.6" if fast_bf16 else None,
        ),
        Figure("full-square FLOPs over the best product rate", our_share * full, ""),
    ]
    goal = ">= 1.15 x the peer" if fast_bf16 else ">= 1.05 x the peer"
    for index, contestant in enumerate(peers):
        name = f"training against transformers ({contestant.setting})"
        ratio = median(lambda row, i=2 + index: row[1] / row[i])  # type: ignore[misc]
        their_rate = median(lambda row, i=2 + index: row[i])  # type: ignore[misc]
        figures.append(Figure(name, our_rate, "tokens/s", goal if index == 0 else None, their_rate, ratio))
        figures.append(Figure("its first step, with compilation", contestant.first_seconds, "s"))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a small model, nothing compiled")
    parser.add_argument("--out", help="the receipt")
    parser.add_argument("--turns", type=int, default=None, help="default: 12; 3 if quick")
    parser.add_argument("--threads", type=int, default=None, help="default: the quickest number")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads or this_machine().best.threads)
    found = measure(arguments.quick, arguments.turns or (3 if arguments.quick else 12))
    print_figures(found)
    write_receipt("train_speed", found, arguments.out, this_machine().to_dict())


if __name__ == "__main__":
    main()
