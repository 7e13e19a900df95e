"""A dry run in words."""

from __future__ import annotations

from colossus.dryrun.host import host_of
from colossus.dryrun.ranks import DryRun, Judged
from colossus.dryrun.rows import KINDS
from colossus.dryrun.work import stream_of
from colossus.planner.plan import size_words
from colossus.words import count, duration, memory, plural, span

NO_LAYER = "the model itself, as its loss"
MODULES = 8  # owners of memory that are named
SHOWN = 0.005  # of the most that lives: uses that take less are left out
NAMES = {
    "forward": "activations and what layers compute with",
    "backward": "gradients under way, and layers computed again",
    "messages": "buffers of messages",
    "batch": "the batch",
    "clip": "clipping",
    "update": "the update",
    "step": "else",
}
TIMES = {
    "memory-bound": "what lies between products",
    "recomputation": "layers computed again",
    "host": "kernels that wait for the host",
    "bubble": "waiting for other stages",
    "update": "the update of the weights",
}
PRICED = "priced as `colossus plan` prices"


def text(found: DryRun) -> str:
    """The whole report for a terminal."""
    sections = [_head(found), verdict(found), _table(found), _memory(found.worst), _said(found.worst)]
    sections += [_computed(found.worst), _time(found), _host(found), _reads(found), list(found.notes)]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def name_of(found: DryRun) -> str:
    """The layout in words."""
    layout = found.job.layout
    names = ("dp_replicate", "dp_shard", "pp", "cp", "tp", "ep", "etp")
    axes = [f"{name}={getattr(layout, name)}" for name in names if getattr(layout, name) > 1]
    if layout.pp > 1:
        chunks = f" x{layout.stages_per_rank}" if layout.stages_per_rank > 1 else ""
        axes.append(f"{layout.schedule}{chunks}")
    return " ".join([*axes, f"micro_batch={layout.micro_batch}", f"recompute={layout.recompute}"])


def _head(found: DryRun) -> list[str]:
    job, worst = found.job, found.worst
    name = job.model.preset or "model"
    ranks = plural(job.layout.num_ranks, "rank")
    length = max(seq_len for _, _, seq_len in job.shapes())
    return [
        f"{name} ({size_words(job.model)}) on {found.hardware.name}: {ranks}",
        name_of(found),
        f"{plural(worst.traced.num_micro_batches, 'micro-batch')} a step, of "
        f"{job.layout.of_replica(worst.kind.replica).micro_batch} x {length:,} tokens",
    ]


def verdict(found: DryRun) -> list[str]:
    """Whether it fits, and if not, with what change."""
    worst = found.worst
    most = f"{memory(worst.reserved)} of {memory(worst.kind.accelerator.memory)}"
    where = _place(worst)
    if worst.fused:
        where += f" ({memory(worst.fused)} less for what compiling fuses, by the planner)"
    if found.fits:
        return [f"fits: {most} on {where}, {memory(worst.margin)} to spare"]
    largest = sorted(worst.traced.peak.by_use.items(), key=lambda item: -item[1])[:2]
    words = " and ".join(f"{memory(size)} {NAMES.get(use, use)}" for use, size in largest)
    lines = [f"does not fit: {most} on {where}; most of it {words}"]
    if found.mend is None:
        return [*lines, "none of the small changes that were tried makes it fit"]
    change, after = found.mend
    most = f"{memory(after.worst.reserved)} of {memory(after.worst.kind.accelerator.memory)}"
    return [*lines, f"fits with {change} ({most})"]


def _place(judged: Judged) -> str:
    stage = f" (stage {judged.kind.stage} of the pipeline)" if judged.kind.stage else ""
    return f"rank {judged.kind.rank:,}{stage}"


def _table(found: DryRun) -> list[str]:
    lines = [
        f"{'rank':>9} {'stage':>5} {'alike':>8}  {'tensors':>9}  {'reserved':>9}  {'between':>9}  most in"
    ]
    for judged in found.ranks:
        traced = judged.traced
        lines.append(
            f"{judged.kind.rank:>9,} {judged.kind.stage:>5} {judged.kind.count:>8,}  "
            f"{memory(traced.peak.num_bytes):>9}  {memory(judged.reserved):>9}  "
            f"{memory(sum(traced.at_rest.values())):>9}  {traced.peak.phase}"
        )
    return lines


def _memory(judged: Judged) -> list[str]:
    peak = judged.traced.peak
    lines = [f"what lives on {_place(judged)} when that is most, {memory(peak.num_bytes)}:"]
    for what, size in sorted(peak.by_use.items(), key=lambda item: -item[1]):
        if size > SHOWN * peak.num_bytes:
            lines.append(f"{memory(size):>11}  {NAMES.get(what, what)}")
    lines.append("its largest owners (a path with * is of all such layers together):")
    owned = [(use, size) for use, size in peak.largest() if size > SHOWN * peak.num_bytes]
    for use, size in owned[:MODULES]:
        lines.append(f"{memory(size):>11}  {use.owner or NO_LAYER}: {NAMES.get(use.what, use.what)}")
    return lines


def _said(judged: Judged) -> list[str]:
    said = judged.traced.said()
    if not said:
        return []
    lines = ["what it says to others in a step:"]
    for (axis, operation, size), (times, num_bytes) in said.items():
        name = operation.strip("_")
        words = KINDS.get(name, name).replace("_", " ") if name != "broadcast" else name
        where = f", stream {stream_of(axis, operation)}"
        lines.append(f"{memory(num_bytes):>11}  {axis} ({size:,}): {words}, {plural(times, 'time')}{where}")
    return lines


def _computed(judged: Judged) -> list[str]:
    flops = judged.traced.flops
    by_phase = ", ".join(f"{phase} {count(number)}" for phase, number in flops.items())
    waits = plural(judged.traced.host_reads, "time")
    return [
        f"products of {count(sum(flops.values()))} FLOP ({by_phase}); the host waits for a number {waits}"
    ]


def _time(found: DryRun) -> list[str]:
    """What a step takes, and where that goes on the rank of the pipeline that works most."""
    priced = found.price
    if priced is None:
        return []
    pool = priced.slowest
    causes, told = pool.causes(pool.busiest), pool.messages(pool.busiest)
    stage = f" of stage {pool.busiest}" if found.job.layout.pp > 1 else ""
    lines = [
        f"a step takes {span(priced.seconds)}, {priced.tokens_per_second:,.0f} tokens/s, MFU "
        f"{100 * priced.mfu:.1f}% ({PRICED}); on a rank{stage}:"
    ]
    for cause, seconds in sorted(causes.items(), key=lambda item: -item[1]):
        if seconds < SHOWN * priced.seconds:
            continue
        whole = f" that shows of {span(told[cause])}" if cause in told else ""
        lines.append(
            f"{span(seconds):>11}  {100 * seconds / priced.seconds:5.1f}%  {TIMES.get(cause, cause)}{whole}"
        )
    hidden = sum(told.values()) - sum(causes.get(cause, 0.0) for cause in told)
    if hidden > SHOWN * priced.seconds:
        lines.append(f"{span(hidden):>11}  of messages hide behind that")
    return lines


def _host(found: DryRun) -> list[str]:
    """Host memory of a node, by estimate; checkpoints and restarts."""
    host = host_of(found)
    total = memory(sum(host.memory.values()))
    lines = [f"host memory of a node of {plural(host.ranks, 'rank')}, by estimate: {total}"]
    lines += [f"{memory(value):>11}  {use}" for use, value in host.memory.items()]
    often = "" if host.interval is None else f", every {duration(host.interval)} where failures are many"
    lines.append(
        f"a checkpoint has {memory(host.checkpoint)}, {memory(host.of_rank)} of a rank; it stops training "
        f"for {duration(host.save_seconds)}{often}"
    )
    lines.append(
        f"a start reads as much; from a failure until steps go on {duration(host.restart_seconds)} pass "
        "(seconds are assumptions of the fleet)"
    )
    return lines


def _reads(found: DryRun) -> list[str]:
    """What the start reads of the checkpoint that it goes on from."""
    reads = found.reads
    if reads is None:
        return []
    whole, most = int(reads.storage.sum()), reads.of_rank(reads.most)
    source = reads.source
    written = f"{plural(source.writers.num, 'rank')} {'wrote' if source.is_there else 'write'}"
    lines = [
        f"going on from {source.path}, which {written}: "
        f"a start reads {memory(whole)} from storage, {whole / reads.state:.2f} times what it has; rank "
        f"{most['rank']:,} most, {memory(most['storage_bytes'])}",
        f"{'rank':>9} {'stage':>5} {'alike':>8}  {'mean':>9}  {'most':>9}  {'on rank':>9}  {'files':>6}  "
        "passed on to it",
    ]
    for judged in found.ranks:
        kind = judged.kind
        told = reads.of_kind(kind.replica, kind.stage, kind.count)
        one = told["most"]
        lines.append(
            f"{kind.rank:>9,} {kind.stage:>5} {kind.count:>8,}  {memory(told['mean_storage_bytes']):>9}  "
            f"{memory(one['storage_bytes']):>9}  {one['rank']:>9,}  {one['files']:>6,}  "
            f"{memory(one['received_bytes'])}"
        )
    return lines
