"""Memory of a rank, by use: from the parameter table, the ledger's saved bytes and the schedule."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from colossus.hardware.catalogue import Accelerator
from colossus.layout import V_SHAPED
from colossus.perf.ledger import Columns
from colossus.perf.schedule import in_flight
from colossus.planner.columns import Layouts
from colossus.planner.estimate import KEYS, Problem, rank_weights, shapes_of
from colossus.planner.formulas import layers_ledger, piece_of
from colossus.planner.stages import Shape

GIB = 2**30
CONTEXT = 0.6 * GIB  # of CUDA and its libraries' workspaces
BUFFERS = 0.25 * GIB  # of NCCL, for each group of several ranks that a rank is in
SLACK = 0.06  # of what is reserved, that no tensor fills: SimuMax measures 0.94 on B200
LOSS_TOKENS = 1024.0  # of a piece of the chunked loss
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


def memory(problem: Problem, layouts: Layouts) -> Memory:
    """What layouts need on their pipeline rank that needs most."""
    device = problem.pricer.hardware.accelerator.device
    n = len(layouts)
    saved = _saved(problem, layouts)
    found = {name: np.zeros(n) for name in
             ("weights", "gradients", "optimizer", "activations", "logits", "gathered weights")}  # fmt: skip
    rank_of = np.zeros(n, dtype=np.intp)
    micro_batches = layouts.micro_batches(problem.global_batch)
    for (schedule, pp, per_rank), index in shapes_of(layouts).items():
        made = problem.shape(schedule, pp, per_rank)
        chosen = layouts.take(index)
        held = _held(schedule, pp, per_rank, micro_batches[index], len(made.by_stage))
        ranks = [
            _rank(problem, chosen, made, rank, {k: v[index] for k, v in saved.items()}, held)
            for rank in range(pp)
        ]
        totals = np.stack([sum(parts.values()) for parts in ranks])  # type: ignore[arg-type]
        most = np.argmax(totals, axis=0)
        at = np.arange(len(index))
        for name in found:
            found[name][index] = np.stack([parts[name] for parts in ranks])[most, at]
        rank_of[index] = most
    if device == "cuda":
        groups = sum(
            (layouts.number(a) > 1).astype(float)
            for a in ("tp", "cp", "pp", "dp_shard", "dp_replicate", "ep")
        )
        found["buffers of messages"] = BUFFERS * np.asarray(groups)
        found["context"] = np.full(n, CONTEXT)
    allocated = np.sum(np.stack(list(found.values())), axis=0)
    reserved = allocated / (1 - SLACK) if device == "cuda" else allocated * 1.0
    return Memory(found, allocated, reserved, rank_of)


def _saved(problem: Problem, layouts: Layouts) -> dict[str, Columns]:
    """Bytes that a micro-batch leaves in one layer of each kind ("kind"), and while that layer is made again
    ("kind again"), [N]."""
    keys = np.stack([layouts.number(name) for name in KEYS])
    unique, back = np.unique(keys, axis=1, return_inverse=True)
    back = back.reshape(-1)
    columns = dict(zip(KEYS, unique, strict=True))
    piece = piece_of(columns, problem.seq_len)
    software, arch = problem.pricer.software, problem.arch
    ledger = layers_ledger(arch, piece, software, problem.precision)
    whole = layers_ledger(
        arch, replace(piece, recompute=np.zeros_like(piece.recompute)), software, problem.precision
    )
    size = 4 if problem.precision == "fp32" else 2
    inputs = piece.tokens * arch.hidden_size * size / np.where(piece.sp == 1, piece.tp, 1.0)
    found = {}
    for stage in dict.fromkeys(ledger.stage.tolist()):
        kept = ledger.total("saved", stage=stage, phase="forward")
        if stage not in ("first", "last"):
            kept = kept + np.where(piece.recompute == 2, inputs, 0.0)
        everything = whole.total("saved", stage=stage, phase="forward")
        found[stage] = kept[back]
        found[f"{stage} again"] = np.maximum(everything - kept, 0.0)[back]
    return found


def _held(schedule: str, pp: int, per_rank: int, micro_batches: Columns, num_stages: int) -> list[Columns]:
    """The most micro-batches of each stage that wait at once, [stages] of [n]."""
    if pp == 1:
        return [np.ones(len(micro_batches))] * num_stages
    chunks = 2 if schedule in V_SHAPED else per_rank
    if schedule == "gpipe":
        return [micro_batches] * num_stages
    unique, back = np.unique(np.minimum(micro_batches, 4 * pp), return_inverse=True)
    by_count = []
    for count in unique:
        whole = int(count)
        if chunks > 1 and schedule not in V_SHAPED and whole > pp:
            whole -= whole % pp
        by_count.append(in_flight(schedule, pp, chunks, max(whole, 1)))
    table = np.array(by_count)
    return [table[back.reshape(-1), stage] for stage in range(num_stages)]


def _rank(
    problem: Problem,
    layouts: Layouts,
    made: Shape,
    rank: int,
    saved: dict[str, Columns],
    held: list[Columns],
) -> dict[str, Columns]:
    arch, software = problem.arch, problem.pricer.software
    dense, routed = rank_weights(arch, layouts, made, rank)
    zero, tp = layouts.number("zero"), layouts.number("tp")
    over = layouts.number("dp_shard") * layouts.number("cp")
    over_experts = over * tp / (layouts.number("ep") * np.where(layouts.number("etp") > 1, tp, 1.0))
    over_experts = np.maximum(over_experts, 1.0)
    shards = dense / over + routed / over_experts
    everything = dense + routed
    size = 4.0 if problem.precision == "fp32" else 2.0
    layers = max(made.counts[rank].sum(), 1.0)
    if software.fp32_weights:
        # fp32 weights, their gradients and two moments, all sharded; products read gathered copies
        weights = np.where(zero >= 1, shards, everything) * 4
        gradients = np.where(zero >= 2, shards, everything) * 4
        optimizer = np.where(zero >= 1, shards, everything) * 8
        live = np.where(zero >= 3, np.minimum(1.0, LIVE_LAYERS / layers), 1.0)
        copies = (size if size < 4 else 0.0) * everything * live + np.where(
            over > 1, 4 * everything * live * 0.5, 0
        )
    else:
        # half weights, gradients of their own type, and fp32 weights and moments of the optimizer
        weights = np.where(zero >= 3, shards, everything) * size
        gradients = np.where(zero >= 2, shards, everything) * software.gradient_bytes
        optimizer = np.where(zero >= 1, shards, everything) * 12
        copies = np.where(zero >= 3, LIVE_LAYERS / layers * everything * size, 0.0)
    activations = np.zeros(len(layouts))
    again = np.zeros(len(layouts))
    for stage, owner in enumerate(made.owner):
        if owner != rank:
            continue
        layer_bytes = np.zeros(len(layouts))
        for kind, count in zip(made.kinds, made.by_stage[stage], strict=True):
            if count:
                layer_bytes = layer_bytes + count * saved[kind]
                again = np.maximum(again, saved[f"{kind} again"])
        activations = activations + held[stage] * layer_bytes
    if made.first[rank]:
        activations = activations + saved["first"]
    logits = np.zeros(len(layouts))
    if made.last[rank]:
        activations = activations + saved["last"]
        tokens = layouts.number("micro_batch") * problem.seq_len / layouts.number("cp")
        logits = np.minimum(tokens, LOSS_TOKENS) * arch.vocab_size / tp * (size + 8)
        if not software.fp32_weights:
            logits = tokens * arch.vocab_size / tp * (size + 4)
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": activations + again,
        "logits": logits,
        "gathered weights": copies,
    }
