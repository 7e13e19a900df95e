"""What a model is, as data, and from it the one table of its parameters.

Parameter counts, placements, initialisation, optimizer groups, the planner's memory and the mappings
to published checkpoints all read `parameter_table`; `models/` builds exactly what it says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from pydantic import Field

from colossus.errors import UserError
from colossus.scaling import UNSCALED, InitScheme, Scale, depth_scale, width_scale
from colossus.section import Name, Section, derived

IGNORED = -100  # the target of a position that is not learned or scored, as in PyTorch's cross entropy

Group = Literal["matrix", "embedding", "head", "norm"]


class RopeScaling(Section):
    """Llama 3.1's stretching of rotary positions: low frequencies are slowed by `factor`.

    Source: the reference code of Llama 3.1 (meta-llama/llama-models, `apply_scaling`).
    """

    factor: float = Field(ge=1, le=10**6)
    low_freq_factor: float = Field(gt=0, le=10**6)
    high_freq_factor: float = Field(gt=0, le=10**6)
    original_max_seq_len: int = Field(ge=1, le=10**8)


class Architecture(Section):
    """A decoder language model: the `model` section of a job. Sizes are counts, never bytes."""

    preset: Name | None = None
    family: Literal["llama"] = "llama"
    vocab_size: int = derived(ge=2, le=2**31 - 1)
    hidden_size: int = derived(ge=1, le=10**6)
    num_layers: int = derived(ge=1, le=10**5)
    num_heads: int = derived(ge=1, le=10**5)
    num_kv_heads: int = derived(ge=1, le=10**5)
    head_dim: int = derived(ge=2, le=10**5)
    intermediate_size: int = derived(ge=1, le=10**7)
    max_seq_len: int = derived(ge=1, le=10**8)
    rope_theta: float = derived(gt=0, le=10**12)
    rope_scaling: RopeScaling | None = None
    norm_eps: float = derived(gt=0, lt=1)
    tie_embeddings: bool = derived()
    qk_norm: bool = derived()
    initializer_range: float = derived(gt=0, le=10)
    init_scheme: InitScheme = "gpt2"
    base_width: int | None = derived(ge=1, le=10**6)  # where rates and initializer_range hold as they are


@dataclass(frozen=True)
class Parameter:
    """One tensor of a model.

    axes: the logical axis of each dimension (`vocab`, `model`, `heads`, `kv`, `ffn`), the names that
        placements map to mesh axes.
    std: standard deviation of the initial values where `init` is "normal"; NaN until it is derived.
    scale: what the width makes of initial values (it is in `std`; "ones" begin at it) and of rates.
    layer: the global index of its layer, None outside the layers.
    active: the share of it that one token visits.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    fan_in: int
    fan_out: int
    init: Literal["normal", "ones", "zeros"]
    std: float
    group: Group
    layer: int | None = None
    active: float = 1.0
    scale: Scale = UNSCALED

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@lru_cache(maxsize=64)
def parameter_table(arch: Architecture) -> tuple[Parameter, ...]:
    """Every parameter of `arch`, in the order of the forward pass.

    Initial values: normal with `initializer_range`; those of the two products that write to the residual
    stream are smaller by `init_scheme` (under "llama" w_up's, too, as published), and all by `base_width`
    (see `scaling`).
    """
    check(arch)
    model, heads, kv = arch.hidden_size, arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    ffn, std = arch.intermediate_size, math.nan if arch.initializer_range is None else arch.initializer_range
    size = {"vocab": arch.vocab_size, "model": model, "heads": heads, "kv": kv, "ffn": ffn}

    def matrix(name: str, out: str, into: str, layer: int, scale: float = std) -> Parameter:
        shape = (size[out], size[into])
        return Parameter(name, shape, (out, into), shape[1], shape[0], "normal", scale, "matrix", layer)

    def norm(name: str, width: int, axis: str, layer: int | None) -> Parameter:
        return Parameter(name, (width,), (axis,), width, width, "ones", 0.0, "norm", layer)

    vocab_shape, vocab_axes = (arch.vocab_size, model), ("vocab", "model")
    table = [
        Parameter(
            "embedding.weight", vocab_shape, vocab_axes, arch.vocab_size, model, "normal", std, "embedding"
        )
    ]
    for i in range(arch.num_layers):
        prefix = f"layers.{i}"
        residual_std = std * depth_scale(arch.init_scheme, i, arch.num_layers)
        table += [
            norm(f"{prefix}.attention_norm.weight", model, "model", i),
            matrix(f"{prefix}.attention.wq.weight", "heads", "model", i),
            matrix(f"{prefix}.attention.wk.weight", "kv", "model", i),
            matrix(f"{prefix}.attention.wv.weight", "kv", "model", i),
            matrix(f"{prefix}.attention.wo.weight", "model", "heads", i, residual_std),
        ]
        if arch.qk_norm:
            table += [
                norm(f"{prefix}.attention.q_norm.weight", arch.head_dim, "head", i),
                norm(f"{prefix}.attention.k_norm.weight", arch.head_dim, "head", i),
            ]
        table += [
            norm(f"{prefix}.mlp_norm.weight", model, "model", i),
            matrix(f"{prefix}.mlp.w_gate.weight", "ffn", "model", i),
            matrix(
                f"{prefix}.mlp.w_up.weight",
                "ffn",
                "model",
                i,
                residual_std if arch.init_scheme == "llama" else std,
            ),
            matrix(f"{prefix}.mlp.w_down.weight", "model", "ffn", i, residual_std),
        ]
    table.append(norm("norm.weight", model, "model", None))
    if not arch.tie_embeddings:
        table.append(
            Parameter("head.weight", vocab_shape, vocab_axes, model, arch.vocab_size, "normal", std, "head")
        )
    return tuple(_scaled(parameter, arch) for parameter in table)


def _scaled(parameter: Parameter, arch: Architecture) -> Parameter:
    """The parameter as the model's width makes it; itself at the base width."""
    if arch.base_width is None or arch.base_width == arch.hidden_size:
        return parameter
    last_norm = parameter.layer is None and parameter.name.startswith("norm.")
    ratio = arch.hidden_size / arch.base_width
    scale = width_scale(parameter.group, ratio, norm_of_tied=last_norm and arch.tie_embeddings)
    return replace(parameter, std=parameter.std * scale.init, scale=scale)


def num_parameters(arch: Architecture) -> int:
    """All parameters, tied embeddings once."""
    return sum(p.numel for p in parameter_table(arch))


def num_active(arch: Architecture, *, input_embedding: bool = True) -> int:
    """Parameters that one token visits.

    Without the input embedding, an output matrix tied to it still counts: its product is computed.
    """
    active = sum(round(p.numel * p.active) for p in parameter_table(arch))
    if input_embedding or arch.tie_embeddings:
        return active
    return active - arch.vocab_size * arch.hidden_size


def check(arch: Architecture) -> None:
    """Raises `UserError` where the sizes of a complete description do not fit together."""
    if arch.num_heads % arch.num_kv_heads:
        divisors = [str(n) for n in range(1, arch.num_heads + 1) if arch.num_heads % n == 0]
        raise UserError(
            f"model.num_kv_heads={arch.num_kv_heads}: must divide model.num_heads={arch.num_heads}; "
            f"one of {', '.join(divisors)}"
        )
    if arch.head_dim % 2:
        raise UserError(
            f"model.head_dim={arch.head_dim}: rotary positions need an even head_dim; {arch.head_dim + 1}?"
        )
