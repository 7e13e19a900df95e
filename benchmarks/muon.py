"""What an update of Muon takes on four ranks whose matrices have owners, beside ranks that each do all.

The peer is what Muon over FSDP2 does where nothing is shared out: every rank gathers every matrix and makes
all of them orthogonal, those of one shape at once. Both update the same model of 12M parameters from the same
gradients, in turns; what they write is compared. So are buckets that travel beside the work, and the same
ones, each of which is back before the next leaves: as it is here, where messages are work of the same cores,
and where a message takes as long as over a slow network. Ranks have one thread each. At last, what the update
of 405B takes on 16,384 GPUs, by the plan's formulas.

    python -m benchmarks.muon [--quick] [--out FILE] [--turns N]
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, distribute_tensor

import colossus
from benchmarks.overhead import job_of
from benchmarks.ranks import Ranks
from colossus.architecture import num_parameters
from colossus.job import Job, load_job
from colossus.measure.machine import this_machine
from colossus.models.box import local
from colossus.optim.exchange import at_owners
from colossus.optim.muon import Muon, orthogonalised
from colossus.optim.owners import families_of, matrix_of
from colossus.parallel.apply import build
from colossus.parallel.world import World
from colossus.perf.receipts import Figure, print_figures, write_receipt
from colossus.planner.estimate import groups_of
from colossus.planner.muon import muon_bytes, muon_update
from colossus.planner.plan import layouts_of_row
from colossus.precision import torch_type

LAYOUTS: dict[str, dict[str, Any]] = {
    "FSDP2 over 4 ranks": {"dp_shard": 4},
    "4 copies": {"dp_replicate": 4},
}
GOAL = ">= 3"
SLOW = ", slow"  # of a way: no message arrives sooner than at this rate
RATE = 50e6  # bytes/s
WAYS = ("owners", "everywhere", "buckets", "one by one", f"buckets{SLOW}", f"one by one{SLOW}")
ROOM = 2**19  # elements of an owner in a bucket: so that this model has several


def everywhere(muon: Muon, matmul_type: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
    """As `at_owners`, by every rank for itself."""
    by_shape: dict[torch.Size, list[int]] = {}
    for index, parameter in enumerate(muon.parameters):
        by_shape.setdefault(parameter.shape, []).append(index)
    for indices in by_shape.values():
        wholes = []
        for index in indices:
            mesh, places = spread(muon.parameters[index])
            wholes.append(DTensor.from_local(muon._nesterov(index), mesh, places).full_tensor())
        for index, made in zip(indices, orthogonalised(torch.stack(wholes), matmul_type), strict=True):
            mesh, places = spread(muon.parameters[index])
            yield index, distribute_tensor(made, mesh, places, src_data_rank=None).to_local()


def spread(parameter: torch.Tensor) -> tuple[DeviceMesh, tuple[Placement, ...]]:
    assert isinstance(parameter, DTensor)
    return parameter.device_mesh, parameter.placements


@contextlib.contextmanager
def rank(job: Job, kind: str) -> Iterator[Callable[[str], tuple[float, float]]]:
    """In a process: gives what makes all updates by one of the `WAYS`; (seconds, how far the last are from
    those of "everywhere", in parts of the largest) is its answer."""
    torch.set_num_threads(1)
    matmul_type = torch_type(kind)
    with World.join(job.layout, "cpu") as world:
        model = build(job, world)
        weights = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
        muon = Muon(weights, lr=1e-2, momentum=0.95, weight_decay=0.1, matmul_type=matmul_type)
        for parameter in weights:
            parameter.grad = parameter.detach().clone()
        matrices = [matrix_of(parameter) for parameter in weights]
        work = partial(orthogonalised, matmul_type=matmul_type)
        small = families_of(matrices, ROOM)
        families = {
            "owners": families_of(matrices),
            "buckets": small,
            "one by one": [[bucket] for family in small for bucket in family],
        }
        reference: dict[int, torch.Tensor] = {}

        @torch.no_grad()
        def act(way: str) -> tuple[float, float]:
            world.sum([0.0])  # all begin together
            began = time.perf_counter()
            if way == "everywhere":
                made = dict(everywhere(muon, matmul_type))
            else:
                with slow_network() if way.endswith(SLOW) else contextlib.nullcontext():
                    turns = at_owners(families[way.removesuffix(SLOW)], muon._nesterov, work)
                    made = {index: part for parts in turns for index, part in parts.items()}
            seconds = time.perf_counter() - began
            reference.update(made if way == "everywhere" else {})
            others = reference or made
            far = max(float((made[i] - others[i]).abs().max() / made[i].abs().max()) for i in made)
            assert all(made[i].shape == local(weights[i]).shape for i in range(len(weights)))
            return seconds, far

        yield act


class Late:
    """A message that has not arrived before it has travelled."""

    def __init__(self, work: Any, num_bytes: int) -> None:
        self.work, self.arrives = work, time.perf_counter() + num_bytes / RATE

    def wait(self) -> None:
        self.work.wait()
        time.sleep(max(0.0, self.arrives - time.perf_counter()))


def slow_network() -> contextlib.AbstractContextManager[Any]:
    begin = dist.all_to_all_single

    def late(got: torch.Tensor, sent: torch.Tensor, *args: Any, **kwargs: Any) -> Late:
        return Late(begin(got, sent, *args, **kwargs), max(got.nbytes, sent.nbytes))

    return patch.object(dist, "all_to_all_single", late)


def measure(quick: bool, turns: int) -> list[Figure]:
    kind = this_machine().best.type
    figures: list[Figure] = []
    for name, layout in LAYOUTS.items():
        job = job_of(quick, kind, False, layout | {"zero": 1, "micro_batch": 1})
        if not figures:
            figures.append(Figure("parameters", num_parameters(job.model), "parameters"))
        with Ranks(job.layout.num_ranks, rank, job, kind) as ranks:
            for way in WAYS:
                ranks.all(way)
            took: dict[str, list[float]] = {way: [] for way in WAYS}
            far = 0.0
            for _ in range(turns):
                for way, column in took.items():
                    answer = ranks.all(way)
                    column.append(max(seconds for seconds, _ in answer))
                    far = max(far, *(each for _, each in answer))
        ours, theirs = (statistics.median(took[way]) for way in ("owners", "everywhere"))
        gain = ratio(took["everywhere"], took["owners"])
        figures.append(Figure(name, ours, f"s an update, {kind}", None, theirs, ours / theirs))
        figures.append(Figure(f"{name}: times as fast as everywhere", gain, "times", GOAL))
        for network in ("", SLOW):
            beside = ratio(took[f"one by one{network}"], took[f"buckets{network}"])
            told = f"{name}: buckets beside the work, times as fast as one by one{network}"
            figures.append(Figure(told, beside, "times", None))
        figures.append(Figure(f"{name}: farthest from the other way", far, "of the largest", None))
        print_figures(figures[-5:])
    return figures


def planned() -> list[Figure]:
    """Of the plan's best layout."""
    words = ["model=llama3.1-405b", "fleet.accelerator=h100-sxm", "fleet.count=16384", "run.tokens=15e12"]
    plan = colossus.plan(load_job(None, [*words, "optimizer.name=muon"]))
    of, row = plan.problem, plan.best.row
    layouts, made = layouts_of_row(row), of.shape(row["schedule"], row["pp"], row["stages_per_rank"])
    groups = groups_of(of, layouts)
    muon = muon_update(of.arch, layouts, made, of.pricer, of.precision, groups)
    num_bytes = muon_bytes(of.arch, layouts, made, of.precision, groups).max()
    name = "405B on 16,384 H100"
    print(f"{name}: {plan.best.name}")
    return [
        Figure(f"{name}: a step", plan.best.seconds, "s"),
        Figure(f"{name}: Muon's products, of the busiest owner", float(muon.work[0]), "s"),
        Figure(f"{name}: Muon's messages", float(muon.messages[0]), "s"),
        Figure(f"{name}: of these no work hides", float(muon.shown[0]), "s"),
        Figure(f"{name}: an owner's buckets", float(num_bytes) / 2**30, "GiB"),
    ]


def ratio(theirs: list[float], ours: list[float]) -> float:
    """Of what was measured in turns."""
    return statistics.median(there / here for here, there in zip(ours, theirs, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a small model, few turns")
    parser.add_argument("--out", help="the receipt")
    parser.add_argument("--turns", type=int, help="of each layout; by default 15, quick 3")
    arguments = parser.parse_args()
    turns = arguments.turns or (3 if arguments.quick else 15)
    figures = measure(arguments.quick, turns)
    if not arguments.quick:
        figures += planned()
        print_figures(figures[-5:])
    write_receipt("muon", figures, arguments.out, this_machine().to_dict())


if __name__ == "__main__":
    main()
