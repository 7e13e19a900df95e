"""What a model is, as data, and from it the one table of its parameters.

Parameter counts, placements, initialisation, optimizer groups, the planner's memory and the mappings
to published checkpoints all read `parameter_table`; `models/` builds exactly what it says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from pydantic import Field

from colossus.errors import UserError
from colossus.scaling import UNSCALED, InitScheme, Scale, depth_scale, width_scale
from colossus.section import Name, Section, derived

IGNORED = -100  # the target of a position that is not learned or scored, as in PyTorch's cross entropy

Group = Literal["matrix", "expert", "router", "embedding", "head", "norm", "bias"]
Family = Literal[
    "gpt2", "llama", "mistral", "mixtral", "qwen3", "qwen3_moe", "olmo2", "gpt_oss", "deepseek_v3",
    "glm4_moe", "grok1", "grok2",
]  # fmt: skip


class RopeScaling(Section):
    """How rotary positions are stretched beyond the length that a model was first trained on.

    llama3: low frequencies are slowed by `factor` (meta-llama/llama-models, `apply_scaling`). yarn: those
    that turn less than `beta_slow` times in the original length are slowed, those of more than `beta_fast`
    times stay, with a ramp between whose ends are rounded to whole coordinates if `truncate` (Peng et al.
    2023, arXiv 2309.00071). magnitude: cos and sin are multiplied by it.
    """

    kind: Literal["llama3", "yarn"] = "llama3"
    factor: float = Field(ge=1, le=10**6)
    original_max_seq_len: int = Field(ge=1, le=10**8)
    low_freq_factor: float = Field(default=1.0, gt=0, le=10**6)
    high_freq_factor: float = Field(default=4.0, gt=0, le=10**6)
    beta_fast: float = Field(default=32.0, gt=0, le=10**6)
    beta_slow: float = Field(default=1.0, gt=0, le=10**6)
    truncate: bool = True
    magnitude: float = Field(default=1.0, gt=0, le=10**3)


class Latent(Section):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values from one small vector.

    A head's query and key have `nope_dim` plain and `rope_dim` rotated coordinates; the rotated key is one
    for all heads. Queries come through `q_rank` coordinates, or straight where it is None, keys and values
    through `kv_rank`; these are normalised with `norm_eps`, which published models keep at 1e-6 whatever that
    of their layers is.
    """

    q_rank: int | None = Field(default=None, ge=1, le=10**6)
    kv_rank: int = Field(ge=1, le=10**6)
    nope_dim: int = Field(ge=1, le=10**5)
    rope_dim: int = Field(ge=2, le=10**5)
    v_dim: int = Field(ge=1, le=10**5)
    norm_eps: float = Field(default=1e-6, gt=0, lt=1)


class Experts(Section):
    """A mixture of experts in place of a layer's MLP, or beside it.

    intermediate_size: width of one expert; the model's where it is None. num_shared: experts that every
    token visits. dense_layers: so many first layers have an MLP instead. beside_mlp: the other layers have
    both, and their sum is multiplied by `beside_scale`.

    A token's scores are a softmax or sigmoids of the router's logits. It visits the `per_token` experts of
    the largest scores (plus `selection_bias`, if any), of the `groups_per_token` best of `num_groups` groups;
    their outputs are weighted by the scores, divided by their sum if `normalise`, times `scale`.

    balance_loss: coefficient of num_experts x sum(share of uses x mean score), over each sequence, or over
    the global batch with the shares of the step before. bias_rate: what the selection bias moves a step.
    z_loss: coefficient of the squared logsumexp of the router's logits.
    """

    num_experts: int = Field(ge=1, le=10**5)
    per_token: int = Field(default=2, ge=1, le=10**5)
    intermediate_size: int | None = Field(default=None, ge=1, le=10**7)
    num_shared: int = Field(default=0, ge=0, le=10**4)
    dense_layers: int = Field(default=0, ge=0, le=10**5)
    beside_mlp: bool = False
    beside_scale: float = Field(default=1.0, gt=0, le=10**3)
    scores: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = True
    scale: float = Field(default=1.0, gt=0, le=10**3)
    soft_cap: float | None = Field(default=None, gt=0, le=10**6)
    num_groups: int = Field(default=1, ge=1, le=10**5)
    groups_per_token: int = Field(default=1, ge=1, le=10**5)
    router_bias: bool = False
    selection_bias: bool = False
    bias: bool = False
    balance_loss: float = Field(default=0.1, ge=0, le=10**3)
    balance_over: Literal["batch", "sequence"] = "batch"
    bias_rate: float = Field(default=0.01, ge=0, le=10)
    z_loss: float = Field(default=0.0, ge=0, le=10**3)


class Architecture(Section):
    """A decoder language model: the `model` section of a job. Sizes are counts, never bytes.

    family: the published family that it is exported as. What a plain Llama has not is off by default.
    """

    preset: Name | None = None
    init_from: Name | None = None  # a model whose weights training begins with
    family: Family = "llama"
    vocab_size: int = derived(ge=2, le=2**31 - 1)
    hidden_size: int = derived(ge=1, le=10**6)
    num_layers: int = derived(ge=1, le=10**5)
    num_heads: int = derived(ge=1, le=10**5)
    num_kv_heads: int = derived(ge=1, le=10**5)
    head_dim: int = derived(ge=2, le=10**5)
    intermediate_size: int = derived(ge=1, le=10**7)
    max_seq_len: int = derived(ge=1, le=10**8)
    position: Literal["rope", "learned"] = "rope"
    rope_theta: float = derived(gt=0, le=10**12)
    rope_scaling: RopeScaling | None = None
    rotary_dim: int | None = Field(default=None, ge=2, le=10**5)  # coordinates of a head that turn; None: all
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = derived(gt=0, lt=1)
    norm_placement: Literal["pre", "post", "sandwich"] = "pre"  # before a part, on its output, or both
    mlp: Literal["swiglu", "geglu", "gelu", "clamped_swiglu"] = "swiglu"
    gelu: Literal["tanh", "erf"] = "tanh"
    mlp_bias: bool = False
    attention_bias: bool = False  # of queries, keys and values
    attention_out_bias: bool = False
    qk_norm: bool = derived()
    qk_norm_over: Literal["head", "projection"] = "head"
    attention_scale: float | None = Field(default=None, gt=0, le=10**3)  # of scores; None: 1/sqrt(head_dim)
    attention_soft_cap: float | None = Field(default=None, gt=0, le=10**6)
    attention_temperature_len: int | None = Field(default=None, ge=2, le=10**8)
    attention_sinks: bool = False
    window: int | None = Field(default=None, ge=1, le=10**8)  # tokens that one looks at, itself included
    full_attention_every: int = Field(default=0, ge=0, le=10**5)  # every so many-th layer has no window
    latent: Latent | None = None
    experts: Experts | None = None
    tie_embeddings: bool = derived()
    embedding_scale: float = Field(default=1.0, gt=0, le=10**6)
    logit_scale: float = Field(default=1.0, gt=0, le=10**6)
    logit_soft_cap: float | None = Field(default=None, gt=0, le=10**6)
    pad_token: int | None = Field(default=None, ge=0, le=2**31 - 1)  # none looks at tokens of this id
    initializer_range: float = derived(gt=0, le=10)
    init_scheme: InitScheme = "gpt2"
    base_width: int | None = derived(ge=1, le=10**6)  # where rates and initializer_range hold as they are

    @property
    def scale_of_scores(self) -> float:
        return self.attention_scale if self.attention_scale is not None else 1 / math.sqrt(self.head_dim)

    @property
    def expert_size(self) -> int:
        """Width of one expert; 0 without experts."""
        if self.experts is None:
            return 0
        return self.experts.intermediate_size or self.intermediate_size

    def is_windowed(self, layer: int) -> bool:
        every = self.full_attention_every
        return self.window is not None and not (every and (layer + 1) % every == 0)

    def has_experts(self, layer: int) -> bool:
        return self.experts is not None and layer >= self.experts.dense_layers

    def has_mlp(self, layer: int) -> bool:
        return not self.has_experts(layer) or (self.experts is not None and self.experts.beside_mlp)


@dataclass(frozen=True)
class Parameter:
    """One tensor of a model.

    axes: the logical axis of each dimension (`vocab`, `model`, `heads`, `kv`, `ffn`, `expert`, ...), the
        names that placements map to mesh axes.
    std: standard deviation of the initial values where `init` is "normal"; NaN until it is derived.
    scale: what the width makes of initial values (it is in `std`; "ones" begin at it) and of rates.
    layer: the global index of its layer, None outside the layers.
    active: the share of it that one token visits.
    trainable: whether it has a gradient; a buffer where not.
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
    trainable: bool = True
    scale: Scale = UNSCALED

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@lru_cache(maxsize=64)
def parameter_table(arch: Architecture) -> tuple[Parameter, ...]:
    """Every parameter of `arch`, in the order of the forward pass.

    Initial values: normal with `initializer_range`; those of the products that write to the residual stream
    are smaller by `init_scheme` (under "llama" w_up's, too, as published), and all by `base_width` (see
    `scaling`).
    """
    check(arch)
    return tuple(_scaled(parameter, arch) for parameter in _Table(arch).rows())


def _scaled(parameter: Parameter, arch: Architecture) -> Parameter:
    """The parameter as the model's width makes it; itself at the base width."""
    if arch.base_width is None or arch.base_width == arch.hidden_size:
        return parameter
    last_norm = parameter.layer is None and parameter.name.startswith("norm.")
    ratio = arch.hidden_size / arch.base_width
    scale = width_scale(parameter.group, ratio, norm_of_tied=last_norm and arch.tie_embeddings)
    return replace(parameter, std=parameter.std * scale.init, scale=scale)


class _Table:
    def __init__(self, arch: Architecture) -> None:
        self.arch = arch
        self.std = math.nan if arch.initializer_range is None else arch.initializer_range

    def std_of(self, name: str, layer: int) -> float:
        """Of the initial values of a product of a layer, by the last part of its name."""
        smaller = ("wo", "w_down", "w_up") if self.arch.init_scheme == "llama" else ("wo", "w_down")
        if name.rpartition(".")[2] not in smaller:
            return self.std
        return self.std * depth_scale(self.arch.init_scheme, layer, self.arch.num_layers)

    def rows(self) -> Iterator[Parameter]:
        arch = self.arch
        yield self.lookup("embedding.weight", arch.vocab_size, "vocab")
        if arch.position == "learned":
            yield self.lookup("position_embedding.weight", arch.max_seq_len, "position")
        for layer in range(arch.num_layers):
            yield from self.layer(layer)
        yield from self.norm("norm", None, arch.hidden_size, "model")
        if not arch.tie_embeddings:
            shape, axes = (arch.vocab_size, arch.hidden_size), ("vocab", "model")
            yield Parameter("head.weight", shape, axes, shape[1], shape[0], "normal", self.std, "head")

    def layer(self, layer: int) -> Iterator[Parameter]:
        arch, prefix = self.arch, f"layers.{layer}"
        before, after = arch.norm_placement != "post", arch.norm_placement != "pre"
        if before:
            yield from self.norm(f"{prefix}.attention_norm", layer, arch.hidden_size, "model")
        yield from self.attention(f"{prefix}.attention", layer)
        if after:
            yield from self.norm(f"{prefix}.attention_post_norm", layer, arch.hidden_size, "model")
        if before:
            yield from self.norm(f"{prefix}.mlp_norm", layer, arch.hidden_size, "model")
        if arch.has_mlp(layer):
            yield from self.mlp(f"{prefix}.mlp", layer, arch.intermediate_size, arch.mlp_bias)
        if arch.has_experts(layer):
            yield from self.experts(f"{prefix}.moe", layer)
        if after:
            yield from self.norm(f"{prefix}.mlp_post_norm", layer, arch.hidden_size, "model")

    def attention(self, prefix: str, layer: int) -> Iterator[Parameter]:
        arch, model = self.arch, self.arch.hidden_size
        heads, kv = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
        if arch.latent is not None:
            yield from self.latent(prefix, layer, arch.latent)
            return
        bias, all_heads = arch.attention_bias, arch.qk_norm_over == "projection"
        if arch.attention_sinks:
            yield self.vector(f"{prefix}.sinks", layer, arch.num_heads, "heads", "bias")
        yield from self.linear(f"{prefix}.wq", layer, (heads, "heads"), (model, "model"), bias)
        yield from self.linear(f"{prefix}.wk", layer, (kv, "kv"), (model, "model"), bias)
        yield from self.linear(f"{prefix}.wv", layer, (kv, "kv"), (model, "model"), bias)
        out_bias = arch.attention_out_bias
        yield from self.linear(f"{prefix}.wo", layer, (model, "model"), (heads, "heads"), out_bias)
        if arch.qk_norm:
            for name, width, axis in (("q_norm", heads, "heads"), ("k_norm", kv, "kv")):
                width, axis = (width, axis) if all_heads else (arch.head_dim, "head")
                yield self.vector(f"{prefix}.{name}.weight", layer, width, axis, "norm")

    def latent(self, prefix: str, layer: int, latent: Latent) -> Iterator[Parameter]:
        heads, model = self.arch.num_heads, (self.arch.hidden_size, "model")
        queries, kv = (heads * self.arch.head_dim, "heads"), (latent.kv_rank, "kv_rank")
        down, up = latent.kv_rank + latent.rope_dim, heads * (latent.nope_dim + latent.v_dim)
        if latent.q_rank is None:
            yield from self.linear(f"{prefix}.wq", layer, queries, model)
        else:
            q = latent.q_rank, "q_rank"
            yield from self.linear(f"{prefix}.wq_down", layer, q, model)
            yield self.vector(f"{prefix}.q_norm.weight", layer, *q, "norm")
            yield from self.linear(f"{prefix}.wq_up", layer, queries, q)
        yield from self.linear(f"{prefix}.wkv_down", layer, (down, "kv_rank"), model)
        yield self.vector(f"{prefix}.kv_norm.weight", layer, *kv, "norm")
        yield from self.linear(f"{prefix}.wkv_up", layer, (up, "heads"), kv)
        yield from self.linear(f"{prefix}.wo", layer, model, (heads * latent.v_dim, "heads"))

    def mlp(self, prefix: str, layer: int, width: int, bias: bool) -> Iterator[Parameter]:
        model, ffn = (self.arch.hidden_size, "model"), (width, "ffn")
        if self.arch.mlp != "gelu":
            yield from self.linear(f"{prefix}.w_gate", layer, ffn, model, bias)
        yield from self.linear(f"{prefix}.w_up", layer, ffn, model, bias)
        yield from self.linear(f"{prefix}.w_down", layer, model, ffn, bias)

    def experts(self, prefix: str, layer: int) -> Iterator[Parameter]:
        arch, experts = self.arch, self.arch.experts
        assert experts is not None
        num, model, router = experts.num_experts, arch.hidden_size, f"{prefix}.router"
        shape, axes = (num, model), ("expert", "model")
        yield Parameter(f"{router}.weight", shape, axes, model, num, "normal", self.std, "router", layer)
        if experts.router_bias:
            yield self.vector(f"{router}.bias", layer, num, "expert", "bias")
        if experts.selection_bias:
            yield self.vector(f"{router}.selection_bias", layer, num, "expert", "bias", trainable=False)
        for name in ("w_up", "w_down") if arch.mlp == "gelu" else ("w_gate", "w_up", "w_down"):
            yield from self.stack(f"{prefix}.experts.{name}", layer, down=name == "w_down")
        if experts.num_shared:
            yield from self.mlp(f"{prefix}.shared", layer, experts.num_shared * arch.expert_size, False)

    def stack(self, name: str, layer: int, down: bool) -> Iterator[Parameter]:
        """The same matrix of all experts: [X, out, in]."""
        experts, sizes = self.arch.experts, {"model": self.arch.hidden_size, "ffn": self.arch.expert_size}
        assert experts is not None
        num, share = experts.num_experts, experts.per_token / experts.num_experts
        out, into = ("model", "ffn") if down else ("ffn", "model")
        std = self.std_of(name, layer)
        shape, axes, fans = (num, sizes[out], sizes[into]), ("expert", out, into), (sizes[into], sizes[out])
        yield Parameter(name, shape, axes, *fans, "normal", std, "expert", layer, share)
        if experts.bias:
            yield Parameter(f"{name}_bias", shape[:2], axes[:2], *fans, "zeros", 0.0, "bias", layer, share)

    def lookup(self, name: str, num: int, axis: str) -> Parameter:
        """One vector a token, or a position."""
        model = self.arch.hidden_size
        return Parameter(name, (num, model), (axis, "model"), num, model, "normal", self.std, "embedding")

    def linear(
        self,
        name: str,
        layer: int,
        out: tuple[int, str],
        into: tuple[int, str],
        bias: bool = False,
    ) -> Iterator[Parameter]:
        std = self.std_of(name, layer)
        shape, axes = (out[0], into[0]), (out[1], into[1])
        yield Parameter(f"{name}.weight", shape, axes, into[0], out[0], "normal", std, "matrix", layer)
        if bias:
            yield self.vector(f"{name}.bias", layer, *out, "bias")

    def norm(self, name: str, layer: int | None, width: int, axis: str) -> Iterator[Parameter]:
        yield self.vector(f"{name}.weight", layer, width, axis, "norm")
        if self.arch.norm == "layer":
            yield self.vector(f"{name}.bias", layer, width, axis, "bias")

    def vector(
        self, name: str, layer: int | None, width: int, axis: str, group: Group, trainable: bool = True
    ) -> Parameter:
        init: Literal["ones", "zeros"] = "ones" if group == "norm" else "zeros"
        return Parameter(name, (width,), (axis,), width, width, init, 0.0, group, layer, trainable=trainable)


def num_parameters(arch: Architecture) -> int:
    """All parameters, tied embeddings once."""
    return sum(p.numel for p in parameter_table(arch))


def num_active(arch: Architecture, *, input_embedding: bool = True) -> int:
    """Parameters that one token visits.

    Without the input embeddings (of tokens, and of learned positions), an output matrix tied to them still
    counts: its product is computed.
    """
    table = parameter_table(arch)
    active = sum(round(p.numel * p.active) for p in table)
    if input_embedding:
        return active
    looked_up = sum(p.numel for p in table if p.group == "embedding")
    return active - looked_up + (arch.vocab_size * arch.hidden_size if arch.tie_embeddings else 0)


def check(arch: Architecture) -> None:
    """Raises `UserError` where the sizes of a complete description do not fit together."""
    if arch.num_heads % arch.num_kv_heads:
        divisors = [str(n) for n in range(1, arch.num_heads + 1) if arch.num_heads % n == 0]
        raise UserError(
            f"model.num_kv_heads={arch.num_kv_heads}: must divide model.num_heads={arch.num_heads}; "
            f"one of {', '.join(divisors)}"
        )
    whole_turns = arch.position == "rope" and arch.rotary_dim is None and arch.latent is None
    if whole_turns and arch.head_dim % 2:
        raise UserError(
            f"model.head_dim={arch.head_dim}: rotary positions need an even head_dim; {arch.head_dim + 1}?"
        )
    if arch.rotary_dim is not None and (arch.rotary_dim % 2 or arch.rotary_dim > arch.head_dim):
        raise UserError(
            f"model.rotary_dim={arch.rotary_dim}: must be even and at most model.head_dim={arch.head_dim}"
        )
    if arch.latent is not None:
        _check_latent(arch, arch.latent)
    if arch.experts is not None:
        _check_experts(arch, arch.experts)


def _check_latent(arch: Architecture, latent: Latent) -> None:
    width = latent.nope_dim + latent.rope_dim
    if arch.head_dim != width:
        raise UserError(f"model.head_dim={arch.head_dim}: latent attention has nope_dim + rope_dim; {width}")
    if arch.num_kv_heads != arch.num_heads:
        raise UserError(
            f"model.num_kv_heads={arch.num_kv_heads}: latent attention has as many as model.num_heads; "
            f"{arch.num_heads}"
        )
    if latent.rope_dim % 2:
        raise UserError(f"model.latent.rope_dim={latent.rope_dim}: must be even; {latent.rope_dim + 1}?")
    refused = {
        "attention_bias": arch.attention_bias,
        "attention_out_bias": arch.attention_out_bias,
        "qk_norm": arch.qk_norm,
        "attention_sinks": arch.attention_sinks,
        "rotary_dim": arch.rotary_dim is not None,
    }
    for name, given in refused.items():
        if given:
            raise UserError(f"model.{name}={getattr(arch, name)}: not with latent attention; leave it out")


def _check_experts(arch: Architecture, experts: Experts) -> None:
    if experts.per_token > experts.num_experts:
        raise UserError(
            f"model.experts.per_token={experts.per_token}: more than model.experts.num_experts="
            f"{experts.num_experts}; at most that"
        )
    if experts.num_experts % experts.num_groups:
        divisors = [str(n) for n in range(1, experts.num_experts + 1) if experts.num_experts % n == 0]
        raise UserError(
            f"model.experts.num_groups={experts.num_groups}: must divide model.experts.num_experts="
            f"{experts.num_experts}; one of {', '.join(divisors)}"
        )
    if experts.groups_per_token > experts.num_groups:
        raise UserError(
            f"model.experts.groups_per_token={experts.groups_per_token}: more than model.experts.num_groups="
            f"{experts.num_groups}; at most that"
        )
    reachable = experts.groups_per_token * (experts.num_experts // experts.num_groups)
    if experts.per_token > reachable:
        raise UserError(
            f"model.experts.per_token={experts.per_token}: {experts.groups_per_token} of "
            f"{experts.num_groups} groups hold {reachable} experts; at most {reachable}"
        )
    if experts.dense_layers >= arch.num_layers:
        raise UserError(
            f"model.experts.dense_layers={experts.dense_layers}: leaves no layer of model.num_layers="
            f"{arch.num_layers} with experts; at most {arch.num_layers - 1}"
        )
    if experts.bias and arch.mlp == "gelu":
        raise UserError("model.experts.bias=true: not with model.mlp=gelu; false")
