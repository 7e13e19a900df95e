"""How many layers must be recomputed so that activations fit into what was asked for."""

from __future__ import annotations

import math

from colossus.architecture import Architecture
from colossus.errors import UserError
from colossus.job import Job
from colossus.perf.parts import kernel_of, parts
from colossus.perf.stages import stages

TYPE_BYTES = {"fp32": 4, "bf16": 2, "fp64": 8}


def is_open(job: Job) -> bool:
    """Whether a budget of activations has not decided yet how many layers are recomputed."""
    undecided = job.layout.recompute_layers is None or job.asked_for("layout.recompute_layers")
    return job.layout.activation_gib is not None and undecided


def derive_recompute(job: Job, seq_len: int) -> Job:
    """`layout.recompute` and `recompute_layers` from `layout.activation_gib`, where it is given; and
    `recompute` where it is known how many layers.

    Raises:
        UserError: even with every layer recomputed, activations take more; or both were given.
    """
    budget, given = job.layout.activation_gib, job.asked_for("layout.recompute_layers")
    if budget is None:
        is_left = job.layout.recompute in (None, "none") and not job.asked_for("layout.recompute")
        of_some = given and job.layout.recompute_layers and is_left and not job.layout.pools
        return job.put({"layout.recompute": "full"}, "derived") if of_some else job
    if given:
        raise UserError(
            f"layout.recompute_layers={job.layout.recompute_layers}: layout.activation_gib says how many "
            "layers are recomputed; leave one of them out"
        )
    if job.asked_for("layout.recompute") and job.layout.recompute != "full":
        raise UserError(
            f"layout.recompute={job.layout.recompute}: layout.activation_gib says how many layers are "
            "recomputed in full; full, or leave one of them out"
        )
    layers, least = layers_to_recompute(job, seq_len, budget * 2**30)
    if layers is None:
        raise UserError(
            f"layout.activation_gib={budget:g}: with every layer recomputed, activations of a micro batch of "
            f"{job.layout.micro_batch} still take {least / 2**30:.2g} GiB; at least that, or a smaller "
            "layout.micro_batch"
        )
    values = {"layout.recompute": "full" if layers else "none", "layout.recompute_layers": layers}
    return job.put(values, "derived")


def check_recompute(job: Job) -> None:
    """Raises `UserError` where layers are to be recomputed and nothing of them is."""
    layout = job.layout
    ways = {layout.recompute, *(pool.recompute or layout.recompute for pool in layout.pools or ())}
    if layout.recompute_layers and job.asked_for("layout.recompute_layers") and ways <= {"none", None}:
        raise UserError(
            f"layout.recompute_layers={layout.recompute_layers}: under layout.recompute=none no layer is "
            "recomputed; full or selective, or layout.recompute_layers=0"
        )


def layers_to_recompute(job: Job, seq_len: int, budget_bytes: float) -> tuple[int | None, float]:
    """So many of each stage, the fewest under which no rank keeps more than `budget_bytes`; None where none
    suffices. And the bytes that are kept where all are recomputed."""
    arch, layout = job.model, job.layout.filled()
    saved, kept = layer_bytes(arch, seq_len, TYPE_BYTES[job.precision.type], job.fleet.device or "cpu")
    tokens = layout.micro_batch * seq_len / (layout.cp * layout.tp)
    micro_batches = math.ceil(job.run.global_batch / (layout.dp * layout.micro_batch))
    # As many micro batches are under way in a rank's stages as the pipeline has; under GPipe all.
    under_way = micro_batches if layout.schedule == "gpipe" else min(micro_batches, layout.num_stages)
    per_stage = max(len(stage) for stage in stages(arch, layout.num_stages, job.data.seq_len))

    def needed(recomputed: int) -> float:
        return under_way * tokens * ((per_stage - recomputed) * saved + recomputed * kept)

    found = next((n for n in range(per_stage + 1) if needed(n) <= budget_bytes), None)
    return found, needed(per_stage)


def layer_bytes(arch: Architecture, seq_len: int, type_bytes: int, device: str) -> tuple[float, float]:
    """Bytes a token that the dearest kind of layer keeps for its backward pass; and its input alone."""
    by_kind: dict[object, float] = {}
    for part in parts(arch, seq_len, kernel=kernel_of(arch, seq_len, device), type_bytes=type_bytes):
        if part.kind is not None:
            by_kind[part.kind] = by_kind.get(part.kind, 0.0) + part.saved_bytes
    return max(by_kind.values()), arch.hidden_size * type_bytes
