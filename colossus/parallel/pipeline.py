"""Pipeline parallelism: stages of the model on different ranks, by PyTorch's schedules.

Every rank of a pipeline is given the same rows; activations and their gradients go from stage to stage.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class
from torch.distributed.tensor import DTensor

from colossus.job import Job
from colossus.layout import ZERO_BUBBLE, Layout
from colossus.models import Decoder
from colossus.parallel.collectives import Group, all_reduce
from colossus.parallel.data import end_backward, prepare_backward
from colossus.parallel.world import World
from colossus.perf.schedule import stages_of
from colossus.perf.stages import stages

CLASSES = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved_1f1b": "Interleaved1F1B",
    "interleaved_zero_bubble": "InterleavedZeroBubble",
    "zbv_zero_bubble": "ZBVZeroBubble",
    "dualpipe_v": "DualPipeV",
}


def cut(job: Job, world: World) -> list[Decoder]:
    """The stages of the model that this rank has, in the order of the forward pass."""
    layout = job.layout
    if layout.pp == 1:
        return [Decoder(job.model)]
    assert world.meshes is not None
    layers = stages(job.model, layout.num_stages, job.data.seq_len)
    return [Decoder(job.model, layers[index]) for index in own_stages(layout, world.meshes.place.pp)]


def own_stages(layout: Layout, rank: int) -> list[int]:
    """Which stages rank `rank` of a pipeline has."""
    return stages_of(layout.schedule, rank, layout.pp, layout.stages_per_rank)


class _Whole(nn.Module):
    """A stage in which PyTorch's pipelines see no FSDP, of which they know ZeRO's first level alone: they
    would gather a stage at once, and sum its gradients after the last micro batch."""

    def __init__(self, part: Decoder) -> None:
        super().__init__()
        self.part = part

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.part(*args, **kwargs)


class _Stage(PipelineStage):
    """Gives FSDP its say over each micro batch, and messages room while they are needed: PyTorch's own has
    buffers for all micro batches of a step."""

    def __init__(self, part: Decoder, zero: int, **known: Any) -> None:
        super().__init__(_Whole(part), **known)
        self._part, self._zero = part, zero

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        _let_go(self.args_recv_info[fwd_chunk_id])
        return output

    def backward_one_chunk(
        self, chunk: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        prepare_backward(self._part, self._zero, last=last_backward)
        super().backward_one_chunk(chunk, loss, full_backward, last_backward)
        if not self.is_last:
            _let_go(self.grad_recv_info[chunk])
        elif full_backward:
            loss.detach_()  # the schedule keeps it, and behind it lie the activations that were received

    def backward_weight_one_chunk(self, chunk: int, last_backward: bool = False) -> None:
        prepare_backward(self._part, self._zero, last=False)  # such a pass may need weights to its end
        super().backward_weight_one_chunk(chunk, last_backward)
        end_backward(self._part, last=False)
        if last_backward:  # by now all gradients have one type, also where this was the only micro batch
            prepare_backward(self._part, self._zero, last=True)
            end_backward(self._part, last=True)

    def get_fwd_recv_ops(self, chunk: int) -> list[dist.P2POp]:
        _make_room(self.args_recv_info[chunk], self.device)
        return super().get_fwd_recv_ops(chunk)

    def get_bwd_recv_ops(self, chunk: int) -> list[dist.P2POp]:
        if not self.is_last:
            _make_room(self.grad_recv_info[chunk], self.device)
        return super().get_bwd_recv_ops(chunk)

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        with self._without_room():
            return super()._prepare_forward_infra(*args, **kwargs)

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        with self._without_room():
            return super()._prepare_backward_infra(*args, **kwargs)

    @contextlib.contextmanager
    def _without_room(self) -> Iterator[None]:
        device, self.device = self.device, torch.device("meta")
        try:
            yield
        finally:
            self.device = device

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """Before PyTorch 2.13 a rank that has neighbouring stages greets itself, which gloo cannot."""
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]


def _make_room(messages: Sequence[Any], device: torch.device) -> None:
    for message in messages:
        known = getattr(message, "buffer", None)  # not what the first stage is given by its caller
        if known is not None and known.is_meta:
            message.buffer = torch.empty_like(known, device=device).requires_grad_(known.requires_grad)


def _let_go(messages: Sequence[Any]) -> None:
    for message in messages:
        known = getattr(message, "buffer", None)
        if known is not None and not known.is_meta:
            message.buffer = torch.empty_like(known, device="meta").requires_grad_(known.requires_grad)


class Pipeline(nn.Module):
    """This rank's stages, and the schedule around them."""

    def __init__(self, parts: list[Decoder], job: Job, world: World) -> None:
        super().__init__()
        assert world.meshes is not None
        self.parts = nn.ModuleList(parts)
        self.arch = job.model
        self._layout, self._device = job.layout, world.device
        self._group, self._ends = world.meshes.pp, world.meshes.ends
        self._indices = own_stages(job.layout, world.meshes.place.pp)
        self._tied = job.model.tie_embeddings
        self._schedules: dict[tuple[int, ...], tuple[Any, list[PipelineStage]]] = {}
        self._z_loss, self._num_targets = 0.0, torch.ones(())
        for part in parts:
            part.register_forward_pre_hook(partial(_as_decoder_takes, self), with_kwargs=True)
            part.register_forward_hook(_loss_alone)
            assert part.whole is not None
            part.whole.keep_gradients = job.layout.schedule in ZERO_BUBBLE

    @property
    def decoders(self) -> list[Decoder]:
        return list(self.parts)  # type: ignore[arg-type]

    @property
    def copies(self) -> list[torch.Tensor]:
        """Parameters of this rank that the first stage has, too."""
        if not self._tied:
            return []
        return [part.embedding.weight for part in self.decoders if part.is_last and not part.is_first]  # type: ignore[union-attr]

    def forward_backward(
        self,
        micro_batches: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]],
        token_share: Callable[[torch.Tensor], torch.Tensor],
        num_targets: torch.Tensor,
        z_loss: float,
    ) -> torch.Tensor:
        """The summed loss of this rank's tokens, 0 where it has not the last stage; gradients are left."""
        tokens_BT, targets_BT = (torch.cat([part[i] for part in micro_batches]) for i in (0, 1))  # type: ignore[misc]
        rows = {"tokens_BT": tokens_BT, "targets_BT": targets_BT, "token_share": token_share(targets_BT)}
        if micro_batches[0][2] is not None:
            rows["documents_BT"] = torch.cat([part[2] for part in micro_batches])  # type: ignore[misc]
        self._z_loss, self._num_targets = z_loss, num_targets
        schedule, stages_here = self._schedule(len(micro_batches), micro_batches[0][0].shape)
        losses: list[torch.Tensor] = []
        begin = (tokens_BT,) if 0 in self._indices else ()
        end = {"target": targets_BT, "losses": losses} if self.decoders[-1].is_last else {}
        schedule.step(*begin, **end, **rows, return_outputs=False)
        for stage in stages_here:  # else its outputs keep the graph behind them, and us, until the next step
            stage.clear_runtime_states()
        for part in self.decoders:  # the first call of a schedule may try a pass
            part.loads = part.loads[-len(micro_batches) :]
            part.z_terms = part.z_terms[-len(micro_batches) :]
        self._sum_tied_gradients()
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        return sum((loss.detach().double().sum() for loss in losses), total) * num_targets

    @torch.no_grad()
    def forward(self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Without gradients: (summed loss of this rank's tokens, 0 where it has not the last stage; number of
        targets)."""
        x_BTD: torch.Tensor | None = None
        loss = torch.zeros((), dtype=torch.float64, device=self._device)
        ranks = dist.get_process_group_ranks(self._group)
        for stage in range(self._layout.num_stages):
            owner = self._owner(stage)
            if owner == dist.get_group_rank(self._group, dist.get_rank()):
                part = self.decoders[self._indices.index(stage)]
                first = tokens_BT if x_BTD is None else x_BTD
                if stage and self._owner(stage - 1) != owner:
                    first = torch.empty(self._activation(part, tokens_BT.shape), device=self._device)
                    first = first.to(part.compute_dtype)
                    dist.recv(first, ranks[self._owner(stage - 1)], self._group)
                x_BTD = part(first, tokens_BT=tokens_BT, targets_BT=targets_BT, z_loss=0.0)
                if part.is_last:
                    loss += x_BTD.double().sum()
                elif self._owner(stage + 1) != owner:
                    dist.send(x_BTD.contiguous(), ranks[self._owner(stage + 1)], self._group)
        return loss, (targets_BT >= 0).sum()

    def _owner(self, stage: int) -> int:
        """The rank in the pipeline that has a stage."""
        return next(r for r in range(self._layout.pp) if stage in own_stages(self._layout, r))

    def _activation(self, part: Decoder, shape: Sequence[int]) -> tuple[int, int, int]:
        """Of what goes from stage to stage, for rows of such a shape."""
        assert part.whole is not None
        padded, _, _ = part.whole.pad(torch.empty(*shape, device="meta"), None, None)
        length = padded.shape[1] // (self._layout.cp * self._layout.tp)
        return shape[0], length, part.arch.hidden_size

    def _schedule(self, num_micro_batches: int, shape: Sequence[int]) -> tuple[Any, list[PipelineStage]]:
        key = (num_micro_batches, *shape)
        if key not in self._schedules:
            made = [
                self._stage(part, index, shape)
                for part, index in zip(self.decoders, self._indices, strict=True)
            ]
            kind = get_schedule_class(CLASSES[self._layout.schedule])
            first: Any = made[0] if issubclass(kind, PipelineScheduleSingle) else made
            schedule = kind(first, num_micro_batches, loss_fn=self._share_of_loss, scale_grads=False)
            self._schedules[key] = schedule, made
        return self._schedules[key]

    def _stage(self, part: Decoder, index: int, shape: Sequence[int]) -> PipelineStage:
        x = torch.empty(self._activation(part, shape), dtype=part.compute_dtype, device="meta")
        x.requires_grad_()
        tokens = torch.empty(*shape, dtype=torch.int64, device="meta")
        loss = torch.empty(1, dtype=torch.promote_types(part.compute_dtype, torch.float32), device="meta")
        return _Stage(
            part,
            self._layout.zero,
            stage_index=index,
            num_stages=self._layout.num_stages,
            device=self._device,
            input_args=(tokens if part.is_first else x,),
            output_args=(loss.requires_grad_() if part.is_last else x,),
            group=self._group,
        )

    def _share_of_loss(self, loss: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        return loss.sum() / self._num_targets.to(loss.dtype)

    def _sum_tied_gradients(self) -> None:
        """The embedding of the first stage and the output matrix of the last are one parameter."""
        if not self._tied:
            return
        ends = [part.embedding.weight for part in self.decoders if part.is_first or part.is_last]  # type: ignore[union-attr]
        grads = [_local_gradient(weight) for weight in ends]
        if len(grads) == 2:
            grads[0].add_(grads[1])
            grads[1].copy_(grads[0])
        elif grads:
            assert self._ends is not None
            grads[0].copy_(all_reduce(grads[0], Group(self._ends)))


def _local_gradient(weight: torch.Tensor) -> torch.Tensor:
    grad = weight.grad
    assert grad is not None
    return grad.to_local() if isinstance(grad, DTensor) else grad


def _as_decoder_takes(
    pipeline: Pipeline, part: Decoder, args: tuple[torch.Tensor], kwargs: dict[str, Any]
) -> tuple[tuple[()], dict[str, Any]]:
    """A stage is called with what the one before it gave, and everything else by name."""
    first = {} if part.is_first else {"x_BTD": args[0]}
    return (), {"z_loss": pipeline._z_loss} | kwargs | first


def _loss_alone(part: Decoder, args: Any, output: Any) -> torch.Tensor:
    return output[0].reshape(1) if part.is_last else output
