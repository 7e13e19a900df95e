"""The program whose dry run is tested, on real tensors: in real ranks, and in one that talks to nobody."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from colossus.data.loader import Batch
from colossus.dryrun import fake
from colossus.dryrun.fake import fake_world
from colossus.dryrun.rank import Traced, trace
from colossus.dryrun.routing import Routing
from colossus.dryrun.tracer import WAIT, Tracer
from colossus.dryrun.work import Message, product_of
from colossus.job import Job
from colossus.measure.counter import flop_counter
from colossus.models.box import local
from colossus.models.router import Router
from colossus.optim.optimizer import Optimizer
from colossus.parallel import expert
from colossus.parallel.collectives import Group
from colossus.parallel.world import World
from colossus.trainer.state import TrainState
from colossus.trainer.step import train_step

ROW_COUNTS = expert.row_counts  # the program's own


@dataclass
class Done:
    """One step of a real rank, its second."""

    messages: list[Message]
    flops: int
    weights: int
    gradients: int
    optimizer: int


class Listener(Tracer):
    """Hears what a program on real tensors says, and counts what it computes."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if any(kind is not torch.Tensor and kind is not torch.nn.Parameter for kind in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional") and func is not WAIT:
            self._say(func, args, out)
        formula = self._flops_of.get(func._overloadpacket)
        if formula is not None:
            flops = formula(*args, **(kwargs or {}), out_val=out)
            self._did(product_of(func._overloadpacket, args, flops, "all"))
        return out


def really(job: Job) -> Done:
    """As this rank of real ones."""
    experts = job.model.experts is not None
    with World.join(job.layout, "cpu", experts=experts) as world, noted() as gradients:
        state, batch = TrainState.build(job, world), batch_of(job)
        train_step(state, batch, batch.num_tokens_global, 1.0, job, world)
        with Listener(flop_counter().flop_registry) as heard:
            train_step(state, batch, batch.num_tokens_global, 1.0, job, world)
        held = state.optimizer.state()
        counters = 8 + 4 * sum(kind == "exp_avg" for _, kind in held)  # of updates: all, and AdamW's
        return Done(
            heard.messages,
            heard.flops["all"],
            sum(held_by(t) for t in [*state.model.parameters(), *state.model.buffers()]),
            gradients[-1],
            counters + sum(local(t).nbytes for t in held.values()),
        )


def held_by(tensor: torch.Tensor) -> int:
    """Bytes of its memory: FSDP gives every rank as much as the one with the largest shard."""
    return local(tensor).untyped_storage().nbytes()


def dry(job: Job, rank: int, routing: Routing | None = None, **more: Any) -> Traced:
    batch = batch_of(job)
    return trace(job, rank, len(batch.tokens_BT), job.data.seq_len, routing, **more)


@contextmanager
def routes(shares: Sequence[float]) -> Iterator[None]:
    """Within this, routers give experts these shares of visits."""

    def choose(router: Router, scores_BTX: torch.Tensor) -> torch.Tensor:
        batch, num, _ = scores_BTX.shape
        per_token = router.settings.per_token
        counts = [share * batch * num * per_token for share in shares]
        assert all(count == int(count) for count in counts), "a histogram that rows can follow exactly"
        visits_M = torch.arange(len(shares)).repeat_interleave(torch.tensor(counts).int())
        return visits_M.view(per_token, -1).T.reshape(batch, num, per_token)  # a token's are different ones

    with patch.object(Router, "_choose", choose):
        yield


def really_routed(job: Job, shares: Sequence[float]) -> Done:
    with routes(shares):
        return really(job)


def allocated_routed(job: Job, rank: int, shares: Sequence[float]) -> tuple[int, int]:
    """As `allocated`, with the program's own counts of rows: every rank sends the same, so that this one's
    tell what comes. (Gloo's threads let go of a message when they are next awake: no test can wait for it.)
    """

    def counted(counts_X: torch.Tensor, group: Group, *_: Any) -> torch.Tensor:
        return counts_X.view(group.size, -1)[group.rank].repeat(group.size)

    with (
        routes(shares),
        patch.object(expert, "all_to_all", counted),
        patch.object(fake, "_row_counts", lambda loads, rank, *given: ROW_COUNTS(*given)),
    ):
        return allocated(job, rank)


def dry_gradients(job: Job, rank: int) -> tuple[Traced, int]:
    """And the bytes of gradients that its update finds."""
    with noted() as gradients:
        return dry(job, rank), gradients[-1]


@contextmanager
def noted() -> Iterator[list[int]]:
    """Bytes of the gradients that each update finds."""
    found, plain = list[int](), Optimizer.step

    def step(self: Optimizer, *arguments: Any) -> None:
        found.append(sum(local(p.grad).nbytes for p in self._parameters if p.grad is not None))
        plain(self, *arguments)

    with patch.object(Optimizer, "step", step):
        yield found


def allocated(job: Job, rank: int) -> tuple[int, int]:
    """(the most that its second step has at once, what lives after it), by PyTorch's allocator."""
    gc.collect()  # what an earlier call in this process has left would be let go of in between
    with fake_world(job, rank) as world, ExitStack() as stack:
        seen = stack.enter_context(profile(activities=[ProfilerActivity.CPU], profile_memory=True))
        state = TrainState.build(job, world)
        for _ in range(2):
            batch = batch_of(job)
            with torch.profiler.record_function("step"):
                train_step(state, batch, batch.num_tokens_global, 1.0, job, world)
        del batch
        stack.close()
    events = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    begin = max(event.start_ns() for event in events if event.name() == "step")
    now = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now) if event.start_ns() >= begin else most
    return most, now


def batch_of(job: Job) -> Batch:
    rows = job.run.global_batch // job.layout.dp
    tokens_BT = torch.zeros(rows, job.data.seq_len, dtype=torch.int64)
    everywhere = tokens_BT.numel() * job.layout.dp
    return Batch(0, 0, tokens_BT, tokens_BT.clone(), None, everywhere, everywhere)
