"""The ledger of a rank from formulas: what one layer, the first and the last stage do for a micro-batch.

Every row follows from `perf.parts`, which has the FLOPs and bytes of a token, and from the axes of
`parameter_table`, which say what tensor parallelism divides. Columns are N layouts at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from colossus.architecture import Architecture, Parameter, parameter_table
from colossus.perf.ledger import Columns, Kind, Ledger, Phase, Row
from colossus.perf.parts import (
    ATTENTION,
    BY_BLOCKS,
    SQUARE,
    Kernel,
    LayerKind,
    Part,
    computed_keys,
    layer_kinds,
    parts,
)
from colossus.perf.software import Software

TP_AXES = ("heads", "kv", "ffn", "vocab")  # dimensions of parameters that tensor parallelism divides
SELECTIVE = ("attention.scores", "attention.values", "gated", "_norm", "rotary")  # made again by "selective"
RECOMPUTE = {"none": 0, "selective": 1, "full": 2}
LATENTS = ("attention.wq_down", "attention.wkv_down", "attention.q_norm", "attention.kv_norm")
MOVED = ("moe.experts.rows", "moe.experts.sum")  # tokens to their experts, and what these gave to the tokens
JOINED = ("attention.wq", "attention.wk", "attention.wv", "w_gate", "w_up")  # products of one input


@dataclass(frozen=True)
class Piece:
    """What a micro-batch is for a rank, as columns [N].

    sequences, seq_len: of a micro-batch and of a sample. tp, cp, ep, etp: ranks of the groups. sp: 1 where
    the tokens outside the products are spread over tp. recompute: 0 none, 1 selective, 2 full.
    """

    sequences: Columns
    tp: Columns
    cp: Columns
    ep: Columns
    etp: Columns
    sp: Columns
    recompute: Columns
    seq_len: int

    @property
    def tokens(self) -> Columns:
        """Of a micro-batch on the ranks of one tp group."""
        return self.sequences * self.seq_len / self.cp

    @property
    def size(self) -> int:
        return len(self.tp)


def piece_of(columns: Mapping[str, Columns], seq_len: int) -> Piece:
    """From columns with the names of `Piece`; `micro_batch` is its sequences."""
    return Piece(
        sequences=columns["micro_batch"],
        tp=columns["tp"],
        cp=columns["cp"],
        ep=columns["ep"],
        etp=columns["etp"],
        sp=columns["sp"],
        recompute=columns["recompute"],
        seq_len=seq_len,
    )


def stage_name(kind: LayerKind) -> str:
    """How rows call the layers of a kind."""
    words = ["experts" if kind.experts else "dense", *(["windowed"] if kind.windowed else [])]
    return " ".join(words)


def layer_counts(arch: Architecture) -> dict[str, list[int]]:
    """The layers of each kind, by the name of `stage_name`."""
    return {stage_name(kind): layers for kind, layers in layer_kinds(arch).items()}


def layers_ledger(
    arch: Architecture,
    piece: Piece,
    software: Software,
    precision: str = "bf16",
    kernel: Kernel | None = None,
) -> Ledger:
    """One micro-batch through one layer of each kind, and through what the first and the last stage add.

    kernel: how attention is computed; as the software does by default.
    """
    return Ledger.of(_Formulas(arch, piece, software, precision, kernel).rows(), piece.size)


@lru_cache(maxsize=64)
def _matrices(arch: Architecture) -> Mapping[tuple[int | None, str], Parameter]:
    """(layer, part) -> the matrix that the part multiplies with."""
    found = {}
    for parameter in parameter_table(arch):
        if len(parameter.shape) < 2 or parameter.name.endswith("_bias"):
            continue
        name = parameter.name.removesuffix(".weight")
        if parameter.layer is not None:
            name = name.removeprefix(f"layers.{parameter.layer}.")
        found[parameter.layer, name] = parameter
    return found


def _joined(first: Part, part: Part) -> bool:
    """Whether both multiply the same input: of one owner, and of the attention or the MLP."""
    return first.kind == part.kind and first.name.rpartition(".")[0] == part.name.rpartition(".")[0]


def _sum(together: list[Part]) -> Part:
    if len(together) == 1:
        return together[0]
    names = ("executed", "executed_backward", "model", "weight_bytes", "written_bytes", "saved_bytes")
    return replace(together[0], **{name: sum(getattr(p, name) for p in together) for name in names})


class _Formulas:
    def __init__(
        self, arch: Architecture, piece: Piece, software: Software, precision: str, kernel: Kernel | None
    ) -> None:
        self.arch, self.piece, self.software, self.precision = arch, piece, software, precision
        self.size = 4 if precision == "fp32" else 2
        self.wide = "fp32" if precision == "fp32" else "bf16"  # of what float8 leaves alone
        if kernel is None:
            kernel = BY_BLOCKS if software.fused_attention else SQUARE
        self.kernel = kernel
        self.compiled = software.measured and software.elementwise == "fused"
        self.parts = parts(arch, piece.seq_len, kernel=kernel, type_bytes=self.size, compiled=self.compiled)
        self.kinds = layer_kinds(arch)

    def rows(self) -> Iterator[Row]:
        for together in self.together():
            part = together[0]
            if part.kind is None:
                yield from self.part(together, "first" if part.name.endswith("embedding") else "last", None)
            else:
                yield from self.part(together, stage_name(part.kind), self.kinds[part.kind][0])
        for kind in self.kinds:
            yield from self.messages(kind)
        yield from self.edge_messages()

    def together(self) -> Iterator[list[Part]]:
        """The parts, those that are one product in one list."""
        waiting: list[Part] = []
        for part in self.parts:
            joins = self.software.joins_inputs and part.name.endswith(JOINED)
            if waiting and not (joins and _joined(waiting[0], part)):
                yield waiting
                waiting = []
            waiting.append(part)
            if not joins:
                yield waiting
                waiting = []
        if waiting:
            yield waiting

    def part(self, together: list[Part], stage: str, layer: int | None) -> Iterator[Row]:
        part = together[0]
        matrices = [_matrices(self.arch).get((layer, p.name)) for p in together]
        if part.name == "head" and matrices[0] is None:
            matrices = [_matrices(self.arch)[None, "embedding"]]
        found = [matrix for matrix in matrices if matrix is not None]
        if part.name in ATTENTION:
            made = list(self.attention(part, stage))
        elif found and part.executed:
            made = list(self.product(_sum(together), stage, found))
        else:
            made = list(self.elementwise(part, stage))
        yield from made
        again = np.where(self.again(part), 1.0, 0.0)
        if part.kind is not None and again.any() and not self.is_last(part):
            for row in made:
                if row.phase == "forward":
                    yield replace(row, phase="recompute", repeat=again, model=0.0, saved=0.0)

    def is_last(self, part: Part) -> bool:
        """Whether it is a layer's last product, not made again where nothing asks for what it gives."""
        return part.kind is not None and part.name == "mlp.w_down" and self.ends_early(part.kind)

    def ends_early(self, kind: LayerKind) -> bool:
        """Whether recomputation of such layers ends before the last product and the sum over ranks."""
        return self.software.stops_early and self.arch.norm_placement == "pre" and not kind.experts

    def again(self, part: Part) -> Columns:
        """1 where the part is made again in the backward pass."""
        selective = any(part.name.endswith(ending) for ending in SELECTIVE)
        if self.software.keeps_products and self.kernel.fused and part.name in ATTENTION:
            selective = False
        apart = np.full(self.piece.size, selective)
        if self.software.keeps_products and part.name in MOVED:  # what ranks exchange is kept
            apart = self.piece.ep == 1
        return np.asarray((self.piece.recompute == 2) | ((self.piece.recompute == 1) & apart))

    def kept(self, part: Part) -> Columns:
        """Bytes of a micro-batch that wait for the backward pass."""
        held = part.saved_bytes * self.piece.tokens / self.spread(part)
        if part.kind is None:
            return held
        return np.where(self.again(part), 0.0, held)

    def kept_product(self, part: Part, outputs: Columns) -> Columns:
        """As `kept`, of a product that gives so many numbers, or each rank of a sum its part of them."""
        needless = self.compiled and part.kind is not None and self.is_last(part)
        if not self.software.keeps_products or part.kind is None or needless:
            return self.kept(part)
        return np.where(self.piece.recompute == 1, outputs * self.size, self.kept(part))

    def on_all_ranks(self, part: Part) -> bool:
        """Whether each rank of tp makes it of all tokens: in our program the vectors that queries, keys and
        values come from, in published ones those of its own tokens."""
        return self.arch.latent is not None and self.software.measured and part.name in LATENTS

    def spread(self, part: Part) -> Columns:
        """Over how many ranks of tp a part's tokens or channels are spread. Ranks that share the columns of
        experts gather their tokens first."""
        if part.name in MOVED:
            return np.asarray(self.piece.tp / self.piece.etp)
        if self.on_all_ranks(part):
            return np.ones(self.piece.size)
        outside = part.name.endswith(("_norm", "_residual", "embedding", "norm", "rows", "sum", "router"))
        return np.where(self.piece.sp == 1, self.piece.tp, 1.0) if outside else self.piece.tp

    # ------------------------------------------------------------------ products

    def product(self, part: Part, stage: str, matrices: list[Parameter]) -> Iterator[Row]:
        """Forward, and backward the gradients of the input and of the weights."""
        piece, matrix = self.piece, matrices[0]
        (out_axis, in_axis), inner = matrix.axes[-2:], matrix.shape[-1]
        out = sum(m.shape[-2] for m in matrices)
        is_expert = matrix.group == "expert"
        split = piece.etp if is_expert else piece.tp
        n = out / split if out_axis in TP_AXES else np.full(piece.size, float(out))
        k = inner / split if in_axis in TP_AXES else np.full(piece.size, float(inner))
        m, count = piece.tokens, np.ones(piece.size)
        if is_expert:
            experts = self.arch.experts
            assert experts is not None
            # all ranks of ep send tokens to the num_experts / ep that this rank has
            count = experts.num_experts / piece.ep
            routed = piece.tokens * piece.etp / piece.tp * experts.per_token
            m = routed * piece.ep / experts.num_experts
        elif out_axis not in TP_AXES and in_axis not in TP_AXES and not self.on_all_ranks(part):
            m = m / np.where(piece.sp == 1, piece.tp, 1.0)
        sums = in_axis in TP_AXES  # over ranks, each of which then has its tokens' alone
        precision = self.precision
        if precision == "fp8" and (part.name in ("head", "moe.router") or part.kind is None):
            precision = "bf16"
        if part.name == "moe.router" and self.software.measured:
            precision = "fp32"
        width = 4 if precision == "fp32" else 1 if precision == "fp8" else self.size
        ranks = np.ones(piece.size) if self.on_all_ranks(part) else piece.tp
        flops = part.executed * piece.tokens / ranks
        moved = count * (width * (m * k + k * n) + self.size * m * n)
        name, counted = part.name, part.model * piece.tokens / piece.tp
        common: dict[str, Any] = {"stage": stage, "precision": precision, "count": count}
        yield Row(
            name, "forward", kind="product", m=m, n=n, k=k, executed=flops, model=counted,
            bytes=moved, saved=self.kept_product(part, count * m * n / (split if sums else 1.0)), **common,
        )  # fmt: skip
        half = part.executed_backward * piece.tokens / ranks / 2
        yield Row(
            name, "backward", kind="product", m=m, n=k, k=n, executed=half, model=counted,
            bytes=moved, **common,
        )  # fmt: skip
        yield Row(
            name, "weights", kind="product", m=n, n=k, k=m, executed=half, model=counted,
            bytes=moved + count * k * n * 2 * self.software.gradient_bytes, **common,
        )  # fmt: skip
        if self.software.casts_weights and self.size < 4 and name != "head":
            cast = count * k * n * (4 + width)
            yield Row(f"{name} cast", "forward", stage, "memory", bytes=cast)
            yield Row(f"{name} gradient cast", "weights", stage, "memory", bytes=cast)
        if self.software.sums_gradients:  # into those of the micro-batches before
            summed = count * k * n * (2 * self.software.gradient_bytes + self.size)  # read, read, written
            yield Row(f"{name} gradient", "weights", stage, "memory", bytes=summed)
        if precision == "fp8":
            yield from self.casts(name, stage, count * m * k, count * m * n)
        if name == "head":
            # softmax in fp32 over the logits: written once more, read twice, and their gradient
            moved = piece.tokens * n * (self.size + 4 + 4)
            yield Row("loss", "forward", stage, "memory", precision=self.wide, bytes=moved)
            yield Row("loss", "backward", stage, "memory", precision=self.wide, bytes=moved)

    def casts(self, name: str, stage: str, inputs: Columns, outputs: Columns) -> Iterator[Row]:
        """To float8: written twice in a byte, as it is and transposed for the backward pass, by the kernel
        that makes it or, in programs that are not fused, by one that reads it again. Weights are cast once a
        step."""
        each = 2.0 if self.software.elementwise == "fused" else 4.0
        phases: tuple[tuple[Phase, Columns], ...] = (("forward", inputs), ("backward", outputs))
        for phase, elements in phases:
            yield Row(f"{name} to fp8", phase, stage, "memory", bytes=elements * each)

    # ------------------------------------------------------------------ attention and what lies between

    def attention(self, part: Part, stage: str) -> Iterator[Row]:
        """Scores and weighted values: two products of all heads, or half of one fused kernel each."""
        piece, arch = self.piece, self.arch
        flops = part.executed * piece.tokens / piece.tp
        counted = part.model * piece.tokens / piece.tp
        heads = piece.sequences * arch.num_heads / piece.tp
        latent = arch.latent
        widths = (arch.head_dim, arch.head_dim if latent is None else latent.v_dim)
        width = float(widths[ATTENTION.index(part.name)])
        rows = piece.seq_len / piece.cp
        backward = part.executed_backward * piece.tokens / piece.tp
        common: dict[str, Any] = {"stage": stage, "precision": self.wide, "count": heads}
        saved = self.kept(part)
        if self.kernel != SQUARE:
            # n is the keys that a query takes the time of, for the backward pass as often as the pass
            # multiplies with them.
            again = part.executed_backward / part.executed
            window = arch.window if part.kind is not None and part.kind.windowed else None
            seen = computed_keys(piece.seq_len, window, self.kernel)
            yield Row(
                part.name, "forward", kind="fused_attention", m=rows, n=seen, k=width, executed=flops,
                model=counted, saved=saved, **common,
            )  # fmt: skip
            yield Row(
                part.name, "backward", kind="fused_attention", m=rows, n=seen * again, k=width,
                executed=backward, model=2 * counted, **common,
            )  # fmt: skip
            return
        keys = float(piece.seq_len)
        scores = part.name == "attention.scores"
        n, k = (keys, width) if scores else (width, keys)
        moved = heads * self.size * (rows * keys + rows * width + keys * width)
        yield Row(
            part.name, "forward", kind="product", m=rows, n=n, k=k, executed=flops, model=counted,
            bytes=moved, saved=saved, **common,
        )  # fmt: skip
        for repeat in range(2):
            yield Row(
                part.name, "backward", kind="product", m=rows if repeat else keys, n=k if repeat else n,
                k=n if repeat else rows, executed=backward / 2, model=counted, bytes=moved, **common,
            )  # fmt: skip
        if scores:  # scale, mask, softmax and dropout over [heads, rows, keys]
            area = heads * rows * keys * self.size
            yield Row("softmax", "forward", stage, "memory", bytes=4 * area)
            yield Row("softmax", "backward", stage, "memory", bytes=5 * area)

    def elementwise(self, part: Part, stage: str) -> Iterator[Row]:
        """Norms, rotations, gates, sums, embeddings: what is written is read once more."""
        moved = 2 * part.written_bytes * self.piece.tokens / self.spread(part)
        eager = self.software.eager
        # tokens are gathered for their experts, and summed, by kernels that nothing is fused into
        kind: Kind = (
            "memory" if part.name.startswith("moe.experts.") and "gated" not in part.name else "elementwise"
        )
        yield Row(
            part.name, "forward", stage, kind, precision=self.wide, bytes=moved, saved=self.kept(part),
            launches=eager, model=part.model * self.piece.tokens / self.piece.tp,
        )  # fmt: skip
        yield Row(part.name, "backward", stage, kind, precision=self.wide, bytes=1.5 * moved, launches=eager,
                  model=2 * part.model * self.piece.tokens / self.piece.tp)  # fmt: skip

    # ------------------------------------------------------------------ messages

    def messages(self, kind: LayerKind) -> Iterator[Row]:
        """Of one layer: tensor, context and expert parallelism."""
        piece, stage, arch = self.piece, stage_name(kind), self.arch
        tensor = piece.tokens * arch.hidden_size * self.size  # the activations of a tp group
        # user buffers gather what the products read, in float8 where they do
        gathered = tensor / 2 if self.precision == "fp8" and self.software.tp_hidden else tensor
        tp = np.where(piece.tp > 1, 1.0, 0.0)
        keeps = self.software.keeps_gathered
        full = np.where(piece.recompute == 2, 1.0, 0.0)
        gathers_again = np.where(piece.recompute == 1, 1.0, full) if keeps else full
        has_dense = not kind.experts or (arch.experts is not None and arch.experts.num_shared > 0)
        has_dense = has_dense or arch.has_mlp(self.kinds[kind][0])
        halves = 2.0 if has_dense else 1.0  # attention, and the MLP
        sp = piece.sp == 1
        summed_again = full * (halves - float(self.ends_early(kind)))
        phases: tuple[tuple[Phase, Columns, Columns], ...] = (
            ("forward", tp * halves, tp * halves),
            ("recompute", tp * halves * gathers_again, tp * summed_again),
            ("backward", tp * halves, tp * halves),
        )
        for phase, gathers, sums in phases:
            # What is gathered waits in place of this rank's part.
            waits = phase == "forward" and keeps
            saved = np.where(piece.recompute == 0, gathered * (1 - 1 / piece.tp), 0.0) if waits else 0.0
            yield Row(
                "tp gather", phase, stage, "all_gather", "tp", group="tp", sent=gathered, saved=saved,
                repeat=np.where(sp, gathers, 0.0),
            )  # fmt: skip
            yield Row(
                "tp scatter", phase, stage, "reduce_scatter", "tp", group="tp", sent=tensor,
                repeat=np.where(sp, sums, 0.0),
            )  # fmt: skip
            yield Row("tp sum", phase, stage, "all_reduce", "tp", group="tp", sent=tensor,
                      repeat=np.where(sp, 0.0, sums))  # fmt: skip
        if not keeps:
            # for the gradients of the weights, beside the products that make those of the input
            yield Row("tp gather", "weights", stage, "all_gather", "tp_hidden", group="tp", sent=gathered,
                      repeat=np.where(sp, halves, 0.0) * tp)  # fmt: skip
        cp = np.where(piece.cp > 1, 1.0, 0.0)
        if arch.latent is None:
            per_token = 2 * arch.num_kv_heads * arch.head_dim / piece.tp
        else:
            per_token = 2 * arch.num_heads * arch.head_dim / piece.tp
        keys = piece.sequences * piece.seq_len * per_token * self.size
        values = arch.num_heads * (arch.head_dim if arch.latent is None else arch.latent.v_dim)
        again: tuple[tuple[Phase, Columns], ...] = (
            ("forward", cp),
            ("recompute", cp * gathers_again),
            ("backward", cp * (not keeps)),
        )
        for phase, times in again:
            waits = phase == "forward" and keeps
            # All keys and values wait in place of this rank's; what attention gives, whole and in blocks.
            more = keys * (1 - 1 / piece.cp) + piece.tokens * values * self.size / piece.tp
            saved = np.where(piece.recompute == 0, more, 0.0) if waits else 0.0
            yield Row("cp keys", phase, stage, "all_gather", "cp", group="cp", sent=keys, saved=saved,
                      repeat=times)  # fmt: skip
        yield Row("cp keys", "backward", stage, "reduce_scatter", "cp", group="cp", sent=keys, repeat=cp)
        if kind.experts:
            yield from self.expert_messages(stage, full)

    def expert_messages(self, stage: str, full: Columns) -> Iterator[Row]:
        """Tokens to their experts and back: each rank of tp sends its share; where tp splits the experts, its
        ranks then gather what arrived, and sum what leaves."""
        piece, experts = self.piece, self.arch.experts
        assert experts is not None
        ep = np.where(piece.ep > 1, 1.0, 0.0)
        etp = np.where(piece.etp > 1, 1.0, 0.0)
        rows = piece.tokens * experts.per_token * self.arch.hidden_size * self.size
        ones = np.ones_like(ep)
        phases: tuple[tuple[Phase, Columns], ...] = (
            ("forward", ones),
            ("recompute", full),
            ("backward", ones),
        )
        kinds: tuple[Kind, Kind] = ("all_gather", "reduce_scatter")
        for phase, times in phases:
            yield Row("ep tokens", phase, stage, "all_to_all", "ep", group="ep",
                      count=float(experts.per_token), sent=rows / piece.tp,
                      repeat=2 * ep * times)  # fmt: skip
            for kind in kinds:
                yield Row("tp experts", phase, stage, kind, "ep", group="tp", sent=rows, repeat=etp * times)

    def edge_messages(self) -> Iterator[Row]:
        """Of the first and the last stage: embeddings and logits split over the vocabulary."""
        piece = self.piece
        tensor = piece.tokens * self.arch.hidden_size * self.size
        tp = np.where(piece.tp > 1, 1.0, 0.0)
        yield Row(
            "tp embedding", "forward", "first", "reduce_scatter", "tp", group="tp", sent=tensor, repeat=tp
        )
        yield Row("tp embedding", "backward", "first", "all_gather", "tp", group="tp", sent=tensor, repeat=tp)
        yield Row("tp head", "forward", "last", "all_gather", "tp", group="tp", sent=tensor, repeat=tp)
        yield Row("tp head", "backward", "last", "reduce_scatter", "tp", group="tp", sent=tensor, repeat=tp)
