"""Rotary positions, plain and as stretched by Llama 3.1 or YaRN."""

from __future__ import annotations

import math

import torch

from colossus.architecture import Architecture, RopeScaling


def inverse_frequencies(arch: Architecture, device: torch.device) -> torch.Tensor:
    """Radians a token of each pair of coordinates that turns, [E/2] in fp32.

    Computed in fp32 in the order in which published models computed it, so that theirs are met bitwise.
    """
    width = arch.latent.rope_dim if arch.latent is not None else arch.rotary_dim or arch.head_dim
    exponents = torch.arange(0, width, 2, dtype=torch.int64, device=device).float() / width
    turns = arch.rope_theta**exponents
    scaling = arch.rope_scaling
    if scaling is None:
        return 1.0 / turns
    return (
        _llama3(1.0 / turns, scaling) if scaling.kind == "llama3" else _yarn(turns, arch.rope_theta, scaling)
    )


def _llama3(plain: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    low_wavelength = scaling.original_max_seq_len / scaling.low_freq_factor
    high_wavelength = scaling.original_max_seq_len / scaling.high_freq_factor
    wavelength = 2 * math.pi / plain
    smooth = (scaling.original_max_seq_len / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - smooth) * plain / scaling.factor + smooth * plain
    scaled = torch.where(wavelength > low_wavelength, plain / scaling.factor, plain)
    is_between = (wavelength <= low_wavelength) & (wavelength >= high_wavelength)
    return torch.where(is_between, between, scaled)


def _yarn(turns: torch.Tensor, theta: float, scaling: RopeScaling) -> torch.Tensor:
    width = 2 * len(turns)

    def coordinate(rotations: float) -> float:
        """The coordinate that turns so often in the original length."""
        wavelength = scaling.original_max_seq_len / (rotations * 2 * math.pi)
        return width * math.log(wavelength) / (2 * math.log(theta))

    low, high = coordinate(scaling.beta_fast), coordinate(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001
    ramp = (torch.arange(width // 2, dtype=torch.float32, device=turns.device) - low) / (high - low)
    kept = 1 - ramp.clamp(0, 1)
    return 1.0 / (scaling.factor * turns) * (1 - kept) + 1.0 / turns * kept


def rotations(arch: Architecture, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(cos, cos) and (-sin, sin) of every position, [T] or [B, T], stacked: [2, ..., T, E] in `dtype`.

    A function of the positions rather than a buffer: nothing to initialise, shard or save, and at
    T=2,048, E=64 it takes 0.3 ms of a step.
    """
    angles = positions.float()[..., None] * inverse_frequencies(arch, positions.device)
    cos, sin = angles.cos(), angles.sin()
    turned = torch.stack((torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)))
    if arch.rope_scaling is not None and arch.rope_scaling.magnitude != 1:
        turned = turned * arch.rope_scaling.magnitude
    return turned.to(dtype)


def rotate(x_BTHE: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    """Turns coordinates e and e + E/2 of each head by its position's angle; same shape and type.

    Where the rotations are of fewer coordinates than a head has, its last ones stay.
    """
    cos, sin = rotations[0].unsqueeze(-2), rotations[1].unsqueeze(-2)
    num_turned = cos.shape[-1]
    turning, staying = x_BTHE[..., :num_turned], x_BTHE[..., num_turned:]
    turning = turning.to(torch.promote_types(x_BTHE.dtype, cos.dtype))  # once, not in each of the products
    half = num_turned // 2
    if torch.is_grad_enabled():  # by halves, which compilers turn into vector instructions
        left, right = turning.chunk(2, dim=-1)
        cos, sin = cos[..., :half], sin[..., half:]
        turned = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
    else:  # the same in fewer operations, whose number is what a single token costs
        turned = turning * cos + turning.roll(half, dims=-1) * sin
    turned = turned.to(x_BTHE.dtype)
    return turned if num_turned == x_BTHE.shape[-1] else torch.cat((turned, staying), dim=-1)
