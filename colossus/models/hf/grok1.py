"""Opens Grok-1 as xAI published it: a folder of pickles, `ckpt-0`, one tensor each.

The form (xai-org/grok-1, `checkpoint.py` and `model.py`): files `tensorNNNNN_000`, counted in the order of
JAX's flattening of the parameters, which sorts a dictionary by its keys as strings, so that layer 10 follows
layer 1. Embedding, norms and routers are float32 arrays. The matrices of attention and experts, [in, out],
experts stacked, are objects of a class `QuantizedWeight8bit` with `weight` in int8 and `scales` in bfloat16;
the rows of a matrix are cut into as many equal blocks as there are rows of scales, and value = weight x the
scale of its block and column, in bfloat16 as xAI's code computes it.

A pickle is a program. Only the five names that these files are made of are known here, none is imported, and
what they make is a description: of the array's type and shape, and where its bytes lie.
"""

from __future__ import annotations

import functools
import io
import math
import os
import pickle
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from colossus.architecture import Architecture
from colossus.errors import MachineError
from colossus.job import load_job
from colossus.models.hf.reading import Scratch, Source, Stored
from colossus.models.hf.tensors import Box, InMemory, Readable, slices_of
from colossus.models.hf.views import Transposed
from colossus.untrusted import open_file

IN_FILE_BYTES = 1 << 16  # longer payloads stay in the file: protocol 4 writes them outside its frames
CHUNK_BYTES = 1 << 20
TYPES = {"i1": torch.int8, "f4": torch.float32, "f8": torch.float64, "bfloat16": torch.bfloat16}
DAMAGE = (  # what reading another pickle, or a part of one, raises
    OSError, EOFError, pickle.UnpicklingError, struct.error, ValueError, TypeError, AttributeError,
    LookupError, AssertionError, OverflowError,
)  # fmt: skip
IN_LAYER = {  # our names, and those of xAI's code
    "attention_norm.weight": "rms_norm/scale",
    "attention.wq.weight": "multi_head_attention/query/w",
    "attention.wk.weight": "multi_head_attention/key/w",
    "attention.wv.weight": "multi_head_attention/value/w",
    "attention.wo.weight": "multi_head_attention/linear/w",
    "attention_post_norm.weight": "rms_norm_1/scale",
    "mlp_norm.weight": "rms_norm_2/scale",
    "moe.router.weight": "router/w",
    "moe.experts.w_gate": "moe/linear/w",
    "moe.experts.w_up": "moe/linear_v/w",
    "moe.experts.w_down": "moe/linear_1/w",
    "mlp_post_norm.weight": "rms_norm_3/scale",
}
OUTSIDE = ("language_model/in_out_embed/embeddings", "language_model/rms_norm/scale")


def is_grok1(path: Path) -> bool:
    """Whether `path` holds pickles of that form."""
    return (path / "tensor00000_000").is_file()


def open_grok1(path: Path) -> Source:
    """The tensors under the names that xAI's code gives them; the quantised ones in bf16.

    Raises:
        MachineError: a file is missing, cut short, or no such pickle; named.
    """
    num_layers, rest = divmod(len(list(path.glob("tensor*_000"))) - len(OUTSIDE), len(IN_LAYER))
    if rest or num_layers < 1:
        raise MachineError(
            f"{path}: {len(OUTSIDE)} files and {len(IN_LAYER)} for each layer are expected, "
            f"but {rest or 'all'} of a layer are there beyond {max(num_layers, 0)} whole ones"
        )
    of_layer = sorted(IN_LAYER.values())
    layers = sorted(f"transformer/decoder_layer_{layer}" for layer in range(num_layers))
    names = [*OUTSIDE, *(f"{layer}/{name}" for layer in layers for name in of_layer)]
    tensors, scratch = dict[str, Readable](), Scratch()
    for number, name in enumerate(names):
        file = path / f"tensor{number:05d}_000"
        try:
            tensors[name] = _tensor(name, file, scratch)
        except DAMAGE as error:
            raise MachineError(f"{file}, {name}: no array as Grok-1's files hold them ({error})") from error
    return Source(path, {"architectures": ["Grok1"]}, tensors)


def _tensor(name: str, file: Path, scratch: Scratch) -> Readable:
    with io.BufferedReader(open_file(file)) as opened:
        held = _Unpickler(opened).load()
    if isinstance(held, _Array):
        return held.readable(name, file, scratch)
    if not isinstance(held, _Quantized):
        raise pickle.UnpicklingError(f"a {type(held).__name__}")
    weight = held.weight.readable(name, file, scratch)
    scales = held.scales.readable(name, file, scratch).read()
    fits = (*weight.shape[:-2], scales.shape[-2] if scales.ndim > 1 else 0, weight.shape[-1])
    if tuple(scales.shape) != fits or not fits[-2] or weight.shape[-2] % fits[-2]:
        raise pickle.UnpicklingError(f"scales of {tuple(scales.shape)} do not fit {weight.shape}")
    return Int8Blocks(name, weight.shape, torch.bfloat16, weight, scales)


@dataclass(frozen=True, slots=True)
class Int8Blocks(Readable):
    """weight [..., in, out] in int8 times the scale of its block of rows, scales [..., blocks, out]."""

    weight: Readable
    scales: torch.Tensor

    def fill(self, out: torch.Tensor, box: Box) -> None:
        block_rows = self.shape[-2] // self.scales.shape[-2]
        *outer, rows, columns = box
        scales = self.scales[slices_of((*outer,))] if outer else self.scales
        step = max(1, CHUNK_BYTES // (4 * len(columns) * math.prod(len(r) for r in outer)))
        for first in range(0, len(rows), step):
            part = rows[first : first + step]
            weight = torch.empty((*(len(r) for r in outer), len(part), len(columns)), dtype=torch.int8)
            self.weight.fill(weight, (*outer, part, columns))
            blocks = torch.tensor(part) // block_rows
            factors = scales.index_select(-2, blocks)[..., slice(columns.start, columns.stop, columns.step)]
            product = (weight.float() * factors.float()).to(torch.bfloat16)
            out[..., first : first + len(part), :].copy_(product)


@dataclass
class _InFile:
    """A long payload: where it lies."""

    begin: int
    length: int


class _Ndarray:
    """Stands for numpy.ndarray, of which the files only name the class."""


class _Bfloat16:
    """Stands for ml_dtypes.bfloat16."""


class _Dtype:
    def __init__(self, kind: Any, align: Any = False, copy: Any = True) -> None:
        self.name = "bfloat16" if kind is _Bfloat16 else str(kind)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", "|"):
            raise pickle.UnpicklingError(f"numbers of byte order {state[1]!r}")


class _Array:
    """An array as numpy pickles it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    payload: bytes | _InFile

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, dtype, is_fortran, self.payload = state
        if dtype.name not in TYPES:
            raise pickle.UnpicklingError(f"numbers of type {dtype.name}")
        self.dtype = TYPES[dtype.name]
        if is_fortran and len(self.shape) > 1:
            raise pickle.UnpicklingError("an array in Fortran's order")
        length = self.payload.length if isinstance(self.payload, _InFile) else len(self.payload)
        if length != math.prod(self.shape) * self.dtype.itemsize:
            raise pickle.UnpicklingError(f"{length} bytes for {self.shape} of {self.dtype}")

    def readable(self, name: str, file: Path, scratch: Scratch) -> Readable:
        if isinstance(self.payload, _InFile):
            return Stored(name, self.shape, self.dtype, file, self.payload.begin, scratch)
        values = (
            torch.frombuffer(bytearray(self.payload), dtype=self.dtype) if self.payload else torch.empty(0)
        )
        return InMemory.of(name, values.view(self.shape))


class _Quantized:
    weight: _Array
    scales: _Array


def _reconstruct(*_: Any) -> _Array:
    return _Array()


NAMES: dict[tuple[str, str], Any] = {
    ("__main__", "QuantizedWeight8bit"): _Quantized,
    ("model", "QuantizedWeight8bit"): _Quantized,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _Ndarray,
    ("numpy", "dtype"): _Dtype,
    ("ml_dtypes", "bfloat16"): _Bfloat16,
}


PythonUnpickler: Any = pickle._Unpickler  # type: ignore[attr-defined]  # whose methods can be replaced


class _Unpickler(PythonUnpickler):
    """Knows `NAMES` alone, and leaves long payloads in the file."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._file = file
        long_payloads = {pickle.BINBYTES: "<I", pickle.BINBYTES8: "<Q"}
        self.dispatch = dict(PythonUnpickler.dispatch) | {
            opcode[0]: functools.partial(_Unpickler._load_bytes, header=header)
            for opcode, header in long_payloads.items()
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in NAMES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return NAMES[module, name]

    def _load_bytes(self, header: str) -> None:
        (length,) = struct.unpack(header, self.read(struct.calcsize(header)))
        self.append(self.read(length) if length <= IN_FILE_BYTES else self._skip(length))

    def _skip(self, length: int) -> _InFile:
        begin = self._file.tell()  # no frame holds so long a payload
        end = self._file.seek(0, os.SEEK_END)
        if begin + length > end:
            raise EOFError(f"it ends {begin + length - end} bytes before its array does")
        self._file.seek(begin + length)
        return _InFile(begin, length)


def as_ours(source: Source, head_dim: int = 128) -> tuple[Architecture, dict[str, Readable]]:
    """The architecture that the shapes of Grok-1's tensors give, and our tensors made of them.

    head_dim: of the published model; no shape says it.
    """
    layer = "transformer/decoder_layer_0"
    vocab_size, hidden_size = source[OUTSIDE[0]].shape
    num_experts, _, expert_size = source[f"{layer}/moe/linear/w"].shape
    preset = load_job(None, ["model=grok-1"]).model
    assert preset.experts is not None
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_layers": (len(source) - len(OUTSIDE)) // len(IN_LAYER),
        "num_heads": source[f"{layer}/multi_head_attention/query/w"].shape[1] // head_dim,
        "num_kv_heads": source[f"{layer}/multi_head_attention/key/w"].shape[1] // head_dim,
        "head_dim": head_dim,
        "intermediate_size": expert_size,
        "experts": preset.experts.model_copy(update={"num_experts": num_experts}),
    }
    arch = preset.model_copy(update=sizes)
    tensors: dict[str, Readable] = {}
    for ours, theirs in {"embedding.weight": OUTSIDE[0], "norm.weight": OUTSIDE[1]}.items():
        tensors[ours] = source[theirs]
    for index in range(arch.num_layers):
        for ours, theirs in IN_LAYER.items():
            tensor = source[f"transformer/decoder_layer_{index}/{theirs}"]
            name = f"layers.{index}.{ours}"
            tensors[name] = Transposed.of(name, tensor) if theirs.endswith("/w") else tensor
    return arch, tensors
