"""What each rank of a pipeline has, by the rule that its program deals out layers with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from colossus.architecture import Architecture
from colossus.layout import V_SHAPED
from colossus.perf.schedule import stages_of
from colossus.perf.stages import stages
from colossus.planner.formulas import layer_counts


def layers_of_stages(num_layers: int, num_stages: int) -> list[int]:
    """Layers of each stage, by their number: the rule of Megatron-LM and its kind. What does not divide
    goes to the middle: the first stage also has the embedding, the last the output head. With two layers
    fewer than fill the stages, these two have one less."""
    each, rest = divmod(num_layers, num_stages)
    if num_stages - rest == 2 and num_stages > 2:
        return [each, *[each + 1] * (num_stages - 2), each]
    first = 1 if 0 < rest <= num_stages - 2 else 0
    return [each + (first <= stage < first + rest) for stage in range(num_stages)]


@dataclass(frozen=True)
class Shape:
    """What a pipeline's ranks have. counts: layers [pp, kinds]; by_stage: [stages, kinds]; first, last: which
    ranks have the embedding and the head. ahead: how many layers of a kind are among
    the first of a stage, [stages, 1 + layers, kinds]. alike: ranks that have the same."""

    kinds: tuple[str, ...]
    counts: NDArray[np.float64]
    by_stage: NDArray[np.float64]
    first: NDArray[np.float64]
    last: NDArray[np.float64]
    owner: tuple[int, ...]
    ahead: NDArray[np.float64]
    alike: tuple[tuple[int, ...], ...]

    def recomputed(self, layers: NDArray[np.float64] | None) -> NDArray[np.float64]:
        """Of each stage, how many layers of a kind are recomputed, where its first `layers` [N] are (None:
        all): [stages, kinds, N or 1]."""
        if layers is None:
            return self.by_stage[:, :, None]
        index = np.minimum(layers, self.most_layers).astype(np.intp)
        return np.asarray(self.ahead[:, index].transpose(0, 2, 1))

    def of_ranks(self, by_stage: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sums [pp, ...] of [stages, ...] over the stages of each rank."""
        out = np.zeros((len(self.first), *by_stage.shape[1:]))
        np.add.at(out, list(self.owner), by_stage)
        return out

    @property
    def most_layers(self) -> int:
        """Of a stage."""
        return self.ahead.shape[1] - 1


@lru_cache(maxsize=4096)
def shape(
    arch: Architecture, schedule: str, pp: int, per_rank: int, seq_len: int, rule: Literal["flops", "layers"]
) -> Shape:
    """Of an architecture over `pp` ranks with `per_rank` stages each. rule: `Software.stages`."""
    if schedule in V_SHAPED and pp > 1:
        per_rank = 2
    kinds = layer_counts(arch)
    num_stages = pp * per_rank
    names = {layer: kind for kind, layers in kinds.items() for layer in layers}
    order = list(kinds)
    if rule == "flops":
        dealt = [len(layers) for layers in stages(arch, num_stages, seq_len)]
    else:
        dealt = layers_of_stages(arch.num_layers, num_stages)
    ends = np.cumsum([0, *dealt])
    each = np.eye(len(kinds))[[order.index(names[layer]) for layer in range(arch.num_layers)]]
    ahead = np.zeros((num_stages, 1 + max(dealt), len(kinds)))
    for stage, (begin, end) in enumerate(pairwise(ends)):
        ahead[stage, 1 : 1 + end - begin] = np.cumsum(each[begin:end], axis=0)
        ahead[stage, 1 + end - begin :] = ahead[stage, end - begin]
    by_stage = ahead[:, -1].copy()
    owner = [0] * num_stages
    for rank in range(pp):
        for stage in stages_of(schedule, rank, pp, per_rank):
            owner[stage] = rank
    counts = np.zeros((pp, len(kinds)))
    np.add.at(counts, owner, by_stage)
    first, last = np.zeros(pp), np.zeros(pp)
    first[owner[0]] = last[owner[-1]] = 1.0
    has: dict[tuple[Any, ...], list[int]] = {}
    for rank in range(pp):
        own = [ahead[stage].tobytes() for stage in range(num_stages) if owner[stage] == rank]
        has.setdefault((first[rank], last[rank], *own), []).append(rank)
    alike = tuple(map(tuple, has.values()))
    return Shape(tuple(order), counts, by_stage, first, last, tuple(owner), ahead, alike)
