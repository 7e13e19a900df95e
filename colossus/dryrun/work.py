"""What a rank does in a step, operation by operation: products, attention, messages; and in which pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, NamedTuple

import torch

import colossus.models.grouped  # noqa: F401 (makes the operators)
from colossus.dryrun import attention

aten, ours = torch.ops.aten, torch.ops.colossus
Side = Literal["forward", "backward", "weights"]
TYPES = {torch.bfloat16: "bf16", torch.float16: "bf16", torch.float8_e4m3fn: "fp8", torch.float8_e5m2: "fp8"}


class Pass(NamedTuple):
    """A stage's work on a micro batch, as `perf.schedule.Action`; with none, what a step does once.

    work: "F", "B", "I" or "W"; "": by the phase that the program is in.
    """

    work: str = ""
    stage: int = 0
    micro_batch: int = -1

    def in_phase(self, phase: str) -> Pass:
        """What is done in `phase` while this is under way."""
        if self.work or self.micro_batch < 0:
            return self
        if phase not in ("forward", "backward", "recompute"):
            return ONCE
        return self._replace(work="F" if phase == "forward" else "B")


ONCE = Pass()
FSDP_STREAMS = {
    ("fsdp", "_allgather_base_"): "all_gather",
    ("efsdp", "_allgather_base_"): "all_gather",
    ("fsdp", "_reduce_scatter_base_"): "reduce_scatter",
    ("efsdp", "_reduce_scatter_base_"): "reduce_scatter",
    ("dp_replicate", "allreduce_"): "all_reduce",
}


def stream_of(axis: str, operation: str) -> str:
    """What carries this on a GPU: FSDP has a stream for each of its operations (torch 2.11 to 2.13,
    `FSDPCommContext`); what layers, pipelines and the step's end say runs on that of their group."""
    own = FSDP_STREAMS.get((axis, operation))
    return axis if own is None else f"fsdp.{own}"


@dataclass(frozen=True)
class Message:
    """What one rank says to others of `group`: `num_bytes` are of the full tensor, as in `perf.ledger`.

    stride: from one of its ranks to the next. apart: whether FSDP says it, beside the layers; else a layer
    waits for it.
    """

    phase: str
    operation: str
    group: str
    size: int
    num_bytes: int
    peer: int | None = None
    stride: int = 1
    apart: bool = True


@dataclass(frozen=True)
class Product:
    """`count` matrix products [m, k] x [k, n]; of attention m queries, n keys, k the width of a query, and
    `met` the keys that a query takes the time of, in the mean.

    kind: "product", "grouped" (of experts) or "attention". phase: of the program: "forward", "recompute",
    "backward", "update". side: what it is to its layer: a product of the forward pass, or makes the gradient
    of an input, or of weights. flops: as PyTorch's counter has them.
    """

    phase: str
    kind: Literal["product", "grouped", "attention"]
    side: Side
    precision: str
    m: float
    n: float
    k: float
    count: float
    flops: int
    met: float = 0.0


Work = Product | Message


def product_of(operator: Any, args: tuple[Any, ...], flops: int, phase: str) -> Product:
    """Of an operator that PyTorch's counter knows."""
    assert operator in _SHAPES, f"the shape of {operator} is not known: see dryrun/work.py"
    shape = _SHAPES[operator](*args)
    side = "backward" if phase == "backward" and shape.side == "forward" else shape.side
    type_ = next(arg.dtype for arg in args if isinstance(arg, torch.Tensor))
    precision = TYPES.get(type_, "fp32")
    return Product(
        phase, shape.kind, side, precision, shape.m, shape.n, shape.k, shape.count, flops, shape.met
    )  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Of a `Product`."""

    kind: Literal["product", "grouped", "attention"]
    side: Side
    m: float
    n: float
    k: float
    count: float
    met: float = 0.0


def _mm(left: torch.Tensor, right: torch.Tensor, *_: Any) -> Shape:
    """The gradient of weights is a product whose left side is turned: of outputs' gradients."""
    (m, k), n = left.shape, right.shape[1]
    turned = m > 1 and k > 1 and left.stride(0) == 1
    return Shape("product", "weights" if turned else "forward", m, n, k, 1)


def _bmm(left: torch.Tensor, right: torch.Tensor, *_: Any) -> Shape:
    count, m, k = left.shape
    return Shape("product", "forward", m, right.shape[2], k, count)


def _grouped(x_MI: torch.Tensor, w_XOI: torch.Tensor, *_: Any) -> Shape:
    count, n, k = w_XOI.shape
    return Shape("grouped", "forward", x_MI.shape[0] / count, n, k, count)


def _grouped_outer(g_MO: torch.Tensor, x_MI: torch.Tensor, ends_X: torch.Tensor, *_: Any) -> Shape:
    count = len(ends_X)
    return Shape("grouped", "weights", g_MO.shape[1], x_MI.shape[1], g_MO.shape[0] / count, count)


def _attention(q_BHTE: torch.Tensor, k_BKSE: torch.Tensor, met: float) -> Shape:
    batch_heads = prod(q_BHTE.shape[:2])
    return Shape("attention", "forward", q_BHTE.shape[2], k_BKSE.shape[2], q_BHTE.shape[3], batch_heads, met)


def _of_gpu(q_BHTE: torch.Tensor, k_BKSE: torch.Tensor, v_BKSE: torch.Tensor, met: float) -> Shape:
    return _attention(q_BHTE, k_BKSE, met)


def _of_gpu_backward(g: torch.Tensor, *given: Any) -> Shape:
    q_BHTE, k_BKSE, *_, met = given
    return _attention(q_BHTE, k_BKSE, met)


def _of_processor(
    q_BHTE: torch.Tensor,
    k_BKSE: torch.Tensor,
    v_BKSE: torch.Tensor,
    dropout: float = 0.0,
    causal: bool = False,
    *_: Any,
) -> Shape:
    """Its kernel knows the causal rule, of queries that are the last; what a mask hides it computes."""
    return _attention(q_BHTE, k_BKSE, attention.met_keys(q_BHTE, k_BKSE, causal))


def _of_processor_backward(g: torch.Tensor, *given: Any) -> Shape:
    q_BHTE, k_BKSE, v_BKSE, _, _, dropout, causal = given[:7]
    return _of_processor(q_BHTE, k_BKSE, v_BKSE, dropout, causal)


_SHAPES: dict[Any, Callable[..., Shape]] = {
    aten.mm: _mm,
    aten.addmm: lambda _, *sides: _mm(*sides),
    aten.addmm_: lambda _, *sides: _mm(*sides),
    aten.bmm: _bmm,
    aten.baddbmm: lambda _, *sides: _bmm(*sides),
    ours.grouped_product: _grouped,
    ours.grouped_outer_product: _grouped_outer,
    aten._scaled_dot_product_flash_attention_for_cpu: _of_processor,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _of_processor_backward,
    **{
        operator: _of_gpu_backward if operator.__name__.endswith("_backward") else _of_gpu
        for operator in attention.FLOPS
    },
}
