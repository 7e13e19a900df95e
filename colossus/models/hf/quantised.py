"""Tensors that are stored quantised, read as what they stand for, in bf16, a box at a time.

Two published forms:

- float8 in blocks, as DeepSeek-V3's (deepseek-ai/DeepSeek-V3, README_WEIGHTS.md): beside `X.weight` in
  float8 stands `X.weight_scale_inv`, a factor for each block of rows and columns, the last blocks being
  smaller where they don't divide. value = weight x factor. `config.json` has the block's size. As in
  `transformers`, there may be one factor for a matrix, or as many as divide it evenly, whatever that size is;
  factors may be powers of 2 (E8M0), also as bytes; and `X.scale` and `X.qscale_weight` are other names.
- MXFP4, as gpt-oss's (openai/gpt-oss; OCP Microscaling Formats 1.0): `X_blocks` [..., rows, groups, 16] in
  bytes of two e2m1 values, the lower half first, and `X_scales` [..., rows, groups], exponents of 2 with a
  bias of 127. The parameter X of `transformers` is their transpose, [..., groups x 32, rows].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from colossus.errors import MachineError, UserError
from colossus.models.hf.tensors import Box, Readable, bands, slices_of, within
from colossus.models.hf.views import Transposed

SCALE = "_scale_inv"
ACTIVATION_SCALE = "activation_scale"  # beside a weight: of its inputs, which are not quantised here
BLOCKS, SCALES = "_blocks", "_scales"
GROUP = 32  # values that share an exponent in MXFP4
CHUNK_BYTES = 1 << 20  # decoded at a time: the wider numbers in between are few, and stay in the cache
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
METHODS = ("fp8", "mxfp4")


def dequantised(stored: Mapping[str, Readable], config: Mapping[str, Any], path: Path) -> dict[str, Readable]:
    """The tensors with each quantised one in place of its parts.

    Args:
        config: `config.json`; its `quantization_config` says what is quantised and how.
        path: of the checkpoint, for messages.

    Raises:
        UserError: another quantisation.
        MachineError: parts that are missing or do not fit.
    """
    quantisation = config.get("quantization_config")
    if quantisation is None:
        return dict(stored)
    if not isinstance(quantisation, Mapping):
        raise MachineError(f"{path / 'config.json'} is damaged: quantization_config is {quantisation!r:.80}")
    method = quantisation.get("quant_method")
    if method == "fp8":
        return _with_float8(stored, _block_size(quantisation.get("weight_block_size")), path)
    if method == "mxfp4":
        return _with_mxfp4(stored, path)
    raise UserError.field(
        "quantization_config.quant_method",
        method,
        f"{path} is quantised; {' and '.join(METHODS)} are read",
        METHODS,
    )


def _block_size(value: Any) -> tuple[int, int] | None:
    """Rows and columns of a block; None: the whole tensor is one."""
    if value is None:
        return None
    if isinstance(value, list) and len(value) == 2 and all(type(n) is int and n > 0 for n in value):
        return value[0], value[1]
    raise UserError.field(
        "quantization_config.weight_block_size", value, "must be two positive whole numbers"
    )


def _with_float8(
    stored: Mapping[str, Readable], block: tuple[int, int] | None, path: Path
) -> dict[str, Readable]:
    found, used = dict[str, Readable](), set[str]()
    for name, tensor in stored.items():
        if tensor.dtype in FLOAT8:
            factors = next((other for other in _factors_of(name) if other in stored), None)
            if factors is None:
                raise MachineError(f"{path} holds {name} in float8 without its factors, {name + SCALE}")
            found[name] = Float8Blocks.of(tensor, stored[factors], block, path)
            used.add(factors)
        elif not name.endswith(ACTIVATION_SCALE):
            found[name] = tensor
    for name in used:
        found.pop(name, None)
    return found


def _factors_of(name: str) -> tuple[str, ...]:
    """The names that the factors of a weight may have."""
    bare = name.removesuffix("weight")
    return (name + SCALE, *((f"{bare}scale", f"{bare}qscale_weight") if bare != name else ()))


def _with_mxfp4(stored: Mapping[str, Readable], path: Path) -> dict[str, Readable]:
    found = dict[str, Readable]()
    for name, tensor in stored.items():
        base = name.removesuffix(BLOCKS)
        if base != name and tensor.dtype == torch.uint8:
            scales = stored.get(base + SCALES)
            if scales is None:
                raise MachineError(f"{path} holds {name} without its exponents, {base + SCALES}")
            found[base] = Transposed.of(base, MXFP4.of(base, tensor, scales, path))
        elif not name.endswith(SCALES) or name.removesuffix(SCALES) + BLOCKS not in stored:
            found[name] = tensor
    return found


@dataclass(frozen=True, slots=True)
class Float8Blocks(Readable):
    """A float8 tensor [..., rows, columns] times the factor of each of its blocks.

    scales: a factor for each, or for each matrix, or one for all.
    """

    weight: Readable
    scales: Readable
    block: tuple[int, int]

    @classmethod
    def of(
        cls, weight: Readable, scales: Readable, block: tuple[int, int] | None, path: Path
    ) -> Float8Blocks:
        *outer, rows, columns = weight.shape if len(weight.shape) > 1 else (1, *weight.shape)
        whole = max(rows, 1), max(columns, 1)
        block = block if block is not None else whole
        expected = (*outer, -(-rows // block[0]), -(-columns // block[1]))
        fits = scales.dtype.is_floating_point or scales.dtype == torch.uint8
        if scales.shape != expected:
            *others, down, across = scales.shape if len(scales.shape) > 1 else (0, 0)
            if math.prod(scales.shape) in (1, math.prod(outer)):
                block = whole
            elif others == outer and down and across and not rows % down and not columns % across:
                block = rows // down, columns // across
            else:
                fits = False
        if len(weight.shape) < 2 or not fits:
            raise MachineError(
                f"{path}: {scales.name} is {list(scales.shape)} in {scales.dtype}; {weight.name} "
                f"{list(weight.shape)} in blocks of {block[0]} x {block[1]} takes {list(expected)} "
                f"in floating point"
            )
        return cls(weight.name, weight.shape, torch.bfloat16, weight, scales, block)

    def fill(self, out: torch.Tensor, box: Box) -> None:
        for band in bands(tuple(out.shape), self.dtype.itemsize, CHUNK_BYTES):
            out[band].copy_(self._decode(within(box, band)))

    def _decode(self, box: Box) -> torch.Tensor:
        """The values of a small box. Multiplied in float32 and then rounded, as the published code does."""
        outer, blocks = list(slices_of(box[:-2])), []
        for r, size in zip(box[-2:], self.block, strict=True):
            index = torch.arange(r.start, r.stop, r.step) // size
            blocks.append(index - index[0])
            outer.append(slice(int(index[0]), int(index[-1]) + 1))
        scales = self._factors(outer)
        values = self.weight.read(slices_of(box)).float()
        values *= scales.index_select(-1, blocks[1]).index_select(-2, blocks[0])
        return values.to(self.dtype)

    def _factors(self, slices: list[slice]) -> torch.Tensor:
        """Those of the blocks in a box of all blocks, in float32; a byte is an exponent of 2."""
        *outer, rows, columns = self.shape
        grid = (*outer, -(-rows // self.block[0]), -(-columns // self.block[1]))
        if self.scales.shape == grid:
            scales = self.scales.read(slices)
        else:  # one for each matrix, or for all: few
            scales = self.scales.read()
            scales = scales.view((*outer, 1, 1) if scales.numel() > 1 else [1] * len(grid)).expand(grid)
            scales = scales[tuple(slices)]
        return (scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales).float()


@dataclass(frozen=True, slots=True)
class MXFP4(Readable):
    """Bytes of two e2m1 values [..., rows, groups, 16] times 2^exponent of a group: [..., rows, columns]."""

    blocks: Readable
    scales: Readable

    @classmethod
    def of(cls, name: str, blocks: Readable, scales: Readable, path: Path) -> MXFP4:
        if (
            len(blocks.shape) < 3
            or blocks.shape[-1] != GROUP // 2
            or scales.shape != blocks.shape[:-1]
            or scales.dtype != torch.uint8
        ):
            raise MachineError(
                f"{path}: {blocks.name} is {list(blocks.shape)} and {scales.name} {list(scales.shape)} in "
                f"{scales.dtype}; they should be [..., rows, groups, {GROUP // 2}] and [..., rows, groups] "
                f"in bytes"
            )
        shape = (*blocks.shape[:-2], blocks.shape[-2] * GROUP)
        return cls(name, shape, torch.bfloat16, blocks, scales)

    def fill(self, out: torch.Tensor, box: Box) -> None:
        tables = _pairs(), _powers()
        for band in bands(tuple(out.shape), self.dtype.itemsize, CHUNK_BYTES):
            out[band].copy_(self._decode(within(box, band), *tables))

    def _decode(self, box: Box, pairs: torch.Tensor, powers: torch.Tensor) -> torch.Tensor:
        """The values of a small box: its groups whole, cut to it."""
        columns = box[-1]
        first = columns[0] // GROUP
        stored = (*slices_of(box[:-1]), slice(first, columns[-1] // GROUP + 1))
        codes, exponents = self.blocks.read(stored), self.scales.read(stored)
        values = pairs.index_select(0, codes.view(-1).int()).view(torch.bfloat16).view(-1, GROUP)
        values *= powers.index_select(0, exponents.view(-1).int())[:, None]
        values = values.view(*exponents.shape[:-1], -1)
        return values[..., columns[0] - first * GROUP : columns[-1] + 1 - first * GROUP : columns.step]


def _pairs() -> torch.Tensor:
    """For each byte the two bf16 values that it stands for, side by side in an int32."""
    low_high = [[E2M1[byte & 15], E2M1[byte >> 4]] for byte in range(256)]
    return torch.tensor(low_high, dtype=torch.bfloat16).view(torch.int32).view(-1)


def _powers() -> torch.Tensor:
    """2^(byte - 127), of which 255 is NaN (OCP Microscaling Formats 1.0, E8M0). Times e2m1: exact in bf16."""
    powers = [2.0 ** (byte - 127) for byte in range(255)]
    return torch.tensor([*powers, math.nan], dtype=torch.float64).to(torch.bfloat16)
