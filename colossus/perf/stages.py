"""Which layers each stage of a pipeline has, so that the dearest stage costs as little as can be."""

from __future__ import annotations

from functools import lru_cache

from colossus.architecture import Architecture
from colossus.perf.parts import layer_kinds, parts


@lru_cache(maxsize=1024)
def stages(arch: Architecture, num_stages: int, seq_len: int) -> tuple[range, ...]:
    """Layers of each stage, at least one, by the FLOPs of a forward pass; the head is the last stage's.

    The dearest stage is as cheap as it can be; among such cuts late stages take as much as that allows: the
    earlier a stage, the more micro batches wait in it.
    """
    costs, head = layer_costs(arch, seq_len)
    assert 1 <= num_stages <= len(costs), f"{num_stages} stages of {len(costs)} layers"
    fitting = _bounds(arch, seq_len)
    lo, hi = 0, len(fitting) - 1
    while lo < hi:
        middle = (lo + hi) // 2
        if _cut(costs, head, num_stages, fitting[middle]) is None:
            lo = middle + 1
        else:
            hi = middle
    cut = _cut(costs, head, num_stages, fitting[lo])
    assert cut is not None
    return cut


@lru_cache(maxsize=64)
def _bounds(arch: Architecture, seq_len: int) -> list[float]:
    """Every cost that a stage can have and which no cut is below, in order: the same for all cuts."""
    costs, head = layer_costs(arch, seq_len)
    low, high = max(*costs, costs[-1] + head), sum(costs) + head
    ends = range(1, len(costs) + 1)
    bounds = {sum(costs[a:b]) + (head if b == len(costs) else 0) for b in ends for a in range(b)}
    return sorted(bound for bound in bounds if low <= bound <= high)


@lru_cache(maxsize=64)
def layer_costs(arch: Architecture, seq_len: int) -> tuple[tuple[float, ...], float]:
    """Executed FLOPs a token, forward: of each layer, and of the output with its loss."""
    by_kind: dict[object, float] = {}
    head = 0.0
    for part in parts(arch, seq_len):
        if part.kind is not None:
            by_kind[part.kind] = by_kind.get(part.kind, 0.0) + part.executed
        else:
            head += part.executed
    costs = [0.0] * arch.num_layers
    for kind, layers in layer_kinds(arch).items():
        for layer in layers:
            costs[layer] = by_kind[kind]
    return tuple(costs), head


def _cut(costs: tuple[float, ...], head: float, num_stages: int, bound: float) -> tuple[range, ...] | None:
    """Stages of at most `bound`; from the last to the first as long as leaves earlier ones a layer each."""
    found: list[range] = []
    end, cost = len(costs), head
    for stage in reversed(range(num_stages)):
        begin = end
        while begin > stage and cost + costs[begin - 1] <= bound:
            begin -= 1
            cost += costs[begin]
        if begin == end or (stage == 0 and begin > 0):
            return None
        found.append(range(begin, end))
        end, cost = begin, 0.0
    return tuple(reversed(found))
