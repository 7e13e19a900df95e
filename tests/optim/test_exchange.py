"""Matrices of real ranks, each made orthogonal once in the world, while others travel."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from colossus.architecture import parameter_table
from colossus.optim.adamw import AdamW
from colossus.optim.exchange import at_owners
from colossus.optim.muon import Muon
from colossus.optim.optimizer import MUON_GROUPS
from colossus.optim.owners import Bucket, Matrix, families_of
from colossus.parallel.world import World
from colossus.trainer.state import TrainState
from tests.ranks.cases import Case
from tests.ranks.pool import Pool

MIXTRAL = {"preset": "mixtral-8x7b", "optimizer": "muon"}
LATENT = {"preset": "deepseek-v3", "optimizer": "muon"}
SMALL = 600  # elements: so that each bucket has about as many matrices as owners


@dataclass
class Seen:
    """Of one rank. worked: matrices that it made orthogonal in an update, by shape. events: of an update in
    small buckets, "begin", "wait" and "work" in their order. differ: what came out otherwise than from
    buckets one by one. num_buckets: of the largest family. before: messages that had begun at AdamW's."""

    worked: Counter[tuple[int, int]] = field(default_factory=Counter)
    events: list[str] = field(default_factory=list)
    differ: list[int] = field(default_factory=list)
    num_buckets: int = 0
    before: int = 0


class Heard:
    """A message that tells when it is waited for."""

    def __init__(self, work: Any, events: list[str]) -> None:
        self.work, self.events = work, events

    def wait(self) -> None:
        self.events.append("wait")
        self.work.wait()


def seen(job: Any) -> Seen:
    """As this rank of the job's world."""
    with World.join(job.layout, "cpu", experts=job.model.experts is not None) as world:
        state = TrainState.build(job, world)
        for parameter in state.model.parameters():
            parameter.grad = parameter.detach().clone()
        muon = state.optimizer._muon
        assert muon is not None
        found = Seen()
        real = muon._orthogonalised

        def counted(matrices_NOI: torch.Tensor) -> torch.Tensor:
            found.worked[tuple(matrices_NOI.shape[1:])] += len(matrices_NOI)
            return real(matrices_NOI)

        with told(begun := []), patch.object(muon, "_orthogonalised", counted):
            adamw = AdamW.step
            found.before = -1

            def stepped(*args: Any) -> None:
                if found.before < 0:
                    found.before = begun.count("begin")
                adamw(*args)

            with patch.object(AdamW, "step", stepped):
                state.optimizer.step(1.0)
        small = families_of(matrices_of(muon), SMALL)
        found.num_buckets = max(len(family) for family in small)
        one_by_one = made(muon, [[bucket] for family in small for bucket in family], real)
        with told(found.events):
            together = made(muon, small, lambda x: (found.events.append("work"), real(x))[1])
        assert together.keys() == one_by_one.keys() == set(range(len(muon._places)))
        found.differ = [i for i, part in together.items() if not torch.equal(part, one_by_one[i])]
        return found


def matrices_of(muon: Muon) -> list[Matrix]:
    known = {i: m for family in muon._families for bucket in family for i, m in bucket.matrices.items()}
    return [known[index] for index in range(len(known))]


@torch.no_grad()
def made(muon: Muon, families: list[list[Bucket]], work: Callable[..., Any]) -> dict[int, torch.Tensor]:
    return {i: part for parts in at_owners(families, muon._nesterov, work) for i, part in parts.items()}


def told(events: list[str]) -> Any:
    begin = dist.all_to_all_single

    def heard(*args: Any, **kwargs: Any) -> Heard:
        assert kwargs["async_op"]
        events.append("begin")
        return Heard(begin(*args, **kwargs), events)

    return patch.object(dist, "all_to_all_single", heard)


CASES = [
    Case.of(dp_replicate=2, dp_shard=2, optimizer="muon"),
    Case.of(dp_replicate=2, dp_shard=2, ep=2, **MIXTRAL),
    Case.of(dp_replicate=2, tp=2, **LATENT),
    Case.of(dp_shard=2, tp=2, **LATENT),  # some matrices are cut along both axes, some along one
    Case.of({"experts.num_experts": 2}, dp_shard=4, ep=2, **MIXTRAL),
    Case.of({"num_layers": 4}, dp_shard=2, tp=2, ep=2, etp=2, **MIXTRAL),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_matrix_is_made_orthogonal_once_in_the_world_while_others_travel(case: Case, pool: Pool) -> None:
    """Copies of replicas, of tp and of ep too; in any order of exchanges the same bits."""
    job = case.job()
    ranks = pool.run(4, seen, job)
    expected = Counter[tuple[int, int]]()
    for row in parameter_table(job.model):
        if row.group in MUON_GROUPS:
            expected[row.shape[-2], row.shape[-1]] += math.prod(row.shape[:-2])
    assert sum((rank.worked for rank in ranks), Counter()) == expected
    for rank in ranks:
        assert rank.worked and not rank.differ
        assert rank.before == 1  # the first of the turn, and no more
        # Some are worked on while another arrives and one returns.
        assert rank.num_buckets > 2 and max(under_way(rank.events)) >= 2


def under_way(events: list[str]) -> Iterator[int]:
    """Messages at each piece of work."""
    now = 0
    for event in events:
        if event == "work":
            yield now
        now += {"begin": 1, "wait": -1, "work": 0}[event]
    assert not now
