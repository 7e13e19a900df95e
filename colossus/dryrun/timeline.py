"""A priced step in time: of each rank of the pipeline its passes, messages, waiting and memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from colossus.dryrun.price import Piped, standing_for
from colossus.dryrun.rank import Traced
from colossus.dryrun.ranks import DryRun, Judged
from colossus.dryrun.work import ONCE
from colossus.perf.chrome import Trace
from colossus.perf.schedule import Action

PASSES = {"F": "forward", "B": "backward", "I": "backward of inputs", "W": "backward of weights"}
WORKS = "work"
WAITS = "waits for another stage"
ENDS = "clips and updates"


@dataclass(frozen=True)
class Interval:
    """Of a rank of the pipeline. action: the pass that it is; None where it waits, or is at the step's end.
    most, left: bytes of tensors that live in it, and at its end; None where nothing changes."""

    start: float
    seconds: float
    name: str
    action: Action | None = None
    most: int | None = None
    left: int | None = None


def intervals(pool: Piped, rank: int, traced: Traced) -> Iterator[Interval]:
    """What a rank does in a step, one thing after another, from its begin to its end."""
    now, lived = 0.0, _lived(traced, pool)
    for where, start, end, action in pool.line.events:
        if where != rank:
            continue
        if start > now:
            yield Interval(now, start - now, WAITS)
        most, left = lived[action]
        name = f"{PASSES[action.work]} {action.micro_batch}"
        yield Interval(start, end - start, name, action, most, left)
        now = end
    last, once = pool.line.seconds, pool.once[rank].seconds
    if last > now:
        yield Interval(now, last - now, WAITS)
    most, left = traced.lived[ONCE]
    yield Interval(last, once, ENDS, None, most, left)
    if pool.seconds > last + once:
        yield Interval(last + once, pool.seconds - last - once, WAITS)


def _lived(traced: Traced, pool: Piped) -> dict[Action, tuple[int, int]]:
    """Of every pass of a step, from those that were traced."""
    many = 1 + max(action.micro_batch for *_, action in pool.line.events)
    passes = [at for at in traced.lived if at != ONCE]
    few = 1 + max(at.micro_batch for at in passes)
    return {
        Action(at.work, at.stage, index): traced.lived[at]  # type: ignore[arg-type]
        for at in passes
        for index in standing_for(at.micro_batch, few, many)
    }


def trace(found: DryRun) -> Trace:
    """Of every rank of every pool's pipeline, as Chrome and Perfetto show it.

    A lane has the passes, within each what it is spent on; work of a kind and what shows of its messages is
    drawn together, not kernel by kernel. A lane for each axis has all its messages, hidden or not, from the
    begin of their pass on.
    """
    made = Trace()
    for name, pool, rank, judged in ranks_of(found):
        _draw(made, name, pool, rank, judged.traced)
    return made


def ranks_of(found: DryRun) -> Iterator[tuple[str, Piped, int, Judged]]:
    """Every rank of every pool's pipeline that was priced, with a name."""
    assert found.price is not None, "not every stage was run"
    priced = [judged for judged in found.ranks if judged.kind.is_waited_for]
    by_pool = dict.fromkeys(judged.kind.replica for judged in priced)
    for number, (replica, pool) in enumerate(zip(by_pool, found.price.pools, strict=True)):
        ranks = [judged for judged in priced if judged.kind.replica == replica]
        for stage, judged in enumerate(ranks):
            several = f"pool {number}, " if len(by_pool) > 1 else ""
            name = f"{several}rank {judged.kind.rank:,}" + f" (stage {stage})" * (len(ranks) > 1)
            yield name, pool, stage, judged


def _draw(made: Trace, process: str, pool: Piped, rank: int, traced: Traced) -> None:
    lived = sum(traced.at_rest.values())
    made.counter(process, "memory of tensors", 0.0, {"bytes": lived})
    for each in intervals(pool, rank, traced):
        made.span(process, WORKS, each.name, each.start, each.seconds)
        spent = pool.spent[each.action] if each.action is not None else None
        if each.name == ENDS:
            spent = pool.once[rank]
        if spent is None:
            continue
        now = each.start
        for cause, seconds in spent.causes.items():
            made.span(process, WORKS, cause, now, seconds)
            now += seconds
        begins: dict[str, float] = {}
        for cause, seconds in spent.messages.items():
            axis, _, operation = cause.partition(": ")
            start = begins.get(axis, each.start)
            made.span(process, axis, operation, start, seconds, shows=spent.causes.get(cause, 0.0))
            begins[axis] = start + seconds
        if each.most is not None and each.left is not None:
            made.counter(process, "memory of tensors", each.start, {"bytes": each.most})
            made.counter(process, "memory of tensors", each.start + each.seconds, {"bytes": each.left})
