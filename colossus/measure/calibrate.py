"""Times the operations of training on this machine, over the shapes that models have, into a table that
predictions read (`hardware.calibration`).

A processor's speed wanders, so there a product is timed before and after each probe, and seconds are those of
a processor that makes it at its best rate. Operations are those of the trainer: the same products, attention,
loss and update, and whole layers, whose rest beside products and attention is what lies between them.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import product as pairs
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from colossus.hardware.calibration import Calibration, Timing, layer_arch
from colossus.hardware.machine import Machine, Rate
from colossus.measure.loopback import message_timings
from colossus.measure.machine import HOPELESS
from colossus.models.attend import attend
from colossus.models.block import Block
from colossus.models.decoder import Decoder
from colossus.models.grouped import grouped_product
from colossus.models.init import initialise
from colossus.models.loss import cross_entropy
from colossus.models.sight import sight
from colossus.precision.policy import TYPES
from colossus.words import rate

Say = Callable[[str], None]
Shapes = tuple[tuple[int, ...], ...]

# (inputs, outputs) of matrices
CPU_MATRICES: Shapes = ((64, 64), (128, 128), (128, 384), (256, 256), (256, 704), (704, 256), (256, 4096),
                        (512, 512), (512, 1408), (1408, 512), (768, 768), (768, 3072), (1024, 1024),
                        (512, 8192))  # fmt: skip
CPU_TOKENS = (256, 1024, 4096)
GPU_MATRICES: Shapes = ((768, 768), (768, 3072), (1024, 1024), (2048, 2048), (2048, 512), (2048, 8192),
                        (8192, 2048), (4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096), (8192, 8192),
                        (8192, 1024), (8192, 3584), (3584, 8192), (8192, 28672), (1792, 4096), (16384, 2048),
                        (2048, 16384), (16384, 6656), (6656, 16384), (16384, 16384),
                        (4096, 32768))  # fmt: skip
GPU_TOKENS = (1024, 2048, 4096, 8192, 16384)
# (experts, rows of each, inputs, outputs)
GROUPED: Shapes = (
    (8, 2048, 4096, 14336),
    (8, 512, 6144, 16384),
    (64, 512, 2048, 1024),
    (16, 2048, 2048, 1408),
    (32, 1024, 7168, 2048),
    (8, 4096, 7168, 2048),
    (8, 8192, 4096, 2048),
)
# (samples, queries, heads, width of a head)
CPU_ATTENTION: Shapes = ((4, 128, 4, 32), (8, 256, 4, 64), (2, 256, 2, 64), (4, 512, 6, 64), (1, 512, 8, 64),
                         (2, 1024, 8, 64), (2, 512, 8, 128), (1, 2048, 8, 64))  # fmt: skip
GPU_ATTENTION: Shapes = tuple((max(1, 16384 // t), t, 16, e) for t, e in
                              pairs((512, 1024, 2048, 4096, 8192, 16384, 32768), (64, 128)))  # fmt: skip
# (samples, tokens, width, heads) of whole layers
CPU_LAYERS: Shapes = (
    (2, 128, 128, 2),
    (8, 256, 128, 2),
    (2, 256, 256, 4),
    (8, 256, 256, 4),
    (4, 512, 512, 8),
)
GPU_LAYERS: Shapes = ((8, 1024, 1024, 16), (2, 4096, 2048, 32), (1, 8192, 4096, 32), (2, 8192, 8192, 64))
COMPILED_LAYERS = {"cpu": 4, "cuda": 3}  # so many of the first, and the others not: each costs half a minute
# (tokens, width, vocabulary)
CPU_LOSSES: Shapes = ((512, 128, 2048), (2048, 128, 4096), (2048, 256, 8192), (1024, 512, 32768))
GPU_LOSSES: Shapes = ((8192, 1024, 50304), (8192, 2048, 128256), (8192, 4096, 128256), (16384, 4096, 32000))
UPDATES = {"cpu": (2.0e5, 2.0e6, 2.0e7), "cuda": (1e7, 1e8, 1e9)}  # weights
COPIES = {"cpu": (2**16, 2**20, 2**24, 2**27), "cuda": (2**20, 2**24, 2**27, 2**30)}  # bytes
PROBE_SECONDS = {"cpu": 0.03, "cuda": 0.006}
LONG_SECONDS = {"cpu": 0.1, "cuda": 0.03}  # of whole layers, whose rest is a difference
HELD_SECONDS, HELD_SIZE = 3.0, 8192
ATTEMPTS = 4  # at a probe beside which the reference wandered by more than WANDERED
WANDERED = 0.08
REFERENCE_RUNS = 2
LAYER_FFN = 8 / 3  # of a layer's width, as Llama's


@dataclass
class _Bench:
    """Takes timings on one device."""

    machine: Machine
    timings: list[Timing] = field(default_factory=list)

    @property
    def device(self) -> str:
        return self.machine.device

    def add(self, key: tuple[str, str, str, str], shape: tuple[float, ...], seconds: float) -> None:
        """key: kind, variant, precision, phase."""
        self.timings.append(Timing(*key, shape, max(seconds, 1e-9)))

    def seconds(self, act: Callable[[], Any], budget: float | None = None) -> float:
        """Of one run: the median on a processor, at its best rate; on a GPU the quickest of rows of runs that
        are long enough for its clock."""
        budget = PROBE_SECONDS[self.device] if budget is None else budget
        act()
        if self.device == "cuda":
            return self._seconds_of_gpu(act, budget)
        best = self.machine.best
        attempts: list[tuple[float, float]] = []  # (how far the reference wandered, seconds at its best rate)
        for _ in range(ATTEMPTS):
            before = reference_rate(best)
            times: list[float] = []
            end = time.perf_counter() + budget
            while len(times) < 3 or time.perf_counter() < end:
                began = time.perf_counter()
                act()
                times.append(time.perf_counter() - began)
            after = reference_rate(best)
            rate = (before + after) / 2
            seconds = statistics.median(times) * rate / best.flops_per_second
            attempts.append((abs(before - after) / rate, seconds))
            if attempts[-1][0] < WANDERED:
                break
        return min(attempts)[1]

    def _seconds_of_gpu(self, act: Callable[[], Any], budget: float) -> float:
        act()
        torch.cuda.synchronize()
        rough = time.perf_counter()
        act()
        torch.cuda.synchronize()
        rough = time.perf_counter() - rough
        count = max(3, min(200, int(budget / 3 / max(rough, 1e-6))))
        best = float("inf")
        for _ in range(3):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(count):
                act()
            end.record()
            torch.cuda.synchronize()
            best = min(best, start.elapsed_time(end) / 1e3 / count)
        return best

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device=self.device).to(dtype)


def calibrate(machine: Machine, say: Say = lambda line: None, *, quick: bool = False) -> Calibration:
    """Times this machine's GPU, or its processor in each type that is not hopeless; some minutes.

    quick: few shapes and nothing compiled: for a look, not for predictions.
    """
    began, before = time.perf_counter(), torch.get_num_threads()
    threads = machine.best.threads
    bench = _Bench(machine)
    try:
        torch.set_num_threads(threads)
        for precision in _precisions(machine):
            say(f"products in {precision}")
            _products(bench, precision, quick)
            say(f"attention in {precision}")
            _attention(bench, precision, quick)
            say(f"loss in {precision}")
            _losses(bench, precision, quick, machine.compiler is not None and not quick)
            say(f"layers in {precision}")
            _layers(bench, precision, quick, machine.compiler is not None and not quick)
        if machine.device == "cuda":
            say("products in fp8, grouped products")
            _fp8_products(bench, quick)
            _grouped(bench, quick)
        say("updates and copies")
        _updates(bench, quick)
        _copies(bench)
        say("messages between ranks")
        bench.timings += message_timings(machine.device, _ranks(machine))
        held = _held(bench) if machine.device == "cuda" and not quick else 1.0
    finally:
        torch.set_num_threads(before)
    title = machine.gpus[0].name if machine.gpus else machine.processor
    return Calibration(
        device=machine.device,
        title=title,
        threads=threads,
        timings=tuple(bench.timings),
        versions=dict(machine.versions),
        date=time.strftime("%Y-%m-%d", time.gmtime()),
        seconds=round(time.perf_counter() - began, 1),
        held=held,
    )


def reference_rate(best: Rate, runs: int = REFERENCE_RUNS) -> float:
    """Mean FLOP/s of the product that was the quickest on the processor, now: speeds are shares of it."""
    left, right = (torch.ones(best.size, best.size, dtype=TYPES[best.type]) for _ in range(2))
    out = torch.empty_like(left)
    began = time.perf_counter()
    for _ in range(runs):
        torch.mm(left, right, out=out)
    return runs * 2.0 * best.size**3 / (time.perf_counter() - began)


def _ranks(machine: Machine) -> int:
    """That share this machine: its GPUs, or two on a processor; 1: there is nothing to time."""
    return len(machine.gpus) if machine.gpus else min(2, machine.cores)


def _precisions(machine: Machine) -> list[str]:
    if machine.device == "cuda":
        return ["bf16"]
    return [t for t in TYPES if machine.flops_per_second(t) > HOPELESS * machine.best.flops_per_second]


def _some(shapes: Shapes, quick: bool) -> Shapes:
    return shapes[:2] if quick else shapes


# ---------------------------------------------------------------------------------------- products


def _products(bench: _Bench, precision: str, quick: bool) -> None:
    """y = x W^T and both of its gradients, laid out as autograd has them."""
    cpu, dtype = bench.device == "cpu", TYPES[precision]
    matrices = _some(CPU_MATRICES if cpu else GPU_MATRICES, quick)
    for (inputs, outputs), tokens in pairs(matrices, CPU_TOKENS if cpu else GPU_TOKENS):
        x = bench.randn(tokens, inputs, dtype=dtype)
        w = bench.randn(outputs, inputs, dtype=dtype)
        g = bench.randn(tokens, outputs, dtype=dtype)
        forward, backward, weights = (
            bench.seconds(partial(F.linear, x, w)),
            bench.seconds(partial(torch.mm, g, w)),
            bench.seconds(partial(torch.mm, g.t(), x)),
        )
        bench.add(("product", "", precision, "forward"), (tokens, outputs, inputs, 1), forward)
        bench.add(("product", "", precision, "backward"), (tokens, inputs, outputs, 1), backward)
        bench.add(("product", "", precision, "weights"), (outputs, inputs, tokens, 1), weights)


def _fp8_products(bench: _Bench, quick: bool) -> None:
    """Row-major by column-major, which is all that the units take, with one scale a tensor."""
    if not hasattr(torch, "float8_e4m3fn") or torch.cuda.get_device_capability() < (8, 9):
        return
    one = torch.ones((), device="cuda")
    for (inputs, outputs), tokens in pairs(_some(GPU_MATRICES, quick), GPU_TOKENS[1::2]):
        for m, n, k in {(tokens, outputs, inputs), (outputs, inputs, tokens)}:
            x, w = (bench.randn(*s).to(torch.float8_e4m3fn) for s in ((m, k), (n, k)))

            def act(x: torch.Tensor = x, w: torch.Tensor = w) -> torch.Tensor:
                return torch._scaled_mm(x, w.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

            bench.add(("product", "", "fp8", ""), (m, n, k, 1), bench.seconds(act))


def _grouped(bench: _Bench, quick: bool) -> None:
    for experts, rows, inputs, outputs in _some(GROUPED, quick):
        x = bench.randn(experts * rows, inputs).requires_grad_()
        w = bench.randn(experts, outputs, inputs).requires_grad_()
        ends = torch.arange(1, experts + 1, device=bench.device, dtype=torch.int32) * rows
        y = grouped_product(x, w, ends)
        g = torch.randn_like(y)
        with torch.no_grad():
            forward = bench.seconds(partial(grouped_product, x, w, ends))
        both = bench.seconds(partial(torch.autograd.grad, y, (x, w), g, retain_graph=True))
        bench.add(("grouped", "", "bf16", "forward"), (rows, outputs, inputs, experts), forward)
        bench.add(("grouped", "", "bf16", "backward"), (rows, inputs, outputs, experts), both / 2)
        bench.add(("grouped", "", "bf16", "weights"), (outputs, inputs, rows, experts), both / 2)


# ---------------------------------------------------------------------------------------- attention


def _attention(bench: _Bench, precision: str, quick: bool) -> None:
    """As the trainer calls it; on a GPU by either of PyTorch's kernels."""
    cpu, dtype = bench.device == "cpu", TYPES[precision]
    kernels: dict[str, list[SDPBackend]] = {"": []}
    if not cpu:
        kernels = {"flash2": [SDPBackend.FLASH_ATTENTION], "hopper": [SDPBackend.CUDNN_ATTENTION]}
    for samples, tokens, heads, width in _some(CPU_ATTENTION if cpu else GPU_ATTENTION, quick):
        qkv = [bench.randn(samples, heads, tokens, width, dtype=dtype).requires_grad_() for _ in range(3)]
        shape = (tokens, tokens / 2, width, samples * heads)
        for variant, backends in kernels.items():
            with contextlib.suppress(RuntimeError):  # no such kernel for this shape, or on this part
                forward, backward = _attention_passes(bench, qkv, backends)
                bench.add(("attention", variant, precision, "forward"), shape, forward)
                bench.add(("attention", variant, precision, "backward"), shape, backward)


def _attention_passes(
    bench: _Bench, qkv: list[torch.Tensor], backends: list[SDPBackend]
) -> tuple[float, float]:
    """Seconds forward and backward."""
    with sdpa_kernel(backends) if backends else contextlib.nullcontext():
        y = attend(qkv[0], qkv[1], qkv[2])
        g = torch.randn_like(y)
        with torch.no_grad():
            forward = bench.seconds(partial(attend, qkv[0], qkv[1], qkv[2]))
        backward = bench.seconds(partial(torch.autograd.grad, y, qkv, g, retain_graph=True))
    return forward, backward


# ---------------------------------------------------------------------------------------- loss, layers


def _losses(bench: _Bench, precision: str, quick: bool, compiled: bool) -> None:
    """Loss and both gradients, products included: the shape is tokens, width, vocabulary."""
    shapes = _some(CPU_LOSSES if bench.device == "cpu" else GPU_LOSSES, quick)
    for tokens, width, vocabulary in shapes:
        x = bench.randn(tokens, width, dtype=TYPES[precision]).requires_grad_()
        w = bench.randn(vocabulary, width, dtype=torch.float32).mul_(0.02).requires_grad_()
        targets = torch.randint(vocabulary, (tokens,), device=bench.device)

        def act(x: torch.Tensor = x, w: torch.Tensor = w, targets: torch.Tensor = targets) -> None:
            cross_entropy(x, w, targets, compiled=compiled)[0].backward()
            x.grad = w.grad = None

        bench.add(("loss", "", precision, ""), (tokens, width, vocabulary), bench.seconds(act))


def _layers(bench: _Bench, precision: str, quick: bool, compiler: bool) -> None:
    """Whole layers, forward and backward: the shape is samples, tokens, width, heads, feed-forward width."""
    shapes = _some(CPU_LAYERS if bench.device == "cpu" else GPU_LAYERS, quick)
    for index, (samples, tokens, width, heads) in enumerate(shapes):
        arch = layer_arch(tokens, width, heads, 64 * round(LAYER_FFN * width / 64))
        with torch.device("meta"):
            model = Decoder(arch)
        model.to_empty(device=bench.device)
        initialise(model, arch, 0)
        layer = model.layers[0]
        assert isinstance(layer, Block)
        tokens_BT = torch.zeros(samples, tokens, dtype=torch.long, device=bench.device)
        seen = sight(arch, tokens_BT, None, None, torch.float32)
        x = bench.randn(samples, tokens, width, dtype=TYPES[precision]).requires_grad_()
        for variant in ("eager", "fused")[: 1 + (compiler and index < COMPILED_LAYERS[bench.device])]:
            if variant == "fused":
                torch._dynamo.reset()
                layer.compile(dynamic=False)
            forward, backward = _passes(bench, layer, x, seen)
            shape = (samples, tokens, width, heads, arch.intermediate_size)
            bench.add(("layer", variant, precision, "forward"), shape, forward)
            bench.add(("layer", variant, precision, "backward"), shape, backward)


def _passes(bench: _Bench, layer: nn.Module, x: torch.Tensor, seen: Any) -> tuple[float, float]:
    """Seconds of a forward pass, and of a backward pass as what both take beyond it."""

    def forward() -> torch.Tensor:
        return layer(x, seen)[0]

    g = torch.randn_like(forward())

    def both() -> None:
        forward().backward(g)
        x.grad = None
        layer.zero_grad(set_to_none=True)

    budget = LONG_SECONDS[bench.device]
    alone, whole = bench.seconds(forward, budget), bench.seconds(both, 2 * budget)
    return alone, max(whole - alone, 0.1 * alone)


# ---------------------------------------------------------------------------------------- updates, copies


def _updates(bench: _Bench, quick: bool) -> None:
    """Gradients clipped by their norm and fused AdamW, over 32 matrices."""
    for weights in UPDATES[bench.device][: 2 if quick else None]:
        rows = max(1, int(weights / 32 / 512))
        parameters = [nn.Parameter(torch.zeros(rows, 512, device=bench.device)) for _ in range(32)]
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 1e-3)
        optimizer = torch.optim.AdamW(parameters, fused=True)

        def act(parameters: list[nn.Parameter] = parameters, optimizer: Any = optimizer) -> None:
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

        bench.add(("update", "", "fp32", ""), (float(32 * rows * 512),), bench.seconds(act))
        del parameters, optimizer, act


def _copies(bench: _Bench) -> None:
    """Bytes read and written."""
    for size in COPIES[bench.device]:
        source = torch.ones(size // 4, device=bench.device)
        target = torch.empty_like(source)
        bench.add(("copy", "", "fp32", ""), (2.0 * size,), bench.seconds(partial(target.copy_, source)))


def _held(bench: _Bench) -> float:
    """What a large product keeps up for some seconds over what it reached among the others: power limits a
    GPU."""
    size = HELD_SIZE
    x, w = bench.randn(size, size), bench.randn(size, size)
    among = next(
        t.seconds for t in bench.timings if t.shape == (size, size, size, 1) and t.precision == "bf16"
    )
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < HELD_SECONDS:
        for _ in range(50):
            _ = x @ w
        torch.cuda.synchronize()
        count += 50
    return min(1.0, among / ((time.perf_counter() - began) / count))


def in_words(made: Calibration) -> str:
    """What was timed, and what came of it: one row a kind."""
    lines = [f"{made.title}: {len(made.timings)} timings in {made.seconds:.0f} s"]
    for kind in dict.fromkeys(timing.kind for timing in made.timings):
        mine = [timing for timing in made.timings if timing.kind == kind]
        words = f"  {kind:15} {len(mine):4} timings"
        if kind in ("product", "grouped"):
            for precision in dict.fromkeys(timing.precision for timing in mine):
                of = [2 * prod(t.shape) / t.seconds for t in mine if t.precision == precision]
                words += f"; {precision} {rate(min(of))} to {rate(max(of))}"
        lines.append(words)
    if made.held < 1:
        lines.append(f"  products keep up {100 * made.held:.0f}% of that for seconds on end")
    return "\n".join(lines)
