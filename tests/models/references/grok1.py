"""Grok-1 in float64 numpy, and small checkpoints in the form in which xAI published it.

Sources: xai-org/grok-1 on GitHub, `model.py` (computation), `run.py` (numbers), `checkpoint.py` (loading).
xAI's code rounds to bfloat16 in many places, among them the product weight × scale; the reference does not.

**The published form.** A folder `ckpt-0` of pickles `tensorNNNNN_000`, one tensor each. NNNNN counts the
leaves of the parameters in the order of JAX's flattening: a dictionary sorted by its keys, which are the
modules' paths as strings, so layer 10 follows layer 1 (`tensor_names`). 770 files for 64 layers:

- embedding, norms and routers: a plain `numpy.ndarray`, float32.
- attention's and experts' matrices, [in, out], experts stacked on axis 0: an object of the class
  `__main__.QuantizedWeight8bit` (checkpoint.py puts it there before it loads) with the attributes
  `weight`, int8, and `scales`, bfloat16; value = weight × scale. `scales` has as many axes as `weight`
  and differs on the axis before the last: 1 (one scale a column) where xAI cut the matrix along its
  columns for 8 devices, 8 where it cut the rows (`moe/linear_1`, `multi_head_attention/linear`): then
  rows [b·in/8, (b + 1)·in/8) take scales row b.

The pickles are of protocol 4, and name these globals and no other:
`__main__ QuantizedWeight8bit` (made by NEWOBJ with no argument, then BUILD with the dictionary of its two
attributes), `numpy.core.multiarray _reconstruct`, `numpy ndarray`, `numpy dtype`, `ml_dtypes bfloat16`
(only as the first argument of `numpy.dtype`, in the place of a name like "i1"). An array is
`_reconstruct(ndarray, (0,), b"b")` with the state (1, shape, dtype, is_fortran, bytes); a dtype is
`dtype(name_or_class, False, True)` with the state (3, byte order, None, None, None, -1, -1, 0), for
bfloat16 (3, "<", None, None, None, 2, 2, 64).
How this is known: file sizes listed in rmems/xai-dissect, `docs/observed-grok1-ckpt0.md`, leave 151 bytes
around a norm, 162 around a router, 310, 319 and 323 around the quantised matrices: what these names and
protocol 4 give, to the byte (test_references.py), where `model` in the place of `__main__`, or numpy 2's
`numpy._core`, would not. The names also stand in that repository's `src/parser/mod.rs`, and `ml_dtypes`
in llama.cpp's pull request 7058, which reads these files.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tests.models.references.parts import (
    Array,
    attend,
    bfloat16_bits,
    bfloat16_values,
    causal,
    expert_weights,
    gelu,
    rms_norm,
    rotate,
)

ROW_BLOCKS = 8  # devices that the published matrices were cut for


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes, then the published numbers."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    expert_size: int
    num_experts: int
    num_chosen_experts: int
    vocab_size: int
    embedding_multiplier: float = 78.38367176906169
    output_multiplier: float = 0.5773502691896257
    attention_multiplier: float = 0.08838834764831845  # the softmax scale, in place of 1/sqrt(head_dim)
    attention_cap: float = 30.0
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    pad_token: int = 0


def config(**changed: int | float) -> Config:
    """A tiny model of 12 layers, so that the order of layers as strings differs from that of numbers.

    `changed` replaces fields. Attention's rows (heads × head_dim) and expert_size must divide by 8.
    """
    sizes: dict[str, int | float] = {
        "num_layers": 12,
        "hidden_size": 20,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "expert_size": 24,
        "num_experts": 4,
        "num_chosen_experts": 2,
        "vocab_size": 37,
    }
    return Config(**(sizes | changed))  # type: ignore[arg-type]


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Of every parameter, by the path of its module and its name, layer by layer."""
    hidden, experts, inner = config.hidden_size, config.num_experts, config.expert_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    found: dict[str, tuple[int, ...]] = {
        "language_model/in_out_embed/embeddings": (config.vocab_size, hidden),
        "language_model/rms_norm/scale": (hidden,),
    }
    for layer in range(config.num_layers):
        of_layer: dict[str, tuple[int, ...]] = {
            "rms_norm/scale": (hidden,),
            "multi_head_attention/query/w": (hidden, queries),
            "multi_head_attention/key/w": (hidden, keys),
            "multi_head_attention/value/w": (hidden, keys),
            "multi_head_attention/linear/w": (queries, hidden),
            "rms_norm_1/scale": (hidden,),
            "rms_norm_2/scale": (hidden,),
            "router/w": (hidden, experts),
            "moe/linear/w": (experts, hidden, inner),
            "moe/linear_v/w": (experts, hidden, inner),
            "moe/linear_1/w": (experts, inner, hidden),
            "rms_norm_3/scale": (hidden,),
        }
        found |= {f"transformer/decoder_layer_{layer}/{name}": shape for name, shape in of_layer.items()}
    return found


def random_weights(config: Config, seed: int) -> dict[str, Array]:
    """float64, of sizes at which every part shows in the logits: scores near 5, so that the cap acts."""
    draw = np.random.default_rng(seed)
    gains = {"query": 5.0, "key": 5.0, "router": 1.5}
    weights = {}
    for name, shape in shapes(config).items():
        values = draw.standard_normal(shape)
        if name.endswith("/scale"):
            weights[name] = 1.0 + 0.2 * values
        elif name.endswith("/embeddings"):
            weights[name] = 3.0 * values / config.embedding_multiplier
        else:
            weights[name] = gains.get(name.split("/")[-2], 1.0) * values / np.sqrt(shape[-2])
    return weights


def logits(config: Config, weights: Mapping[str, Array], tokens_BT: Array) -> Array:
    """float64 [B, T, V]. Queries see the tokens up to their own that are not the pad token."""
    tokens_BT = np.asarray(tokens_BT)
    num_tokens = tokens_BT.shape[1]
    w = {name: np.asarray(value, dtype=np.float64) for name, value in weights.items()}
    allowed_BTS = causal(num_tokens) & (tokens_BT != config.pad_token)[:, None, :]
    eps = config.norm_eps

    embedding_VD = w["language_model/in_out_embed/embeddings"]
    h_BTD = embedding_VD[tokens_BT] * config.embedding_multiplier
    for layer in range(config.num_layers):
        at = f"transformer/decoder_layer_{layer}"
        branch = attention(config, w, at, rms_norm(h_BTD, w[f"{at}/rms_norm/scale"], eps), allowed_BTS)
        h_BTD = h_BTD + rms_norm(branch, w[f"{at}/rms_norm_1/scale"], eps)
        branch = mixture(config, w, at, rms_norm(h_BTD, w[f"{at}/rms_norm_2/scale"], eps))
        h_BTD = h_BTD + rms_norm(branch, w[f"{at}/rms_norm_3/scale"], eps)
    h_BTD = rms_norm(h_BTD, w["language_model/rms_norm/scale"], eps)
    return h_BTD @ embedding_VD.T * config.output_multiplier


def attention(config: Config, w: Mapping[str, Array], at: str, x_BTD: Array, allowed_BTS: Array) -> Array:
    heads: dict[str, Array] = {}
    for name in ("query", "key", "value"):
        projected = x_BTD @ w[f"{at}/multi_head_attention/{name}/w"]
        heads[name] = projected.reshape(*x_BTD.shape[:2], -1, config.head_dim)
    mixed = attend(
        rotate(heads["query"], config.rope_base),
        rotate(heads["key"], config.rope_base),
        heads["value"],
        config.attention_multiplier,
        config.attention_cap,
        np.ones(x_BTD.shape[1]),
        allowed_BTS,
    )
    return mixed @ w[f"{at}/multi_head_attention/linear/w"]


def mixture(config: Config, w: Mapping[str, Array], at: str, x_BTD: Array) -> Array:
    weights_BTX = expert_weights(x_BTD @ w[f"{at}/router/w"], config.num_chosen_experts)
    out = np.zeros_like(x_BTD)
    for expert in range(config.num_experts):
        gate, up, down = (w[f"{at}/moe/{name}/w"][expert] for name in ("linear", "linear_v", "linear_1"))
        out += weights_BTX[..., expert, None] * ((gelu(x_BTD @ gate, "tanh") * (x_BTD @ up)) @ down)
    return out


def tensor_names(config: Config) -> list[str]:
    """Parameters in the order of the files: by the paths of their modules, as strings."""
    return sorted(shapes(config), key=lambda name: tuple(name.rsplit("/", 1)))


def write_checkpoint(config: Config, weights: Mapping[str, Array], folder: Path) -> dict[str, Array]:
    """Writes the files of `ckpt-0` into `folder`. Returns the weights that a reader arrives at, float64."""
    folder.mkdir(parents=True, exist_ok=True)
    read: dict[str, Array] = {}
    for number, name in enumerate(tensor_names(config)):
        held: PickledArray | QuantizedWeight8bit
        if "/moe/" in name or "/multi_head_attention/" in name:
            cut_along_rows = name.endswith(("moe/linear_1/w", "multi_head_attention/linear/w"))
            weight, scales = quantize(weights[name], ROW_BLOCKS if cut_along_rows else 1)
            held = QuantizedWeight8bit(PickledArray(weight), PickledArray(scales, is_bfloat16=True))
            read[name] = dequantize(weight, scales)
        else:
            plain = np.asarray(weights[name], dtype=np.float32)
            held = PickledArray(plain)
            read[name] = plain.astype(np.float64)
        with (folder / f"tensor{number:05d}_000").open("wb") as file:
            dump(held, file)
    return read


def quantize(matrix: Array, row_blocks: int) -> tuple[Array, Array]:
    """int8 of the matrix' shape, and bfloat16 patterns [..., row_blocks, out]; the largest of a block is 127.

    How xAI chose its scales is not published; only their form is.
    """
    *stack, rows, columns = matrix.shape
    assert rows % row_blocks == 0, f"{rows} rows in {row_blocks} blocks"
    blocks = np.asarray(matrix, dtype=np.float64).reshape(*stack, row_blocks, rows // row_blocks, columns)
    largest = np.max(np.abs(blocks), axis=-2)
    scales = bfloat16_bits(np.where(largest > 0, largest, 1.0) / 127)
    steps = np.rint(blocks / bfloat16_values(scales)[..., None, :])
    return np.clip(steps, -127, 127).astype(np.int8).reshape(matrix.shape), scales


def dequantize(weight: Array, scales: Array) -> Array:
    """float64; exact, as 8 bits times 8 bits are."""
    *stack, rows, columns = weight.shape
    blocks = weight.reshape(*stack, scales.shape[-2], rows // scales.shape[-2], columns).astype(np.float64)
    return (blocks * bfloat16_values(scales)[..., None, :]).reshape(weight.shape)


# The published streams name what may not be importable here: bfloat16 of a package that is not installed,
# a class of __main__, a module that numpy 2 renamed. Stand-ins are pickled under those names instead.


@dataclass
class QuantizedWeight8bit:
    weight: PickledArray
    scales: PickledArray


class Reconstruct:
    """Stands for numpy.core.multiarray._reconstruct."""


class Bfloat16:
    """Stands for ml_dtypes.bfloat16."""


PUBLISHED_NAMES = {
    QuantizedWeight8bit: ("__main__", "QuantizedWeight8bit"),
    Reconstruct: ("numpy.core.multiarray", "_reconstruct"),
    Bfloat16: ("ml_dtypes", "bfloat16"),
}


class Bfloat16Dtype:
    """Pickled as the dtype that ml_dtypes registers with numpy."""

    def __reduce__(self) -> tuple[object, ...]:
        return np.dtype, (Bfloat16, False, True), (3, "<", None, None, None, 2, 2, 64)


@dataclass
class PickledArray:
    """Pickled as numpy pickles an array; with `is_bfloat16`, uint16 patterns pass as bfloat16 numbers."""

    array: Array
    is_bfloat16: bool = False

    def __reduce__(self) -> tuple[object, ...]:
        dtype = Bfloat16Dtype() if self.is_bfloat16 else self.array.dtype
        state = (1, self.array.shape, dtype, False, self.array.tobytes())
        empty = np.empty(0).shape  # (0,), a new object each time as in numpy: one twice would be a reference
        return Reconstruct, (np.ndarray, empty, b"b"), state


class _Pickler(pickle._Pickler):  # the one in Python: its save_global can be replaced
    def save_global(self, obj: object, name: str | None = None) -> None:
        published = PUBLISHED_NAMES.get(obj) if isinstance(obj, type) else None
        if published is None:
            super().save_global(obj, name)  # type: ignore[misc]
            return
        for word in published:
            self.save(word)  # type: ignore[attr-defined]
        self.write(pickle.STACK_GLOBAL)  # type: ignore[attr-defined]
        self.memoize(obj)  # type: ignore[attr-defined]


def dump(held: PickledArray | QuantizedWeight8bit, file: BinaryIO) -> None:
    """One tensor's pickle."""
    _Pickler(file, protocol=4).dump(held)
