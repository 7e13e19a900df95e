"""What every part of a model costs a token, in one table: FLOPs, weights and activations.

The rows follow from `architecture.parameter_table`, with the products, norms and sums that have no
parameters of their own put between them in the order of the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from colossus.architecture import Architecture, Experts, Parameter, parameter_table

EXACT_BYTES = 4  # of what is computed in fp32 or better: norms and routers
MULTIPLIED = ("matrix", "expert", "router", "head")  # groups that a token is multiplied with
GATE_TENSORS = {"gelu": 1, "swiglu": 2, "geglu": 2, "clamped_swiglu": 5}  # saved: see `models.mlp.gated`
# Of an owner's whole matrices in a bucket of Muon's, if one alone has not more: 16 MiB in fp32, so that
# messages run at the rate of a network, small matrices are worked on many at once, and most models have
# several buckets.
MUON_BUCKET = 2**22
ATTENTION = ("attention.scores", "attention.values")  # products without parameters


@dataclass(frozen=True)
class Kernel:
    """How attention is computed.

    rows: queries of a block, which meets the keys up to its own last query; None: each query meets all.
    fused: scores are never written, and the backward pass makes them again. block: queries, and keys, of a
    block that is passed over where a window hides all of it; None: what a window hides is computed.
    """

    rows: int | None = None
    fused: bool = False
    block: int | None = None


ROWS = 256  # queries whose scores exist at once on a processor: 128 to 512 are alike, fewer compile quicker
# Tokens up to which attention is plain products: on a processor, and on a GPU where scores are special; they
# keep T^2 probabilities a head for the backward pass.
MAX_BLOCKED = 1024
MIN_KERNEL_WIDTH = 16  # of a head: the least that a GPU's units of matrices take
# Logits that exist at once, unless that is less than MIN_CHUNK tokens: 8 MiB stay in a processor's cache; on
# a GPU each chunk costs a pass over the weight's gradient, as much as a product of some hundred tokens.
CHUNK_LOGITS = {"cpu": 2**21, "cuda": 2**29}
MIN_CHUNK = 512
BLOCK = 128  # tokens, of queries and of keys, that a GPU's kernel passes over together, or not at all
SQUARE = Kernel()  # plain products of all queries with all keys
FUSED = Kernel(fused=True)  # a mask of all pairs, if any, which skips nothing
BY_BLOCKS = Kernel(fused=True, block=BLOCK)


def kernel_of(arch: Architecture, seq_len: int, device: str) -> Kernel:
    """How `models.attend` computes attention without a cache."""
    if attends_by_blocks(arch, seq_len, device):
        return BY_BLOCKS
    if has_special_scores(arch):
        return Kernel(rows=ROWS)
    if device == "cpu" and 1 < seq_len <= MAX_BLOCKED:
        return Kernel(rows=ROWS)
    unequal = arch.latent is not None and arch.latent.v_dim != arch.head_dim
    return SQUARE if device == "cpu" and unequal else FUSED  # a processor's kernel wants one width of heads


def has_special_scores(arch: Architecture) -> bool:
    """Whether scores are more than scaled products, which is all that PyTorch's plain kernels know."""
    return (
        arch.attention_soft_cap is not None
        or arch.attention_temperature_len is not None
        or arch.attention_sinks
    )


def attends_by_blocks(arch: Architecture, seq_len: int, device: str) -> bool:
    """Whether masks and special scores take the kernel that `models.block_mask` has for them. Of fewer tokens
    a mask of all pairs is small, and nothing need be compiled."""
    widths = (arch.head_dim, arch.head_dim if arch.latent is None else arch.latent.v_dim)
    return device == "cuda" and seq_len > MAX_BLOCKED and min(widths) >= MIN_KERNEL_WIDTH


class LayerKind(NamedTuple):
    """What tells the layers of a model apart."""

    windowed: bool
    experts: bool


@dataclass(frozen=True)
class Part:
    """A part of all layers of one kind, or of the model; every figure is for one token and one layer.

    kind: None outside the layers. repeat: how many layers of that kind there are.
    executed, executed_backward: FLOPs that matrix products are asked for, forward and backward.
    model: FLOPs that MFU counts, forward: 2 for each active parameter but the input embeddings, and attention
        over what a causal token may see.
    weight_bytes: of the active parameters, read once. written_bytes: what the forward pass writes of its
        outputs and of what it saves. saved_bytes: what of that waits for the backward pass.
    """

    name: str
    kind: LayerKind | None
    repeat: int
    executed: float
    executed_backward: float
    model: float
    weight_bytes: float
    written_bytes: float
    saved_bytes: float


def chunk_tokens(num_tokens: int, vocab_size: int, device: str) -> int:
    """Tokens whose logits exist at once: so few that these are small, so many that adding to the gradient of
    the output matrix once a chunk costs little. Chunks are alike, so that one compilation serves all."""
    most = max(MIN_CHUNK, CHUNK_LOGITS[device] // vocab_size)
    return -(-num_tokens // -(-num_tokens // most)) if num_tokens else most


def product_flops(rows: int, inner: int, columns: int) -> int:
    """Of a matrix product [rows, inner] x [inner, columns]."""
    return 2 * rows * inner * columns


def executed_keys(seq_len: int, kernel: Kernel = SQUARE) -> float:
    """Keys that a kernel is asked to multiply a query with, the mean over a sequence: PyTorch counts its own
    as if none passed over what a mask hides. What takes time: `computed_keys`."""
    if kernel.rows is None or kernel.rows >= seq_len:
        return float(seq_len)
    blocks, rest = divmod(seq_len, kernel.rows)
    return (kernel.rows**2 * blocks * (blocks + 1) / 2 + rest * seq_len) / seq_len


def model_keys(seq_len: int, window: int | None = None) -> float:
    """Keys that a query counts for: half of the sequence, or the mean of min(position, window) where that is
    less, the start of the sequence included.

    The half is the convention: the mean itself would be (seq_len + 1) / 2.
    """
    half = seq_len / 2
    if window is None or window >= seq_len:
        return half
    return min(half, window - window * (window - 1) / (2 * seq_len))


def computed_keys(seq_len: int, window: int | None, kernel: Kernel) -> float:
    """Keys that a query takes the time of, the mean over a sequence: by the causal rule half of them, as
    kernels' rates are given; with a window all of the blocks that it touches, where the kernel has blocks."""
    if window is None or window >= seq_len:
        return seq_len / 2
    if kernel.block is None:
        return seq_len / 2 if kernel.rows else float(seq_len)
    blocks = -(-seq_len // kernel.block)
    before = min(blocks, -(-(window - 1) // kernel.block))  # blocks that one looks back at, but at the start
    touched = blocks + before * (before - 1) // 2 + before * (blocks - before)
    return touched * kernel.block**2 / seq_len


def layer_kinds(arch: Architecture) -> dict[LayerKind, list[int]]:
    """The layers of each kind, in the order in which the kinds first appear."""
    kinds: dict[LayerKind, list[int]] = {}
    for layer in range(arch.num_layers):
        kind = LayerKind(arch.is_windowed(layer), arch.has_experts(layer))
        kinds.setdefault(kind, []).append(layer)
    return kinds


@lru_cache(maxsize=64)
def parts(
    arch: Architecture, seq_len: int, *, kernel: Kernel = SQUARE, type_bytes: int = 4, compiled: bool = False
) -> tuple[Part, ...]:
    """The table, in the order of the forward pass; of several kinds of layers, one after another.

    seq_len: tokens of a sequence. type_bytes: of an element of activations and of the weights that they are
    multiplied with; norms and routers compute in fp32 or better. compiled: what PyTorch's compiler saves of a
    layer: it makes again what follows from one tensor element by element.
    """
    return tuple(_Parts(arch, seq_len, kernel, type_bytes, compiled).rows())


class _Bytes(NamedTuple):
    written: float
    saved: float


class _Parts:
    def __init__(
        self, arch: Architecture, seq_len: int, kernel: Kernel, type_bytes: int, compiled: bool
    ) -> None:
        self.arch, self.seq_len, self.kernel, self.size = arch, seq_len, kernel, type_bytes
        self.compiled = compiled
        self.exact = max(EXACT_BYTES, type_bytes)
        self.casts = type_bytes < EXACT_BYTES

    def rows(self) -> Iterator[Part]:
        arch, table = self.arch, parameter_table(self.arch)
        outside: dict[str, list[Parameter]] = {}
        for parameter in table:
            if parameter.layer is None:
                outside.setdefault(_owner(parameter.name), []).append(parameter)
        norm = outside.pop("norm")
        head = outside.pop("head", None) or outside["embedding"]
        for name, parameters in outside.items():
            yield self.part(name, None, 1, parameters, self.embedding(name))
        for kind, layers in layer_kinds(arch).items():
            yield from self.layer(kind, layers)
        yield self.part("norm", None, 1, norm, self.norm(arch.hidden_size, saves_output=False))
        # The chunked loss computes the gradient of its input at once, and keeps that alone.
        kept = self.kept(arch.hidden_size)
        yield self.part("head", None, 1, head, _Bytes(kept.written + self.size * arch.vocab_size, kept.saved))

    def layer(self, kind: LayerKind, layers: list[int]) -> Iterator[Part]:
        prefix = f"layers.{layers[0]}."
        owned: dict[str, list[Parameter]] = {}
        for parameter in parameter_table(self.arch):
            if parameter.layer == layers[0]:
                owned.setdefault(_owner(parameter.name.removeprefix(prefix)), []).append(parameter)
        for name, activations in self.activations(layers[0]):
            yield self.part(name, kind, len(layers), owned.pop(name, []), activations)
        assert not owned, f"parameters of no part: {', '.join(owned)}"

    def part(
        self,
        name: str,
        kind: LayerKind | None,
        repeat: int,
        parameters: list[Parameter],
        activations: _Bytes,
    ) -> Part:
        """FLOPs and weights follow from the parameters, of scores and weighted values from the heads."""
        is_lookup = name.endswith("embedding")
        active = {p.name: round(p.numel * p.active) for p in parameters}
        products = sum(active[p.name] for p in parameters if p.group in MULTIPLIED or name == "head")
        executed, model = 2.0 * products, 0.0 if is_lookup else 2.0 * sum(active.values())
        backward = 2 * executed
        if name in ATTENTION:
            width = 2.0 * self.arch.num_heads * self.widths[ATTENTION.index(name)]
            window = self.arch.window if kind is not None and kind.windowed else None
            executed = width * executed_keys(self.seq_len, self.kernel)
            model += width * model_keys(self.seq_len, window)
            again = self.kernel.fused and name == "attention.scores"
            backward = (3 if again else 2) * executed
        read = sum(p.shape[1] for p in parameters) if is_lookup else sum(active.values())
        return Part(name, kind, repeat, executed, backward, model, float(self.size * read), *activations)

    @property
    def widths(self) -> tuple[int, int]:
        """Of a head's query and key, and of its value."""
        latent = self.arch.latent
        return self.arch.head_dim, self.arch.head_dim if latent is None else latent.v_dim

    def activations(self, layer: int) -> Iterator[tuple[str, _Bytes]]:
        """The parts of a layer, and what each writes and saves: a tensor counts where it is written."""
        arch, model = self.arch, self.arch.hidden_size
        before, after = arch.norm_placement != "post", arch.norm_placement != "pre"
        output = self.normed(model) if after else self.passed(model)
        for half in ("attention", "mlp"):
            if before:
                yield f"{half}_norm", self.norm(model)
            if half == "attention":
                yield from self.attention()
                yield "attention.wo", output
            else:
                yield from self.feed_forward(layer, output)
            if after:
                yield f"{half}_post_norm", self.norm(model, saves_output=False)
            yield f"{half}_residual", self.normed(model) if before else self.kept(model)

    def attention(self) -> Iterator[tuple[str, _Bytes]]:
        arch, (width, v_width) = self.arch, self.widths
        q, kv = arch.num_heads * width, arch.num_kv_heads * width
        rope, copies = arch.position == "rope", not self.kernel.fused
        if arch.latent is not None:
            latent, heads = arch.latent, arch.num_heads
            down = latent.kv_rank + latent.rope_dim
            if latent.q_rank is None:
                yield "attention.wq", self.passed(q)
            else:
                yield "attention.wq_down", self.normed(latent.q_rank)
                yield "attention.q_norm", self.norm(latent.q_rank, rms=True)
                yield "attention.wq_up", self.passed(q)
            yield "attention.wkv_down", self.normed(down)
            yield "attention.kv_norm", self.norm(latent.kv_rank, rms=True)
            v = heads * v_width
            up = heads * latent.nope_dim + v
            yield "attention.wkv_up", self.passed(up) if copies else self.kept(up)
            yield "attention.rotary", self.kept(2 * q)
        else:
            v = arch.num_heads * width
            kept = not (rope or copies)  # as an operand of attention; a rotation needs only its angles
            write = self.normed if arch.qk_norm else self.kept if kept else self.passed
            yield "attention.wq", write(q)
            yield "attention.wk", write(kv)
            yield "attention.wv", self.passed(kv) if copies else self.kept(kv)
            if arch.qk_norm:
                whole = arch.qk_norm_over == "projection"
                for name, size, num in (("q_norm", q, arch.num_heads), ("k_norm", kv, arch.num_kv_heads)):
                    rows = 1 if whole else num
                    yield f"attention.{name}", self.norm(size, rows, rms=True, saves_output=kept)
            if rope:
                yield "attention.rotary", self.passed(q + kv) if copies else self.kept(q + kv)
        yield from self.mixing(q, v, copies)

    def mixing(self, q: int, v: int, copies: bool) -> Iterator[tuple[str, _Bytes]]:
        """Scores and weighted values. Plain products copy queries, keys and values, one head for each query
        head, and keep the shares; a fused kernel keeps one sum a query."""
        arch = self.arch
        if not copies:
            yield "attention.scores", _Bytes(0.0, 0.0)
            sums = EXACT_BYTES * arch.num_heads
            saved = float(self.size * v + sums)
            if arch.attention_sinks:  # what they leave of it, in whole and of each head
                saved += self.size * v + sums + self.size * arch.num_heads * int(self.casts)
            yield "attention.values", _Bytes(saved, saved)
            return
        shares = arch.num_heads * executed_keys(self.seq_len, self.kernel)
        operands = (0 if arch.latent is not None else 2 * q) + v
        saved = self.size * (operands + shares)
        capped, cast = arch.attention_soft_cap is not None, self.casts and has_special_scores(arch)
        saved += self.exact * shares * (int(capped) + int(cast))
        saved += self.exact * arch.num_heads * int(arch.attention_sinks)  # one more share
        yield "attention.scores", _Bytes(saved + self.size * shares, saved)
        yield "attention.values", self.kept(v)

    def feed_forward(self, layer: int, output: _Bytes) -> Iterator[tuple[str, _Bytes]]:
        arch, experts = self.arch, self.arch.experts
        model = self.arch.hidden_size
        moe = arch.has_experts(layer)
        if arch.has_mlp(layer):
            yield from self.mlp("mlp", arch.intermediate_size, 1)
            yield "mlp.w_down", self.passed(model) if moe else output
        if moe:
            assert experts is not None
            visits = experts.per_token
            routed = self.router(experts)
            yield "moe.router", _Bytes(routed + self.exact * experts.num_experts, routed)
            yield "moe.experts.rows", self.kept(visits * model)
            yield from self.mlp("moe.experts", arch.expert_size, visits)
            yield "moe.experts.w_down", self.passed(visits * model)
            kept = self.kept(visits * model)
            yield "moe.experts.sum", _Bytes(kept.written + output.written, kept.saved + output.saved)
            if experts.num_shared:
                yield from self.mlp("moe.shared", experts.num_shared * arch.expert_size, 1)
                yield "moe.shared.w_down", self.passed(model)

    def router(self, experts: Experts) -> float:
        """Saved bytes: softmax or sigmoids of the logits, capped and whole logits where gradients need them;
        the weights of visits, before and after they are normalised; as int64 the experts that are visited,
        and the order of visits there and back; the input, where it is cast."""
        visits = experts.per_token
        maps = 1 + (experts.soft_cap is not None) + (experts.z_loss > 0)
        sums = (visits + 1) * experts.normalise + (experts.scores == "sigmoid") + (experts.z_loss > 0)
        saved = self.exact * (experts.num_experts * maps + visits + sums)
        saved += 8 * visits * (4 if experts.bias else 3)
        return float(saved + (self.exact * self.arch.hidden_size if self.casts else 0))

    def mlp(self, name: str, width: int, visits: int) -> Iterator[tuple[str, _Bytes]]:
        """All but the last product. Gates save what they multiply: see `models.mlp.gated`."""
        tensors = 1 if self.compiled else GATE_TENSORS[self.arch.mlp]
        if self.arch.mlp != "gelu":
            yield f"{name}.w_gate", self.kept(visits * width)
        yield f"{name}.w_up", self.kept(visits * width)
        yield f"{name}.gated", self.kept(visits * width * tensors)

    def norm(
        self, width: int, rows: int = 1, *, rms: bool | None = None, saves_output: bool = True
    ) -> _Bytes:
        """An RMS norm saves its input, divided, and a number a row; a layer norm two numbers a row. Both
        save the input in fp32, which is a copy only of a narrower type."""
        rms = self.arch.norm == "rms" if rms is None else rms
        if self.compiled:  # its input as it is, and the numbers
            kept = self.size * width + self.exact * rows * (1 if rms else 2)
            output = float(self.size * width)
            return _Bytes(kept + output, kept + output * int(saves_output))
        kept = self.exact * (width * (int(rms) + int(self.casts)) + rows * (1 if rms else 2))
        output = float(self.size * width)
        return _Bytes(kept + output, kept + output * int(saves_output))

    def embedding(self, name: str) -> _Bytes:
        """The sum with the positions, if any, is one more tensor, and what the first layer saves."""
        model, before = self.arch.hidden_size, self.arch.norm_placement != "post"
        last = name == "position_embedding" or self.arch.position == "rope"
        kept = self.normed(model) if before else self.kept(model)
        return kept if last else self.passed(model)

    def kept(self, elements: float) -> _Bytes:
        return _Bytes(float(self.size * elements), float(self.size * elements))

    def normed(self, elements: float) -> _Bytes:
        """What a norm reads, which saves its own copy in fp32 of a narrower type, or, compiled, its input."""
        return self.passed(elements) if self.casts or self.compiled else self.kept(elements)

    def passed(self, elements: float) -> _Bytes:
        return _Bytes(float(self.size * elements), 0.0)


def _owner(name: str) -> str:
    """The part that a parameter belongs to."""
    if name == "attention.sinks":
        return "attention.scores"
    for ending in (".weight", ".selection_bias", ".bias", "_bias"):
        if name.endswith(ending):
            return name.removesuffix(ending)
    return name
