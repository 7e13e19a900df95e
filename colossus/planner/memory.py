"""Memory of a rank, by use: from the parameter table, the ledger's saved bytes and the schedule."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from colossus.architecture import Architecture
from colossus.hardware.catalogue import Accelerator
from colossus.layout import V_SHAPED
from colossus.perf.ledger import Columns
from colossus.perf.parts import ATTENTION, chunk_tokens
from colossus.perf.schedule import fullest
from colossus.planner.columns import Layouts, unique_columns
from colossus.planner.estimate import (
    KEYS,
    Problem,
    groups_of,
    kind_weights,
    rank_weights,
    recomputed_layers,
    shapes_of,
)
from colossus.planner.formulas import piece_of
from colossus.planner.moments import Held, Moment, largest, most, most_alone
from colossus.planner.muon import muon_bytes
from colossus.planner.stages import Shape

GIB = 2**30
MOMENTS: tuple[Moment, ...] = ("backward", "backward", "loss", "loss")  # as `perf.schedule.fullest` has them
CONTEXT = 0.6 * GIB  # of CUDA and its libraries' workspaces
BUFFERS = 0.25 * GIB  # of NCCL, for each group of several ranks that a rank is in
SLACK = 0.06  # of what is reserved, that no tensor fills: SimuMax measures 0.94 on B200
# Private memory that a processor's run takes, over what lives at once: three jobs of 1 to 12 million weights
# took 1.49, 1.60 and 1.70 times as much. Freed pieces of a heap seldom fit what comes next.
HEAP = 1.6
TALKING = ("tp", "cp", "pp", "dp_shard", "dp_replicate", "ep")  # axes whose groups have buffers
LIVE_LAYERS = 2.0  # layers whose gathered weights are there at once, where they are let go of


@dataclass(frozen=True)
class Memory:
    """Bytes of the rank that needs most, as columns [N]; `parts` sums to `allocated`."""

    parts: dict[str, Columns]
    allocated: Columns
    reserved: Columns
    rank: NDArray[np.intp]

    def fits(self, accelerator: Accelerator) -> NDArray[np.bool_]:
        return np.asarray(self.reserved <= accelerator.memory)


def reserved_bytes(allocated: float, num_groups: int, device: str) -> float:
    """What a rank takes of its accelerator's memory for tensors of so many bytes. num_groups: that it talks
    in."""
    if device != "cuda":
        return allocated * HEAP
    return (allocated + BUFFERS * num_groups + CONTEXT) / (1 - SLACK)


def memory(problem: Problem, layouts: Layouts) -> Memory:
    """What layouts need on their pipeline rank that needs most."""
    device = problem.pricer.hardware.accelerator.device
    n = len(layouts)
    saved = _saved(problem, layouts)
    found = {name: np.zeros(n) for name in
             ("weights", "gradients", "optimizer", "activations", "loss or one layer's gradients",
              "copies of weights")}  # fmt: skip
    rank_of = np.zeros(n, dtype=np.intp)
    micro_batches = layouts.micro_batches(problem.global_batch)
    for (schedule, pp, per_rank), index in shapes_of(layouts).items():
        made = problem.shape(schedule, pp, per_rank)
        chosen = layouts.take(index)
        held = _held(schedule, pp, per_rank, micro_batches[index], made)
        mine = {name: column[index] for name, column in saved.items()}
        moments = MOMENTS if problem.pricer.software.measured and pp > 1 else ("any",)
        ranks = largest(
            [
                _of_ranks(problem, chosen, made, mine, at_once, micro_batches[index], moment)
                for at_once, moment in zip(held, moments, strict=False)
            ]
        )
        most = np.argmax(np.sum(list(ranks.values()), axis=0), axis=0)
        at = np.arange(len(index))
        for name in found:
            found[name][index] = ranks[name][most, at]
        rank_of[index] = most
    if device == "cuda":
        groups = sum((layouts.number(axis) > 1).astype(float) for axis in TALKING)
        found["buffers of messages"] = BUFFERS * np.asarray(groups)
        found["context"] = np.full(n, CONTEXT)
    allocated = np.sum(np.stack(list(found.values())), axis=0)
    reserved = allocated / (1 - SLACK) if device == "cuda" else allocated * HEAP
    return Memory(found, allocated, reserved, rank_of)


def _saved(problem: Problem, layouts: Layouts) -> dict[str, Columns]:
    """Bytes that a micro-batch leaves in one layer of each kind ("kind"), while that layer is made again
    ("kind again"), and between the two halves of a backward pass ("kind half": the gradients of what
    products and norms gave), [N]."""
    keys = np.stack([layouts.number(name) for name in KEYS])
    unique, back = unique_columns(keys)
    columns = dict(zip(KEYS, unique, strict=True))
    piece = piece_of(columns, problem.seq_len)
    arch = problem.arch
    ledger = problem.ledger(piece)
    whole = problem.ledger(replace(piece, recompute=np.zeros_like(piece.recompute)))
    size = 4 if problem.precision == "fp32" else 2
    inputs = piece.tokens * arch.hidden_size * size / np.where(piece.sp == 1, piece.tp, 1.0)
    found = {}
    for stage in dict.fromkeys(ledger.stage.tolist()):
        kept = ledger.total("saved", stage=stage, phase="forward")
        if stage not in ("first", "last"):
            least = 1 if problem.pricer.software.keeps_products else 2  # of a layer that is made again
            kept = kept + np.where(piece.recompute >= least, inputs, 0.0)
        everything = whole.total("saved", stage=stage, phase="forward")
        kept = np.minimum(kept, everything)
        found[stage] = kept[back]
        found[f"{stage} again"] = np.maximum(everything - kept, 0.0)[back]
        rows = ledger.where(stage=stage, phase="forward", kind="product")
        rows &= ~np.isin(ledger.name, ATTENTION)
        numbers = ledger.count * ledger.m * ledger.n
        half = numbers[rows].sum(axis=0) * size + 2 * inputs
        if arch.qk_norm:  # what it gave, and its products with the norm's weights
            normed = rows & np.isin(ledger.name, ("attention.wq", "attention.wk"))
            half = half + 2 * numbers[normed].sum(axis=0) * size
        found[f"{stage} half"] = np.broadcast_to(half, piece.tokens.shape)[back]
    return found


def _held(schedule: str, pp: int, per_rank: int, micro_batches: Columns, made: Shape) -> NDArray[np.float64]:
    """Micro-batches of each stage that wait, of how many of these the gradients of inputs are there, and
    whether sums of gradients are, at the moments when they may be most: [4, 3, stages, n], as `fullest`
    has them; [1, 3, stages, n] without a pipeline."""
    num_stages = len(made.by_stage)
    layers = tuple(made.by_stage.sum(axis=1).tolist())
    if pp == 1:
        ones = np.ones((num_stages, len(micro_batches)))
        return np.stack([np.stack([ones, np.zeros_like(ones), ones])])
    chunks = 2 if schedule in V_SHAPED else per_rank
    if schedule == "gpipe":
        whole = np.tile(micro_batches, (num_stages, 1))
        none, every = np.zeros_like(whole), np.ones_like(whole)
        before, after = np.stack([whole, none, none]), np.stack([whole - 1, none, every])
        return np.stack([before, after, before, np.zeros_like(before)])
    unique, back = np.unique(np.minimum(micro_batches, 4 * pp), return_inverse=True)
    by_count = []
    for number in unique:
        count = int(number)
        if chunks > 1 and schedule not in V_SHAPED and count > pp:
            count -= count % pp
        by_count.append(fullest(schedule, pp, chunks, max(count, 1), layers))
    return np.asarray(np.array(by_count)[back.reshape(-1)].transpose(1, 2, 3, 0))


def _of_ranks(
    problem: Problem,
    layouts: Layouts,
    made: Shape,
    saved: dict[str, Columns],
    at_once: NDArray[np.float64],
    micro_batches: Columns,
    moment: Moment,
) -> dict[str, NDArray[np.float64]]:
    """Bytes of each pipeline rank by use, [pp, n]. at_once: of that moment, see `_held`."""
    held, halves, summed = at_once
    arch, software = problem.arch, problem.pricer.software
    dense, routed = np.zeros((2, len(made.first), len(layouts)))
    for ranks in made.alike:
        dense[list(ranks)], routed[list(ranks)] = rank_weights(arch, layouts, made, ranks[0])
    zero, tp = layouts.number("zero"), layouts.number("tp")
    over = layouts.number("dp_shard") * layouts.number("cp")
    over_experts = over * tp / (layouts.number("ep") * np.where(layouts.number("etp") > 1, tp, 1.0))
    over_experts = np.maximum(over_experts, 1.0)
    shards = dense / over + routed / over_experts
    everything = dense + routed
    first, last = made.first[:, None], made.last[:, None]
    head = last * kind_weights(arch, "last")[1] / tp
    edges = first * _edge(arch, "first", tp) + last * _edge(arch, "last", tp)
    if arch.tie_embeddings and len(made.first) == 1:  # stages of a pipeline have one each
        edges = edges - arch.vocab_size * arch.hidden_size / tp
    size = 4.0 if problem.precision == "fp32" else 2.0
    layers = np.maximum(made.counts.sum(axis=1), 1.0)[:, None]
    by_stage = made.recomputed(recomputed_layers(layouts, np.arange(len(layouts))))
    recomputed = made.of_ranks(by_stage)
    kept = np.stack([saved[kind] for kind in made.kinds])
    more = np.stack([saved[f"{kind} again"] for kind in made.kinds])  # of a layer that is not recomputed
    left = made.by_stage[:, :, None] - by_stage
    activations = made.of_ranks(held * (made.by_stage @ kept + (left * more).sum(axis=1)))
    half = np.stack([saved[f"{kind} half"] for kind in made.kinds])
    activations = activations + made.of_ranks(halves * (made.by_stage @ half))
    activations = activations + first * held[0] * saved["first"] + last * held[-1] * saved["last"]
    if software.measured:  # a stage keeps what it has sent on; of an interleaved rank all but its last twice
        sent = layouts.number("micro_batch") * problem.seq_len * arch.hidden_size * size
        sent = sent / (layouts.number("cp") * tp)
        stage, (num_stages, pp) = np.arange(len(held))[:, None], (len(held), len(made.first))
        twice = (stage < num_stages - pp) & ~np.isin(layouts["schedule"], V_SHAPED)
        sent_on = np.where(stage < num_stages - 1, sent, 0.0) * np.where(twice, 2, 1)
        # Gradients of weights that are put off come with those that the stage was given, and gave on.
        activations = activations + made.of_ranks(held * sent_on + halves * 2 * sent)
    again = np.where(recomputed > 0, more, 0.0).max(axis=1)
    tokens = layouts.number("micro_batch") * problem.seq_len / layouts.number("cp")
    if not software.measured:
        loss = last * tokens * arch.vocab_size / tp * (size + 4)
        if software.fp32_weights:
            loss = last * _loss_bytes(problem, tokens, tp) + (4.0 if size == 4 else 8.0) * head
        return _of_peers(problem, layouts, everything, shards, layers, activations + again, loss)
    # What a layer's backward pass has at once beside what was saved: gradients of its widest tensors.
    widest = 3 * arch.intermediate_size + 4 * arch.hidden_size
    optimizer = 8.0 * shards
    if problem.optimizer == "muon":  # one moment of the layers' matrices, which are nearly all of them
        optimizer = optimizer - 4 * ((dense - edges) / over + routed / over_experts)
    # Weights whose sums of gradients are there: of layers in proportion, of a stage's end with the stage.
    share = made.of_ranks(made.by_stage.sum(axis=1)[:, None] * summed) / layers
    ends = first * summed[0] * _edge(arch, "first", tp) + last * summed[-1] * _edge(arch, "last", tp)
    there = share * (everything - edges) + np.minimum(ends, edges)
    needed = Held(
        weights=everything,
        shards=shards,
        summed=there / everything,
        edges=edges,
        embedding=first * kind_weights(arch, "first")[1] / tp,
        head=head,
        tied=arch.tie_embeddings,
        layer=_largest_layer(arch, layouts, made),
        optimizer=optimizer,
        activations=activations,
        of_layer=made.of_ranks(made.by_stage @ kept) / layers,
        again=again,
        recomputed=np.where(layouts.number("recompute") > 0, recomputed.sum(axis=1) / layers, 0.0),
        loss=_loss_bytes(problem, tokens, tp),
        output=tokens * arch.hidden_size * size,
        tp=tp,
        waiting=np.maximum(1.0, held[-1]) * last,
        put_off=np.where(layouts["schedule"] == "gpipe", np.maximum(held[-1] - 1, 0.0), halves[-1]) * last,
        in_halves=bool(halves.any()),
        working=np.broadcast_to(tokens * widest * size / tp, dense.shape),
        last=last,
        size=size,
        zero=zero,
        micro_batches=micro_batches,
        chunks=layouts.number("stages_per_rank"),
        update=_update(problem, layouts, made),
    )
    several = layouts.ranks > 1
    alone, together = most_alone(needed), most(needed, moment)
    return {name: np.where(several, together[name], alone[name]) for name in alone}


def _of_peers(
    problem: Problem,
    layouts: Layouts,
    everything: NDArray[np.float64],
    shards: NDArray[np.float64],
    layers: NDArray[np.float64],
    activations: NDArray[np.float64],
    loss: NDArray[np.float64],
) -> dict[str, NDArray[np.float64]]:
    """Of other programs. everything, shards: numbers of weights on a rank before sharding, and after it."""
    software, zero = problem.pricer.software, layouts.number("zero")
    size = 4.0 if problem.precision == "fp32" else 2.0
    live = np.where(zero >= 3, np.minimum(1.0, LIVE_LAYERS / layers), 1.0)
    if software.fp32_weights:
        # fp32 weights, their gradients and two moments, all sharded; products read gathered copies
        weights = np.where(zero >= 1, shards, everything) * 4
        gradients = np.where(zero >= 2, shards, everything) * 4
        optimizer = np.where(zero >= 1, shards, everything) * 8
        over = layouts.number("dp_shard") * layouts.number("cp")
        copies = everything * live * ((size if size < 4 else 0.0) + np.where(over > 1, 2.0, 0.0))
    else:
        # half weights, gradients of their own type, and fp32 weights and moments of the optimizer
        weights = np.where(zero >= 3, shards, everything) * size
        gradients = np.where(zero >= 2, shards, everything) * software.gradient_bytes
        optimizer = np.where(zero >= 1, shards, everything) * 12
        copies = np.where(zero >= 3, LIVE_LAYERS / layers * everything * size, 0.0)
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": activations,
        "loss or one layer's gradients": loss,
        "copies of weights": copies,
    }


def _update(problem: Problem, layouts: Layouts, made: Shape) -> NDArray[np.float64]:
    """Of Muon's buckets, [pp, n]; AdamW needs nothing."""
    if problem.optimizer != "muon":
        return np.zeros((len(made.first), len(layouts)))
    groups = groups_of(problem, layouts)
    return muon_bytes(problem.arch, layouts, made, problem.precision, groups)


def _largest_layer(arch: Architecture, layouts: Layouts, made: Shape) -> NDArray[np.float64]:
    """Weights of a rank's largest layer, [pp, n]."""
    tp, shared = layouts.number("tp"), layouts.number("ep") * layouts.number("etp")
    found = np.zeros((len(made.first), len(layouts)))
    for kind, counts in zip(made.kinds, made.counts.T, strict=True):
        whole, divided, experts = kind_weights(arch, kind)
        found = np.maximum(
            found, np.where(counts > 0, 1.0, 0.0)[:, None] * (whole + divided / tp + experts / shared)
        )
    return found


def _edge(arch: Architecture, kind: str, tp: Columns) -> Columns:
    """Weights of the "first" or "last" part of a model on a rank."""
    whole, divided, _ = kind_weights(arch, kind)
    return np.asarray(whole + divided / tp)


def _loss_bytes(problem: Problem, tokens: Columns, tp: Columns) -> Columns:
    """The logits of one piece of the chunked loss and what is made of them (`models.loss`)."""
    device, software = problem.pricer.hardware.accelerator.device, problem.pricer.software
    each = [chunk_tokens(int(n), problem.arch.vocab_size, device) for n in np.unique(tokens)]
    chunk = np.array(each)[np.unique(tokens, return_inverse=True)[1].reshape(-1)]
    half = problem.precision != "fp32"
    fused = device == "cuda" and software.elementwise == "fused"
    per_logit = 4.0 if fused or not half else 6.0  # theirs and the gradient's; in fp32 both in one place
    return np.asarray(chunk * problem.arch.vocab_size / tp * per_logit)
