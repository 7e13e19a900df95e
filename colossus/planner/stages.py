"""What each rank of a pipeline has, by the rule that its program deals out layers with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

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
    ranks have the embedding and the head."""

    kinds: tuple[str, ...]
    counts: NDArray[np.float64]
    by_stage: NDArray[np.float64]
    first: NDArray[np.float64]
    last: NDArray[np.float64]
    owner: tuple[int, ...]


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
    by_stage = np.zeros((num_stages, len(kinds)))
    if rule == "flops":
        dealt = [len(layers) for layers in stages(arch, num_stages, seq_len)]
    else:
        dealt = layers_of_stages(arch.num_layers, num_stages)
    layer = 0
    for stage, count in enumerate(dealt):
        for _ in range(count):
            by_stage[stage, order.index(names[layer])] += 1
            layer += 1
    owner = [0] * num_stages
    for rank in range(pp):
        for stage in stages_of(schedule, rank, pp, per_rank):
            owner[stage] = rank
    counts = np.zeros((pp, len(kinds)))
    np.add.at(counts, owner, by_stage)
    first, last = np.zeros(pp), np.zeros(pp)
    first[owner[0]] = last[owner[-1]] = 1.0
    return Shape(tuple(order), counts, by_stage, first, last, tuple(owner))
