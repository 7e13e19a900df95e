"""Mixtures of experts: the speed of a layer beside `transformers`' Mixtral, and how alike loads stay.

Speed: forward and backward of one layer (router and experts) on the same tokens, in turns; for each the best
of its settings. The peer's are its implementations of experts ("eager", "grouped_mm") in fp32 and, where its
products are quicker, under bf16 autocast; ours keeps fp32 weights too. A second peer keeps its weights in
bf16 alone: less exact training, and less work. Each is timed in wall-clock time, and the best of a turn counts.

Balance: a small language model on the corpus of the default job, by each method that keeps loads alike, and by
none. The load is that of the busiest expert over the mean, in the worst layer: of the visits in the last fifth
of the steps, counted together; beside it the mean over the same steps, each by itself. The loss is the mean
over these steps.

    python -m benchmarks.moe [--quick] [--out FILE] [--part PART] [--turns N] [--threads N] [--steps N] [--seeds N] [--set NAME ...]
"""  # noqa: E501

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import cast

import torch
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from colossus import api
from colossus.architecture import Architecture, Experts
from colossus.data.loader import Batches
from colossus.data.order import BatchSchedule
from colossus.data.prepare import prepare_data
from colossus.data.sources import TrainingData
from colossus.job import Job, load_job
from colossus.measure.machine import this_machine
from colossus.models import Decoder
from colossus.models.experts import MoE
from colossus.parallel.binaries import choose_cache
from colossus.parallel.world import World
from colossus.perf.receipts import Figure, print_figures, write_receipt
from colossus.trainer.balance import Balance
from colossus.trainer.state import TrainState
from colossus.trainer.step import train_step

SPEED_GOAL, LOAD_GOAL = 1.3, 1.3
METHODS: dict[str, dict[str, object]] = {
    "none": {"balance_loss": 0.0},
    "loss over the batch": {},
    "loss over sequences": {"balance_over": "sequence"},
    "selection bias": {"balance_loss": 0.0, "selection_bias": True},
}


@dataclass(frozen=True)
class Shape:
    """Of a layer of experts, and of the tokens that it is given."""

    model: int = 512
    ffn: int = 1024
    experts: int = 8
    per_token: int = 2
    rows: int = 8
    tokens: int = 512


@dataclass
class Contestant:
    """A layer that computes forward and backward: `step` returns its seconds."""

    name: str
    step: Callable[[], float]
    seconds: float = float("inf")


def ours(shape: Shape, dtype: torch.dtype, compiled: bool = False) -> Contestant:
    """Our layer: fp32 weights, products in `dtype`, every term of the balance computed."""
    layer = MoE(architecture(shape))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.02)
        layer.router.shares.fill_(1 / shape.experts)
    if compiled:
        choose_cache()
        layer.compile(dynamic=False)
    share_B = torch.full((shape.rows,), 1 / (shape.rows * shape.tokens))
    name = f"{str(dtype).removeprefix('torch.')}{', compiled' if compiled else ''}"
    return Contestant(name, timed(layer, lambda x_BTD: layer(x_BTD, share_B)[0], shape, dtype))


def architecture(shape: Shape) -> Architecture:
    return Architecture(
        vocab_size=256,
        hidden_size=shape.model,
        num_layers=1,
        num_heads=8,
        num_kv_heads=8,
        head_dim=shape.model // 8,
        intermediate_size=shape.ffn,
        max_seq_len=shape.tokens,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        tie_embeddings=True,
        qk_norm=False,
        initializer_range=0.02,
        experts=Experts(num_experts=shape.experts, per_token=shape.per_token),
    )


def peer(shape: Shape, implementation: str, type: str) -> Contestant:
    """transformers' layer. type: "fp32", "autocast" (fp32 weights) or "bf16" (all of it)."""
    config = MixtralConfig(
        hidden_size=shape.model,
        intermediate_size=shape.ffn,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.per_token,
    )
    config._experts_implementation = implementation
    layer = MixtralSparseMoeBlock(config)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.02)
    dtype = torch.bfloat16 if type == "bf16" else torch.float32
    layer = layer.to(dtype)

    def forward(x_BTD: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=type == "autocast"):
            return layer(x_BTD)  # type: ignore[no-any-return]

    return Contestant(f"{implementation}, {type}", timed(layer, forward, shape, dtype))


def timed(
    layer: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor], shape: Shape, dtype: torch.dtype
) -> Callable[[], float]:
    draw = torch.Generator().manual_seed(0)
    x_BTD = torch.randn(shape.rows, shape.tokens, shape.model, generator=draw).to(dtype).requires_grad_()
    grad_BTD = torch.randn(x_BTD.shape, generator=draw).to(dtype)

    def step() -> float:
        started = time.perf_counter()
        y_BTD = forward(x_BTD)
        y_BTD.backward(grad_BTD.to(y_BTD.dtype))
        seconds = time.perf_counter() - started
        layer.zero_grad(set_to_none=True)
        x_BTD.grad = None
        return seconds

    return step


def speed(quick: bool, turns: int) -> list[Figure]:
    """Tokens/s of ours beside the best of the peer's settings."""
    shape = Shape(model=64, ffn=128, rows=2, tokens=128) if quick else Shape()
    bf16 = this_machine().best.type == "bf16"
    dtypes = [torch.float32, torch.bfloat16] if bf16 else [torch.float32]
    compiled = this_machine().compiler is not None and not quick
    mine = best([ours(shape, d, c) for d in dtypes for c in ((False, True) if compiled else (False,))])
    kinds = ("eager", "grouped_mm")
    peers = [best([peer(shape, k, t) for k in kinds for t in (("fp32", "autocast") if bf16 else ("fp32",))])]
    if bf16:
        peers.append(best([peer(shape, kind, "bf16") for kind in kinds]))
    fp32 = [best([ours(shape, torch.float32)]), best([peer(shape, kind, "fp32") for kind in kinds])]
    rows = [[min(c.step() for _ in range(2)) for c in (mine, *peers, *fp32)] for _ in range(turns)]
    tokens = shape.rows * shape.tokens

    def compared(name: str, ours: int, theirs: int, goal: str | None) -> Figure:
        our_rate, their_rate = (statistics.median(tokens / row[i] for row in rows) for i in (ours, theirs))
        ratio = statistics.median(row[theirs] / row[ours] for row in rows)
        return Figure(name, our_rate, "tokens/s", goal, their_rate, ratio)

    goal = f">= {SPEED_GOAL} x the peer"
    figures = [
        compared(f"a layer ({mine.name}) against transformers ({p.name})", 0, 1 + i, None if i else goal)
        for i, p in enumerate(peers)
    ]
    names = f"a layer ({fp32[0].name}) against transformers ({fp32[1].name})"
    return [*figures, compared(names, 1 + len(peers), 2 + len(peers), None)]


def best(contestants: list[Contestant]) -> Contestant:
    for contestant in contestants:
        contestant.step()
        contestant.seconds = min(contestant.step() for _ in range(3))
        print(f"  {contestant.name}: {1e3 * contestant.seconds:.1f} ms", flush=True)
    return min(contestants, key=lambda contestant: contestant.seconds)


def trial_job(method: dict[str, object], seed: int, steps: int, quick: bool) -> Job:
    """A small language model with experts in every layer."""
    width, layers, rows = (32, 2, 2) if quick else (128, 4, 8)
    values: dict[str, object] = {
        "model.hidden_size": width,
        "model.num_layers": layers,
        "data.seq_len": 128,
        "run.steps": steps,
        "run.global_batch": rows,
        "run.seed": seed,
        "run.threads": torch.get_num_threads(),
        "layout.micro_batch": rows,
        "layout.compile": "false",
        "precision.type": "fp32",
    }
    experts = {"num_experts": 8, "per_token": 2, **method}
    words = [f"{name}={value}" for name, value in values.items()]
    words += [f"model.experts.{name}={str(value).lower()}" for name, value in experts.items()]
    return api.resolve(load_job(None, words))


class Counting(Balance):
    """Keeps the visits of every step: of each layer in turn, [X]."""

    def __init__(self, model: Decoder) -> None:
        super().__init__(model)
        self.visits_SLX: list[torch.Tensor] = []

    def update(self, loads: torch.Tensor, *, move: bool | torch.Tensor) -> None:
        self.visits_SLX.append(loads.view(len(self._routers), -1)[:, :-3].clone())
        super().update(loads, move=move)

    def load(self, last: int) -> float:
        """Of the busiest expert over the mean in the worst layer, in so many last steps together."""
        visits_LX = torch.stack(self.visits_SLX[-last:]).sum(0)
        return float((visits_LX.amax(1) / visits_LX.mean(1)).max())


def train(job: Job, name: str) -> tuple[float, float, float]:
    """Over the last fifth of the steps: the load of the busiest expert in all of them, its mean over single
    steps, and the mean loss."""
    job = prepare_data(job)
    world, schedule = World(0, 1, torch.device("cpu")), BatchSchedule(job.run.batch_schedule)
    data = TrainingData.open(job, schedule)
    state, steps = TrainState.build(job, world), job.run.steps or 0
    state.balance = counting = Counting(cast(Decoder, state.model))
    losses, loads = [], []
    with Batches(data.train, data.order, schedule, micro_batch=job.layout.micro_batch) as batches:
        for number in range(steps):
            batch = batches.next(number)
            factor = min(1.0, (number + 1) / job.optimizer.warmup_steps, 2 * (steps - number) / steps)
            result = train_step(state, batch, batch.num_targets, factor, job, world)
            assert result.experts is not None and result.loss is not None
            losses.append(result.loss)
            loads.append(result.experts.expert_load)
            if (number + 1) % 50 == 0:
                print(
                    f"  {name}, step {number + 1}: loss {result.loss:.3f}, {asdict(result.experts)}",
                    flush=True,
                )
    last = max(1, steps // 5)
    return counting.load(last), statistics.mean(loads[-last:]), statistics.mean(losses[-last:])


def balance(quick: bool, steps: int, seeds: int, methods: dict[str, dict[str, object]]) -> list[Figure]:
    """Loads and losses by method, means over seeds; the losses beside that of no balancing."""
    figures, unbalanced = [], 0.0
    for name, method in methods.items():
        found = [
            train(trial_job(method, seed, steps, quick), f"{name}, seed {seed}") for seed in range(seeds)
        ]
        load, of_steps, loss = (statistics.mean(values) for values in zip(*found, strict=True))
        print(f"{name} {method}: load {load:.3f}, loss {loss:.4f}; by seed {found}", flush=True)
        is_none = name == "none"
        unbalanced = loss if is_none else unbalanced
        figures.append(Figure(f"load, {name}", load, "", None if is_none else f"<= {LOAD_GOAL}"))
        figures.append(Figure(f"load of single steps, {name}", of_steps, ""))
        beside = (None, None) if is_none or not unbalanced else (unbalanced, loss / unbalanced)
        goal = None if beside[0] is None else "<= 1.01 x without balancing"
        figures.append(Figure(f"loss, {name}", loss, "nats", goal, *beside))
    return figures


def tried(words: list[str]) -> dict[str, dict[str, object]]:
    """The methods, or one of them with other values: `NAME field=value ...`."""
    if not words:
        return METHODS
    values = {key: float(value) for key, _, value in (word.partition("=") for word in words[1:])}
    return {words[0]: METHODS[words[0]] | values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="small shapes, few steps, nothing compiled")
    parser.add_argument("--out", help="the receipt")
    parser.add_argument("--part", choices=("speed", "balance"), help="default: both")
    parser.add_argument("--turns", type=int, default=None, help="default: 12; 3 if quick")
    parser.add_argument("--threads", type=int, default=None, help="default: the quickest number")
    parser.add_argument("--steps", type=int, default=None, help="of a training; default: 500; 10 if quick")
    parser.add_argument("--seeds", type=int, default=None, help="default: 2; 1 if quick")
    parser.add_argument("--set", nargs="+", default=[], help="one method, and values of its own")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads or this_machine().best.threads)
    quick, found = arguments.quick, []
    if arguments.part != "balance":
        found += speed(quick, arguments.turns or (3 if quick else 12))
    if arguments.part != "speed":
        steps, seeds = arguments.steps or (10 if quick else 500), arguments.seeds or (1 if quick else 2)
        found += balance(quick, steps, seeds, tried(arguments.set))
    print_figures(found)
    write_receipt("moe", found, arguments.out, this_machine().to_dict())


if __name__ == "__main__":
    main()
