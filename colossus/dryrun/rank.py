"""The real program as a rank of any world: the same build, step and optimizer, on tensors without numbers."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses import FakeTensorMode
from torch.distributed.fsdp._fully_shard import _fsdp_collectives, _fsdp_param, _fsdp_param_group
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils import checkpoint

from colossus import optim
from colossus.data.loader import Batch
from colossus.dryrun import attention, owners
from colossus.dryrun.fake import fake_world
from colossus.dryrun.refused import refusals
from colossus.dryrun.replay import Replay
from colossus.dryrun.routing import Routing
from colossus.dryrun.tracer import Moment, Tracer, by_what, settled
from colossus.dryrun.work import Message, Pass, Work
from colossus.job import Job
from colossus.layout import ZERO_BUBBLE
from colossus.measure.counter import flop_counter
from colossus.parallel import data, pipeline, program
from colossus.parallel.apply import materialise, transformed
from colossus.parallel.mesh import Place
from colossus.parallel.program import decoders
from colossus.precision import torch_type
from colossus.trainer import step as step_module
from colossus.trainer.state import TrainState

# Rates and the like, where a job leaves them open: they change no shape.
ANY = {"name": "adamw", "lr": 1e-3, "matrix_lr": 1e-3, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95,
       "eps": 1e-8, "momentum": 0.95, "grad_clip": 1.0, "z_loss": 0.0}  # fmt: skip

Said = tuple[str, str, int]  # axis, operation, ranks


@dataclass(frozen=True)
class Traced:
    """One step of one rank. Bytes are those of its tensors.

    peak: the most that lived at once. at_rest: what lives between steps, by use. flops: executed products, by
    phase. host_reads: how often the host waited for a number. num_operators: that PyTorch was asked for.
    messages: in their order. passes: what each pass does, and how often; lived: the most that lives in it,
    and what lives at its end. Where fewer micro batches were traced than there are, these three are of them,
    and `totals` of all.
    """

    rank: int
    place: Place
    num_micro_batches: int
    peak: Moment
    at_rest: dict[str, int]
    flops: dict[str, int]
    messages: list[Message]
    passes: dict[Pass, dict[Work, int]]
    lived: dict[Pass, tuple[int, int]]
    host_reads: int
    num_operators: int
    seconds: float
    totals: dict[Said, tuple[int, int]] | None = None

    def said(self) -> dict[Said, tuple[int, int]]:
        """How often, and how many bytes, by (axis, operation, ranks); in the order of their first time."""
        if self.totals is not None:
            return self.totals
        found: dict[Said, tuple[int, int]] = {}
        for message in self.messages:
            key = (message.group, message.operation, message.size)
            times, num_bytes = found.get(key, (0, 0))
            found[key] = times + 1, num_bytes + message.num_bytes
        return found


def trace(
    job: Job,
    rank: int,
    num_rows: int,
    seq_len: int,
    routing: Routing | None = None,
    *,
    replay: bool = True,
    steps: int = 1,
) -> Traced:
    """Takes `steps` as rank `rank` of the job's world; the last one counts. The first is like all others.

    num_rows: sequences of a step that this rank sees. routing: of tokens to experts; None: all get alike.
    replay: layers stand for those that are alike.

    Raises:
        UserError: something in the program needs the numbers of a tensor; with the module and the operator.
    """
    began = time.perf_counter()
    job = as_traced(job)
    tracer = Tracer(flop_counter(attention.FLOPS).flop_registry)
    replayed = Replay(tracer, in_halves=job.layout.schedule in ZERO_BUBBLE)
    with fake_world(job, rank, routing) as world, ExitStack() as stack:
        model = transformed(job, world)
        stack.enter_context(_told(tracer))
        stack.enter_context(replayed.told())
        if job.fleet.device == "cuda":
            stack.enter_context(attention.as_on_gpu())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(tracer)
        with tracer.of("weights"):
            materialise(model, job, world.device)
        with tracer.of("optimizer"):
            optimizer = optim.build(model, job.model, job.optimizer, torch_type(job.precision.type))
        owners.call_weights(tracer, model)
        owners.call_state(tracer, optimizer)
        stack.enter_context(owners.told(tracer, model))
        mesh = None if world.meshes is None else world.meshes.dense
        state = TrainState(job.model, model, optimizer, mesh=mesh)
        for decoder in decoders(model):
            decoder.hardware = job.fleet.device or "cpu"
            decoder.fused_attention = job.fleet.device == "cuda"
            if replay:
                replayed.of(decoder)
        for _ in range(steps):
            with tracer.of("batch"):
                tokens_BT = torch.zeros(num_rows, seq_len, dtype=torch.int64)
                everywhere = num_rows * seq_len * job.layout.dp
                batch = Batch(state.step, 0, tokens_BT, tokens_BT.clone(), None, everywhere, everywhere)
            tracer.forget()
            with refusals(model):
                step_module.train_step(state, batch, everywhere, 1.0, job, world)
            owners.call_weights(tracer, model)  # FSDP makes some anew
        micro_batch = job.layout.of_replica(world.place.dp_replicate).micro_batch
        return Traced(
            rank=rank,
            place=world.place,
            num_micro_batches=-(-num_rows // micro_batch),
            peak=replace(tracer.peak, by_owner=settled(tracer.peak.by_owner)),
            at_rest=by_what(tracer.by_use),
            flops=dict(tracer.flops),
            messages=tracer.messages,
            passes=_by_pass(tracer.done),
            lived=dict(tracer.lived),
            host_reads=sum(tracer.host_reads.values()),
            num_operators=tracer.num_operators,
            seconds=time.perf_counter() - began,
        )


def _by_pass(done: list[tuple[Pass, Work]]) -> dict[Pass, dict[Work, int]]:
    found: dict[Pass, Counter[Work]] = {}
    for at, work in done:
        found.setdefault(at, Counter())[work] += 1
    return {at: dict(work) for at, work in found.items()}


def as_traced(job: Job) -> Job:
    """With what is open filled in. A compiler does nothing here: layers are traced as they are written."""
    layout = job.layout.filled().model_copy(update={"compile": False, "async_tp": False})
    open_ = {name: value for name, value in ANY.items() if getattr(job.optimizer, name) is None}
    arch = job.model
    if arch.initializer_range is None:
        arch = arch.model_copy(update={"initializer_range": 0.02})
    precision = job.precision.model_copy(update={"type": job.precision.type or "bf16"})
    return replace(
        job,
        model=arch,
        layout=layout,
        precision=precision,
        optimizer=job.optimizer.model_copy(update=open_),
        run=job.run.model_copy(update={"seed": job.run.seed or 0}),
    )


@contextmanager
def _told(tracer: Tracer) -> Iterator[None]:
    """Has the program say to the tracer which pass and phase it is in, and FSDP what it allocates for.
    PyTorch's own bookkeeping, which tries operators on whole tensors, is no part of the program."""
    with ExitStack() as stack:

        def within(owner: Any, name: str, context: Callable[[], AbstractContextManager[None]]) -> None:
            method = getattr(owner, name)

            def wrapped(*args: Any, **kwargs: Any) -> Any:
                with context():
                    return method(*args, **kwargs)

            stack.enter_context(patch.object(owner, name, wrapped))

        def passes(owner: Any, name: str, work: Callable[..., str]) -> None:
            method = getattr(owner, name)

            def wrapped(stage: Any, chunk: int, *args: Any, **kwargs: Any) -> Any:
                with tracer.within(Pass(work(*args, **kwargs), stage.stage_index, chunk)):
                    return method(stage, chunk, *args, **kwargs)

            stack.enter_context(patch.object(owner, name, wrapped))

        def begin(*args: Any, **kwargs: Any) -> None:  # of each micro batch without a pipeline
            tracer.at = Pass(micro_batch=tracer.at.micro_batch + 1)
            prepare(*args, **kwargs)

        prepare = data.prepare_backward
        stack.enter_context(patch.object(program, "prepare_backward", begin))
        passes(pipeline._Stage, "forward_one_chunk", lambda *_, **__: "F")
        passes(pipeline._Stage, "backward_one_chunk", _backward)
        passes(pipeline._Stage, "backward_weight_one_chunk", lambda *_, **__: "W")
        hook = checkpoint._recomputation_hook
        enter, leave = hook.__enter__, hook.__exit__

        def entered(self: Any) -> Any:
            tracer.is_again = True
            return enter(self)

        def left(self: Any, *error: Any) -> Any:
            tracer.is_again = False
            return leave(self, *error)

        stack.enter_context(patch.object(hook, "__enter__", entered))
        stack.enter_context(patch.object(hook, "__exit__", left))
        # Marks for a profiler: a tenth of all operators.
        stack.enter_context(patch.object(_fsdp_param_group, "record_function", nullcontext))
        within(step_module, "forward_backward", partial(tracer.during, "forward"))
        within(step_module, "clip_gradients", partial(tracer.during, "clip"))
        within(optim.Optimizer, "step", partial(tracer.during, "update"))
        within(_fsdp_collectives.DefaultAllocMixin, "allocate", partial(tracer.of, "messages"))
        for name in ("init_all_gather_outputs", "alloc_all_gather_outputs"):
            within(_fsdp_param.FSDPParam, name, partial(tracer.of, "gathered weights"))
        for name in ("to_accumulated_grad_if_needed", "accumulate_unsharded_grad_if_needed"):
            within(_fsdp_param.FSDPParam, name, partial(tracer.of, "gradients"))
        for name in ("_propagate_tensor_meta_non_cached", "propagate_op_sharding_non_cached"):
            if hasattr(ShardingPropagator, name):
                within(ShardingPropagator, name, tracer.paused)
        yield


def _backward(loss: Any = None, full_backward: bool = True, last_backward: bool = False) -> str:
    """What PyTorch calls a stage's backward pass with, as an action."""
    return "B" if full_backward else "I"
