"""Step time and memory of many layouts at once: the ledger, priced and put together.

A step is the micro-batches of the slowest pipeline rank, the pipeline's bubble, what messages over the
data-parallel ranks don't hide behind, the update, and waiting for the slowest node.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from colossus.architecture import Architecture, parameter_table
from colossus.hardware.fleets import Hardware
from colossus.layout import ONE_STAGE, V_SHAPED
from colossus.perf import communication as comm
from colossus.perf.flops import model_flops_per_token
from colossus.perf.ledger import Columns, Ledger
from colossus.perf.parts import kernel_of
from colossus.perf.passes import OVERLAP_COST, exposed, pass_seconds
from colossus.perf.price import Pricer
from colossus.perf.schedule import bubble
from colossus.perf.software import OURS, OURS_EAGER
from colossus.planner.columns import ALL, Layouts, unique_columns
from colossus.planner.formulas import TP_AXES, Piece, layer_counts, layers_ledger, piece_of
from colossus.planner.muon import muon_update
from colossus.planner.stages import Shape, shape

KEYS = ("micro_batch", "tp", "cp", "ep", "etp", "sp", "recompute")
ACCUMULATE_BYTES = 12.0  # a weight's gradient in fp32 to those of the micro-batches before
LARGEST_EXACT = 4  # ranks of a pipeline whose bubble is simulated; those of longer ones grow in proportion
RATIO = 0.2  # to which ratios of forward and backward seconds are rounded for a bubble


@dataclass(frozen=True)
class Problem:
    """What is trained, and how it is priced.

    global_batch: sequences. optimizer: "adamw" or "muon". shapes: (from step, sequences over `global_batch`,
    tokens of a sequence) of all that occur in the run, at each of which a layout must be legal; without any,
    what is priced.
    """

    arch: Architecture
    seq_len: int
    global_batch: int
    precision: str
    pricer: Pricer
    optimizer: str = "adamw"
    shapes: tuple[tuple[int, Fraction, int], ...] = ()

    def occurring(self) -> list[dict[str, int]]:
        """What rules ask of each shape of the run. A share of a batch that is no whole number is rounded
        both ways."""
        found: dict[tuple[int, int], int] = {}
        for step, times, seq_len in self.shapes or ((0, Fraction(1), self.seq_len),):
            batch = times * self.global_batch
            for whole in (math.floor(batch), math.ceil(batch)):
                found.setdefault((max(1, whole), seq_len), step)
        return [
            {"from_step": step, "global_batch": batch, "seq_len": seq_len}
            for (batch, seq_len), step in found.items()
        ]

    def ledger(self, piece: Piece) -> Ledger:
        """Of one micro-batch: see `formulas.layers_ledger`."""
        software, kernel = self.pricer.software, None
        if software.measured:  # ours
            kernel = kernel_of(self.arch, self.seq_len, self.pricer.hardware.accelerator.device)
        return layers_ledger(self.arch, piece, software, self.precision, kernel)

    @property
    def tokens(self) -> float:
        """Of a step."""
        return float(self.global_batch) * self.seq_len

    def as_ours(self, compiled: bool) -> Problem:
        """Priced as our program, its layers compiled or not."""
        software = OURS if compiled else OURS_EAGER
        return replace(self, pricer=replace(self.pricer, software=software))

    def on(self, hardware: Hardware) -> Problem:
        """On other hardware."""
        return replace(self, pricer=replace(self.pricer, hardware=hardware))

    def shape(self, schedule: str, pp: int, per_rank: int) -> Shape:
        """What the ranks of a pipeline have, as the program cuts it."""
        return shape(self.arch, schedule, pp, per_rank, self.seq_len, self.pricer.software.stages)

    @property
    def peak(self) -> float:
        """FLOP/s of an accelerator that MFU is a share of: dense bf16, of a processor its best rate."""
        on_cpu = self.pricer.hardware.accelerator.device == "cpu"
        return self.pricer.best(self.precision if on_cpu else "bf16")

    @property
    def model_flops(self) -> float:
        """Of a step, as MFU counts them."""
        return self.tokens * model_flops_per_token(self.arch, self.seq_len)


@dataclass(frozen=True)
class Estimate:
    """Of N layouts, seconds of a step and where they go, as columns [N]; `parts` sums to `seconds`.

    phases: seconds of one layer of each kind, and of the first and last stage, for a micro-batch:
        (phase, stage) -> [N]; of a layer that is not recomputed, all but "recompute".
    """

    layouts: Layouts
    seconds: Columns
    parts: dict[str, Columns]
    micro_batches: Columns
    phases: dict[tuple[str, str], Columns] = field(repr=False, default_factory=dict)
    slowest: Columns = field(repr=False, default_factory=lambda: np.zeros(0))
    send: Columns = field(repr=False, default_factory=lambda: np.zeros(0))

    def mfu(self, problem: Problem) -> Columns:
        """Over the dense bf16 peak of every accelerator (of a processor, its best rate)."""
        return np.asarray(problem.model_flops / (self.seconds * self.layouts.ranks * problem.peak))


def estimate(problem: Problem, layouts: Layouts) -> Estimate:
    """Prices layouts, which must be legal."""
    return _Estimate(problem, layouts).run()


def groups_of(problem: Problem, layouts: Layouts) -> dict[str, comm.Group]:
    """The groups that ranks of layouts talk in, by axis."""
    axes = ("dp_replicate", "dp_shard", "pp", "cp", "tp", "ep", "etp")
    return comm.groups_of({axis: layouts.number(axis) for axis in axes}, problem.pricer.software.order)


@dataclass(frozen=True)
class _Layer:
    """Seconds of one layer of a kind, or of an edge, for a micro-batch, [N] each."""

    forward: Columns
    recompute: Columns
    backward: Columns
    weights: Columns

    def __add__(self, other: _Layer) -> _Layer:
        return _Layer(
            self.forward + other.forward,
            self.recompute + other.recompute,
            self.backward + other.backward,
            self.weights + other.weights,
        )

    def times(self, count: Columns | float, recomputed: Columns | float | None = None) -> _Layer:
        """Of so many layers, `recomputed` of which are (all, where it is None)."""
        again = count if recomputed is None else recomputed
        return _Layer(
            self.forward * count, self.recompute * again, self.backward * count, self.weights * count
        )

    @property
    def total(self) -> Columns:
        return self.forward + self.recompute + self.backward + self.weights


class _Estimate:
    def __init__(self, problem: Problem, layouts: Layouts) -> None:
        self.problem, self.layouts = problem, layouts
        self.pricer, self.software = problem.pricer, problem.pricer.software
        self.groups = groups_of(problem, layouts)
        self.micro_batches = layouts.micro_batches(problem.global_batch)

    def run(self) -> Estimate:
        layouts, pricer = self.layouts, self.pricer
        stages, hidden = self.stage_seconds()
        n = len(layouts)
        out: dict[str, Columns] = {
            name: np.zeros(n)
            for name in ("work", "bubble", "pipeline messages", "sharding messages", "update")
        }
        send = self.send()
        again = np.zeros((len(layer_counts(self.problem.arch)), n))  # layers that are recomputed, by kind
        for (schedule, pp, per_rank), index in shapes_of(layouts).items():
            made = self.problem.shape(schedule, pp, per_rank)
            chosen = {name: layer_at(layer, index) for name, layer in stages.items()}
            layers = recomputed_layers(layouts, index)
            per = self.of_ranks(made, chosen, layers)
            again[:, index] = made.recomputed(layers).sum(axis=0)
            m = self.micro_batches[index]
            work = _pick(per, np.argmax(np.stack([rank.total for rank in per]), axis=0))
            out["work"][index] = m * work.total
            out["bubble"][index] = self.bubble(schedule, pp, per_rank, m, _mean(made, per))
            out["pipeline messages"][index] = self.pipeline_messages(pp, made, m, send[index])
            sharding, update = self.sharding(made, index, work)
            out["sharding messages"][index], out["update"][index] = sharding, update
        nodes = np.ceil(layouts.ranks / pricer.hardware.node_size)
        slow = pricer.slowest(nodes)
        spread = (slow - 1) * (out["work"] + out["bubble"])
        parts = self.split(stages, again, hidden, out) | {"slowest node": spread}
        seconds = np.sum(np.stack(list(parts.values())), axis=0)
        phases = {
            (phase, name): getattr(layer, phase)
            for name, layer in stages.items()
            for phase in ("forward", "recompute", "backward", "weights")
        }
        return Estimate(layouts, seconds, parts, self.micro_batches, phases, slow, send)

    # ------------------------------------------------------------------ what a micro-batch takes

    def stage_seconds(self) -> tuple[dict[str, _Layer], dict[str, Columns]]:
        """Of each kind of layer and of both edges; priced once for layouts whose micro-batches are alike.

        Also the seconds of each sort of work in one micro-batch through the whole model: for the waterfall.
        """
        keys = np.stack([self.layouts.number(name) for name in KEYS])
        unique, back = unique_columns(keys)
        columns = dict(zip(KEYS, unique, strict=True))
        piece = piece_of(columns, self.problem.seq_len)
        ledger = self.problem.ledger(piece)
        ones = np.ones(piece.size)
        axes = columns | {"dp_replicate": ones, "dp_shard": ones, "pp": ones}
        groups = comm.groups_of(axes, ("tp", "cp", "dp_shard", "dp_replicate", "pp"))
        seconds = self.pricer.seconds(ledger, groups) * ledger.repeat
        sorts: dict[str, Columns] = {}
        stages = {}
        for stage in dict.fromkeys(ledger.stage.tolist()):
            stages[stage] = layer_at(self.one_stage(ledger, seconds, stage, piece.tp), back)
        for sort, mask in self.sorts(ledger).items():
            for stage in stages:
                rows = mask & ledger.where(stage=stage)
                sorts[f"{sort} {stage}"] = seconds[rows].sum(axis=0)[back]
        return stages, sorts

    def one_stage(self, ledger: Ledger, seconds: Columns, stage: str, tp_ranks: Columns) -> _Layer:
        """Seconds of the phases of one layer: products and what lies between them, at least as long as the
        host needs to start them, and what messages don't hide."""
        found = {}
        for phase in ("forward", "recompute", "backward", "weights"):
            rows = ledger.where(stage=stage, phase=phase)
            found[phase] = pass_seconds(self.pricer, ledger, seconds, rows, tp_ranks).total
        return _Layer(**found)

    def sorts(self, ledger: Ledger) -> dict[str, NDArray[np.bool_]]:
        """Rows by what a reader of the waterfall asks for."""
        again = ledger.where(phase="recompute")
        return {
            "products": ledger.where(kind="product") & ~again,
            "attention": ledger.where(kind="fused_attention") & ~again,
            "memory-bound": ledger.where(kind=("memory", "elementwise")) & ~again,
        }

    # ------------------------------------------------------------------ the pipeline

    def of_ranks(self, made: Shape, stages: dict[str, _Layer], layers: Columns | None) -> list[_Layer]:
        """Seconds of a micro-batch on pipeline ranks, once for each of `Shape.alike`. layers: of each stage,
        the first that are recomputed, [N]; None: all."""
        ranks = []
        again = made.of_ranks(made.recomputed(layers))
        for rank, *_ in made.alike:
            total = stages["first"].times(made.first[rank]) + stages["last"].times(made.last[rank])
            for kind, count, recomputed in zip(made.kinds, made.counts[rank], again[rank], strict=True):
                if count:
                    total = total + stages[kind].times(count, recomputed)
            ranks.append(total)
        return ranks

    def bubble(self, schedule: str, pp: int, per_rank: int, micro_batches: Columns, rank: _Layer) -> Columns:
        """Waiting of a pipeline whose ranks each take what the mean `rank` does."""
        if pp == 1:
            return np.zeros(len(micro_batches))
        chunks = 2 if schedule in V_SHAPED else per_rank
        mean = rank.times(1 / chunks)
        # With fewer micro-batches than ranks each waits for the round to come back, chunk after chunk.
        waits = np.minimum(micro_batches, pp) - 1
        rest = chunks * np.maximum(pp - micro_batches, 0.0)
        if schedule in ("gpipe", "1f1b", "interleaved_1f1b"):
            return np.asarray((waits + rest) * mean.total)
        forward = mean.forward
        backward, weights = (mean.backward + mean.recompute) / forward, mean.weights / forward
        if schedule == "interleaved_zero_bubble":
            f, i, w = mean.forward, mean.backward + mean.recompute, mean.weights
            return np.asarray(waits * np.maximum(f + i - w, np.maximum(f, i)) + rest * (f + i))
        exact = min(pp, LARGEST_EXACT)
        at_least = np.maximum(1, micro_batches * exact // pp)
        at_least = np.minimum(np.where(at_least > exact, at_least - at_least % exact, at_least), 4 * exact)
        ratios = np.round(np.stack([backward, weights]) / RATIO) * RATIO
        unique, back = unique_columns(np.stack([at_least, *ratios]))
        found = [bubble(schedule, exact, chunks, int(m), 1.0, i, w) for m, i, w in unique.T.tolist()]
        simulated = np.array(found)[back]
        return np.asarray(simulated * forward * (pp - 1) / max(exact - 1, 1))

    def send(self) -> Columns:
        """Seconds of a message to the next stage."""
        layouts, problem = self.layouts, self.problem
        size = 4 if problem.precision == "fp32" else 2
        tokens = layouts.number("micro_batch") * problem.seq_len / layouts.number("cp")
        # Without sequence parallelism each rank of tp sends its part, and the next node gathers them over
        # NVLink (the scatter-gather of arXiv 2104.04473).
        sent = tokens * problem.arch.hidden_size * size / layouts.number("tp")
        return self.pricer.messages("send", sent, self.groups["pp"])

    def pipeline_messages(self, pp: int, made: Shape, micro_batches: Columns, send: Columns) -> Columns:
        """There and back: for every micro-batch where they hide behind nothing, else while it fills."""
        if pp == 1:
            return np.zeros(len(send))
        per_rank = len(made.by_stage) / pp
        filling = 2 * (pp - 1) * send
        exposed = 0.0 if self.software.overlaps_pipeline else 1.0
        share = exposed + (1 - exposed) * OVERLAP_COST
        return filling + 2 * per_rank * micro_batches * send * share

    # ------------------------------------------------------------------ weights, gradients, the update

    def sharding(self, made: Shape, index: NDArray[np.intp], work: _Layer) -> tuple[Columns, Columns]:
        """Seconds that messages of weights and gradients are exposed, and of the update, on the rank that
        has most weights."""
        layouts = self.layouts.take(index)
        weights = [rank_weights(self.problem.arch, layouts, made, ranks[0]) for ranks in made.alike]
        dense = np.max(np.stack([w[0] for w in weights]), axis=0)
        routed = np.max(np.stack([w[1] for w in weights]), axis=0)
        layers = np.maximum(made.counts.sum(axis=1).max(), 1.0)
        zero = layouts.number("zero")
        groups = {
            name: comm.Group(group.size[index], group.stride[index]) for name, group in self.groups.items()
        }
        size = 4.0 if self.problem.precision == "fp32" else 2.0
        gradient = self.software.gradient_bytes
        gather, scatter, replicated, everywhere = (np.zeros(len(index)) for _ in range(4))
        for count, within, across in ((dense, "fsdp", "dp"), (routed, "experts", "experts_dp")):
            if not count.any():
                continue
            messages = self.pricer.messages
            gather = gather + messages("all_gather", count * size, groups[within])
            scatter = scatter + messages("reduce_scatter", count * gradient, groups[within])
            shard = count * gradient / groups[within].size
            replicas = groups["dp_replicate"]
            replicated = replicated + messages("all_reduce", shard, replicas)
            everywhere = everywhere + messages("all_reduce", count * gradient, groups[across])
        m = self.micro_batches[index]
        # A processor's ranks compute with the same cores that carry their messages.
        apart = self.pricer.hardware.accelerator.device != "cpu"
        hides_sums = 1.0 if apart and self.software.overlaps_gradients else 0.0
        hides_weights = 1.0 if apart and self.software.overlaps_weights else 0.0
        back = work.recompute + work.backward + work.weights
        ours = self.software.casts_weights
        late = exposed(replicated, hides_sums * back, replicated / layers) if ours else 0.0  # after the last
        every_time = scatter if ours else scatter + replicated
        scatter = scatter + replicated
        once = np.where(
            zero >= 1,
            exposed(scatter, hides_sums * back, scatter / layers)
            + exposed(gather, hides_weights * work.forward, gather / layers),
            exposed(everywhere, hides_sums * back, everywhere / layers),
        )
        # FSDP gathers for the forward and again for the backward pass of every micro-batch, and sums then.
        every = (
            m
            * (
                exposed(gather, hides_weights * work.forward)
                + exposed(gather + every_time, hides_sums * back)
            )
            + (gather + every_time) / layers
            + late
        )
        if ours:  # ZeRO-2 sums each micro-batch's gradients, too
            sums = m * exposed(every_time, hides_sums * back) + every_time / layers
            gathered = exposed(gather, hides_weights * work.forward, gather / layers)
            once = np.where(zero >= 2, sums + late + gathered, once)
        shards = np.where(zero >= 1, 1.0, 0.0)
        dense_shards = np.where(shards > 0, groups["fsdp"].size, 1.0)
        routed_shards = np.where(shards > 0, groups["experts"].size, 1.0)
        updated = dense / dense_shards + routed / routed_shards
        # gradients: scaled, measured, set to zero
        touched = np.where((zero >= 2) | ours, updated, dense + routed)
        update = self.pricer.update(updated, touched)
        if self.problem.optimizer == "muon":
            muon = muon_update(self.problem.arch, layouts, made, self.pricer, self.problem.precision, groups)
            update = update + muon.seconds
        if ours:  # the others' products add to what is there
            divided = (zero >= 2) & (groups["fsdp"].size > 1)
            update = update + (m - 1) * accumulate_seconds(
                self.pricer, updated, dense + routed, divided, size
            )
        return np.where(zero >= 3, every, once) + self.tied(index), update

    def tied(self, index: NDArray[np.intp]) -> Columns:
        """Seconds that both ends of a pipeline sum the gradient of the embedding which they share."""
        arch, layouts = self.problem.arch, self.layouts.take(index)
        if not (arch.tie_embeddings and self.software.measured):
            return np.zeros(len(index))
        pp, shards = layouts.number("pp"), layouts.number("dp_shard") * layouts.number("cp")
        sent = (
            arch.vocab_size * arch.hidden_size / layouts.number("tp") / shards * self.software.gradient_bytes
        )
        # between the ranks of one node where all of the pipeline lies in it
        spans = pp * self.groups["pp"].stride[index]
        here = spans <= self.pricer.hardware.node_size
        group = comm.Group(np.full(len(index), 2.0), np.where(here, 1.0, spans))
        return np.where(pp > 1, self.pricer.messages("all_reduce", sent, group), 0.0)

    # ------------------------------------------------------------------ the waterfall

    def split(
        self,
        stages: dict[str, _Layer],
        again: NDArray[np.float64],
        sorts: dict[str, Columns],
        out: dict[str, Columns],
    ) -> dict[str, Columns]:
        """`work` by sorts: products at peak, what they lose to shape, attention, memory, recomputation,
        messages; scaled so that the whole model's proportions hold for the slowest rank. again: layers of
        each kind that are recomputed, [kinds, N]."""
        made = self.problem.shape("1f1b", 1, 1)
        counts = dict(zip(made.kinds, made.counts[0], strict=True)) | {"first": 1.0, "last": 1.0}
        recomputed = dict(zip(made.kinds, again, strict=True))
        model = [stages[name].times(count, recomputed.get(name)) for name, count in counts.items()]
        total = np.sum([layer.total for layer in model], axis=0)
        recompute = np.sum([layer.recompute for layer in model], axis=0)
        scale = out["work"] / total
        named = {"recomputation": recompute * scale}
        for sort in ("products", "attention", "memory-bound"):
            named[sort] = scale * np.sum(
                [sorts[f"{sort} {name}"] * count for name, count in counts.items()], axis=0
            )
        rest = out["work"] - np.sum(np.stack(list(named.values())), axis=0)
        named["tensor, context and expert messages"] = rest
        order = ("products", "attention", "memory-bound", "recomputation")
        return {name: named[name] for name in order} | {
            "tensor, context and expert messages": rest,
            **{name: out[name] for name in ("bubble", "pipeline messages", "sharding messages", "update")},
        }


def shapes_of(layouts: Layouts) -> dict[tuple[str, int, int], NDArray[np.intp]]:
    """Layouts by schedule, ranks of the pipeline and stages of a rank."""
    names, codes = np.unique(layouts["schedule"], return_inverse=True)
    pp, per_rank = layouts["pp"].astype(np.int64), layouts["stages_per_rank"].astype(np.int64)
    keys = (codes.reshape(-1) * 2**20 + pp) * 2**20 + per_rank
    unique, back = np.unique(keys, return_inverse=True)
    order = np.argsort(back.reshape(-1), kind="stable")
    ends = np.cumsum(np.bincount(back.reshape(-1), minlength=len(unique)))
    found: dict[tuple[str, int, int], NDArray[np.intp]] = {}
    for key, index in zip(unique.tolist(), np.split(order, ends[:-1]), strict=True):
        schedule, ranks, chunks = str(names[key >> 40]), (key >> 20) % 2**20, key % 2**20
        if ranks == 1:
            schedule, chunks = "1f1b", 1
        elif schedule in ONE_STAGE:
            chunks = 1
        known = found.get((schedule, ranks, chunks))
        found[schedule, ranks, chunks] = index if known is None else np.concatenate([known, index])
    return found


def recomputed_layers(layouts: Layouts, index: NDArray[np.intp]) -> Columns | None:
    """Of each stage, the first layers that are recomputed; None where in all of these layouts all are."""
    layers = layouts["recompute_layers"][index]
    return None if (layers >= ALL).all() else layers.astype(float)


def _mean(made: Shape, per: list[_Layer]) -> _Layer:
    """Of all ranks, from one of each sort."""
    shares = [len(ranks) / len(made.first) for ranks in made.alike]
    total = per[0].times(shares[0])
    for layer, share in zip(per[1:], shares[1:], strict=True):
        total = total + layer.times(share)
    return total


def layer_at(layer: _Layer, index: NDArray[np.intp]) -> _Layer:
    return _Layer(layer.forward[index], layer.recompute[index], layer.backward[index], layer.weights[index])


def _pick(per: list[_Layer], which: NDArray[np.intp]) -> _Layer:
    """The rank that `which` [N] says, for each layout."""
    at = np.arange(len(which))
    return _Layer(
        *(
            np.stack([getattr(rank, name) for rank in per])[which, at]
            for name in ("forward", "recompute", "backward", "weights")
        )
    )


def accumulate_seconds(
    pricer: Pricer, here: Columns, whole: Columns, divided: NDArray[np.bool_], size: float
) -> Columns:
    """To add a micro batch's gradients to those before it, of the weights `here` where the sums are divided;
    else of the `whole` ones that a rank works with, which are `size` bytes each."""
    part = pricer.hardware.accelerator
    added = np.where(divided, here, whole) * ACCUMULATE_BYTES
    copied = np.where(divided, whole, 0.0) * (size + pricer.software.gradient_bytes)
    return np.asarray((added + copied) / part.copy * part.shared_by)


def rank_weights(arch: Architecture, layouts: Layouts, made: Shape, rank: int) -> tuple[Columns, Columns]:
    """Weights that a pipeline rank works with before sharding: of all but the experts, and of these."""
    tp, ep, etp = (layouts.number(name) for name in ("tp", "ep", "etp"))
    dense, routed = np.zeros(len(layouts)), np.zeros(len(layouts))
    for kind, count in zip(made.kinds, made.counts[rank], strict=True):
        whole, divided, experts = kind_weights(arch, kind)
        dense = dense + count * (whole + divided / tp)
        routed = routed + count * experts / (ep * etp)
    for name, has in (("first", made.first[rank]), ("last", made.last[rank])):
        whole, divided, _ = kind_weights(arch, name)
        dense = dense + has * (whole + divided / tp)
    if arch.tie_embeddings and len(made.owner) == 1:  # stages of a pipeline have one each
        dense = dense - arch.vocab_size * arch.hidden_size / tp
    return dense, routed


@lru_cache(maxsize=256)
def kind_weights(arch: Architecture, kind: str) -> tuple[float, float, float]:
    """Weights of one layer of a kind, or of an edge: those that every rank of tp has, those that it divides,
    and those of experts, which ep and etp divide."""
    layers = layer_counts(arch).get(kind)
    whole = divided = experts = 0.0
    for parameter in parameter_table(arch):
        if layers is not None:
            mine = parameter.layer == layers[0]
        else:
            is_first = parameter.group == "embedding"
            mine = parameter.layer is None and is_first == (kind == "first")
        if not mine or not parameter.trainable:
            continue
        if parameter.group == "expert" or ".experts." in parameter.name:
            experts += parameter.numel
        elif any(axis in TP_AXES for axis in parameter.axes):
            divided += parameter.numel
        else:
            whole += parameter.numel
    if kind == "last" and arch.tie_embeddings:
        divided += arch.vocab_size * arch.hidden_size
    return whole, divided, experts
