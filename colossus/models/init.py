"""Initial values: element k of a parameter is a function of (seed, the parameter's name, k) alone.

So every rank computes its own shard, of any layout, without the others, and a CPU and a GPU agree.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence

import torch
from torch import nn
from torch._subclasses import FakeTensor

from colossus.architecture import Architecture, Parameter, parameter_table
from colossus.models.box import box, local

CHUNK = 2**16  # elements at once: their temporaries stay in a core's cache (2^18: 0.8 of the speed)


def initialise(model: nn.Module, arch: Architecture, seed: int) -> None:
    """Fills the parameters of `model`, sharded (DTensors) or whole, as the parameter table says.

    A model that is a part of `arch` (a pipeline stage) is filled the same way; a parameter that the table
    does not know is a programmer's fault.
    """
    table = {parameter.name: parameter for parameter in parameter_table(arch)}
    for name, tensor in model.named_parameters():
        parameter = table[logical_name(name)]
        assert tuple(tensor.shape) == parameter.shape, (
            f"{name}: {tuple(tensor.shape)} is not {parameter.shape}"
        )
        initialise_parameter(tensor.detach(), parameter, seed)
    for buffer in model.buffers():  # what training moves otherwise than by a gradient
        buffer.zero_()


def logical_name(name: str) -> str:
    """A parameter's name without what compilation, recomputation and pipelines put in."""
    name = re.sub(r"^parts\.\d+\.", "", name)
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def kept_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that a model is saved with, by their logical names."""
    kept = {logical_name(name) for name in model.state_dict()}
    named = ((logical_name(name), buffer) for name, buffer in model.named_buffers())
    return {name: buffer for name, buffer in named if name in kept}


def initialise_parameter(tensor: torch.Tensor, parameter: Parameter, seed: int) -> None:
    """Fills one parameter, or this rank's shard of it."""
    here = local(tensor)
    if parameter.init == "normal":
        offsets, _ = box(tensor)
        fill_normal(here, parameter.shape, offsets, parameter.std, stream_keys(seed, parameter.name))
    else:
        here.fill_(parameter.scale.init if parameter.init == "ones" else 0.0)


def stream_keys(seed: int, name: str) -> tuple[int, int]:
    """Two 64-bit keys (signed) of the random stream of a parameter."""
    digest = hashlib.blake2b(f"initial value,{seed},{name}".encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little", signed=True), int.from_bytes(
        digest[8:], "little", signed=True
    )


def fill_normal(
    local: torch.Tensor, shape: Sequence[int], offsets: Sequence[int], std: float, keys: tuple[int, int]
) -> None:
    """Fills the block `local` of a tensor of `shape`, which begins at `offsets`, with normal values. On the
    meta device, and of a dry run's tensors, there are none."""
    if local.numel() == 0 or local.is_meta or isinstance(local, FakeTensor):
        return
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    rows = torch.zeros((1,), dtype=torch.int64, device=local.device)
    for size, offset, stride in zip(local.shape[:-1], offsets[:-1], strides[:-1], strict=True):
        along = torch.arange(offset, offset + size, device=local.device) * stride
        rows = (rows[:, None] + along[None, :]).flatten()
    assert local.is_contiguous(), "initial values are written through a view"
    local_RC = local.view(rows.numel(), local.shape[-1])
    width = min(CHUNK, local_RC.shape[1])
    height = max(1, CHUNK // width)
    for column in range(0, local_RC.shape[1], width):
        end = min(column + width, local_RC.shape[1])
        columns = torch.arange(offsets[-1] + column, offsets[-1] + end, device=local.device)
        for row in range(0, rows.numel(), height):
            index = rows[row : row + height, None] + columns[None, :]
            local_RC[row : row + height, column:end] = normal(index, keys).mul_(std)


def normal(index: torch.Tensor, keys: tuple[int, int]) -> torch.Tensor:
    """Standard normal values in float64, one for each int64 of `index`, which is overwritten.

    The finaliser of splitmix64 (Steele, Lea, Flood 2014; constants of Stafford's variant 13) makes 64
    random bits of each index; two halves go through Box and Muller. In float64, so that devices whose
    logarithms differ in the last place still round to the same fp32.
    """
    bits = index.mul_(_signed(0x9E3779B97F4A7C15)).add_(keys[0])
    bits = bits.bitwise_xor_(_shift(bits, 30)).mul_(_signed(0xBF58476D1CE4E5B9)).add_(keys[1])
    bits = bits.bitwise_xor_(_shift(bits, 27)).mul_(_signed(0x94D049BB133111EB))
    bits = bits.bitwise_xor_(_shift(bits, 31))
    # (n + 1/2) / 2^32 is never 0 nor 1; the largest value is sqrt(2 ln 2^33) = 6.8 deviations.
    radius = _shift(bits, 32).double().add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    angle = bits.bitwise_and_(0xFFFFFFFF).double().mul_(2.0 * math.pi * 2.0**-32)
    return radius.mul_(angle.cos_())


def _shift(bits: torch.Tensor, by: int) -> torch.Tensor:
    """Logical shift to the right of int64 taken as unsigned."""
    return (bits >> by).bitwise_and_((1 << (64 - by)) - 1)


def _signed(constant: int) -> int:
    """A 64-bit constant as the int64 of the same bits."""
    return constant - 2**64 if constant >= 2**63 else constant
