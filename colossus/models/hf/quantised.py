"""Tensors that are stored quantised, read as what they stand for, in bf16, a box at a time.

Two published forms:

- float8 in blocks, as DeepSeek-V3's (deepseek-ai/DeepSeek-V3, README_WEIGHTS.md): beside `X.weight` in
  float8 stands `X.weight_scale_inv`, a factor for each block of rows and columns, the last blocks being
  smaller where they don't divide. value = weight x factor. `config.json` has the block's size.
- MXFP4, as gpt-oss's (openai/gpt-oss; OCP Microscaling Formats 1.0): `X_blocks` [..., rows, groups, 16] in
  bytes of two e2m1 values, the lower half first, and `X_scales` [..., rows, groups], exponents of 2 with a
  bias of 127. The parameter X of `transformers` is their transpose, [..., groups x 32, rows].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from colossus.errors import MachineError, UserError
from colossus.models.hf.tensors import Readable, box_of, sizes_of

SCALE = "_scale_inv"
BLOCKS, SCALES = "_blocks", "_scales"
GROUP = 32  # values that share an exponent in MXFP4
CHUNK_BYTES = 1 << 20  # of the wider numbers in between: they stay in a core's cache
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
    found = dict[str, Readable]()
    for name, tensor in stored.items():
        if tensor.dtype in FLOAT8:
            scales = stored.get(name + SCALE)
            if scales is None:
                raise MachineError(f"{path} holds {name} in float8 without its factors, {name + SCALE}")
            found[name] = Float8Blocks.of(tensor, scales, block, path)
        elif not name.endswith(SCALE) or name.removesuffix(SCALE) not in stored:
            found[name] = tensor
    return found


def _with_mxfp4(stored: Mapping[str, Readable], path: Path) -> dict[str, Readable]:
    found = dict[str, Readable]()
    for name, tensor in stored.items():
        base = name.removesuffix(BLOCKS)
        if base != name and tensor.dtype == torch.uint8:
            scales = stored.get(base + SCALES)
            if scales is None:
                raise MachineError(f"{path} holds {name} without its exponents, {base + SCALES}")
            found[base] = MXFP4.of(base, tensor, scales, path)
        elif not name.endswith(SCALES) or name.removesuffix(SCALES) + BLOCKS not in stored:
            found[name] = tensor
    return found


@dataclass(frozen=True, slots=True)
class Float8Blocks(Readable):
    """A float8 tensor [..., rows, columns] times the factor of each of its blocks."""

    weight: Readable
    scales: Readable
    block: tuple[int, int]

    @classmethod
    def of(
        cls, weight: Readable, scales: Readable, block: tuple[int, int] | None, path: Path
    ) -> Float8Blocks:
        *outer, rows, columns = weight.shape if len(weight.shape) > 1 else (1, *weight.shape)
        block = block if block is not None else (max(rows, 1), max(columns, 1))
        expected = (*outer, -(-rows // block[0]), -(-columns // block[1]))
        if len(weight.shape) < 2 or scales.shape != expected or not scales.dtype.is_floating_point:
            raise MachineError(
                f"{path}: {scales.name} is {list(scales.shape)} in {scales.dtype}; {weight.name} "
                f"{list(weight.shape)} in blocks of {block[0]} x {block[1]} takes {list(expected)} "
                f"in floating point"
            )
        return cls(weight.name, weight.shape, torch.bfloat16, weight, scales, block)

    def read(self, slices: Sequence[slice] = ()) -> torch.Tensor:
        box = box_of(self.shape, slices)
        weight = self.weight.read(slices)
        out = torch.empty(sizes_of(box), dtype=self.dtype)
        if not out.numel():
            return out
        rows, columns = box[-2], box[-1]
        row_blocks = torch.arange(rows.start, rows.stop, rows.step) // self.block[0]
        column_blocks = torch.arange(columns.start, columns.stop, columns.step) // self.block[1]
        first = int(row_blocks[0]), int(column_blocks[0])
        outer = [slice(r.start, r.stop, r.step) for r in box[:-2]]
        grid_box = slice(first[0], int(row_blocks[-1]) + 1), slice(first[1], int(column_blocks[-1]) + 1)
        scales = self.scales.read((*outer, *grid_box)).float()
        weight, out_rows = weight.reshape(-1, len(rows), len(columns)), out.view(-1, len(rows), len(columns))
        band = max(CHUNK_BYTES // (4 * len(columns)), 1)
        for matrix, grid, result in zip(
            weight, scales.reshape(-1, *scales.shape[-2:]), out_rows, strict=True
        ):
            wide = grid.index_select(1, column_blocks - first[1])
            for low in range(0, len(rows), band):
                part = matrix[low : low + band].float()
                part *= wide.index_select(0, row_blocks[low : low + band] - first[0])
                result[low : low + band] = part
        return out


@dataclass(frozen=True, slots=True)
class MXFP4(Readable):
    """Bytes of two e2m1 values [..., rows, groups, 16] times 2^exponent of each group, transposed."""

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
        *outer, rows, groups, _ = blocks.shape
        return cls(name, (*outer, groups * GROUP, rows), torch.bfloat16, blocks, scales)

    def read(self, slices: Sequence[slice] = ()) -> torch.Tensor:
        """As `Readable.read`; the result is a transposed view of what lies row by row."""
        *outer, columns, rows = box_of(self.shape, slices)
        if not (math.prod(map(len, outer)) and columns and rows):
            return torch.empty((*map(len, outer), len(columns), len(rows)), dtype=self.dtype)
        groups = range(columns.start // GROUP, columns[-1] // GROUP + 1)
        stored = [slice(r.start, r.stop, r.step) for r in (*outer, rows, groups)]
        codes, exponents = self.blocks.read(stored), self.scales.read(stored)
        out = torch.empty((*exponents.shape, GROUP // 2), dtype=torch.int32)  # two bf16 values in each
        pairs, powers = _pairs(), _powers()
        lines = zip(
            codes.view(-1, GROUP // 2).split(CHUNK_BYTES // (2 * GROUP)),
            exponents.view(-1).split(CHUNK_BYTES // (2 * GROUP)),
            out.view(-1, GROUP // 2).split(CHUNK_BYTES // (2 * GROUP)),
            strict=True,
        )
        for code, exponent, result in lines:
            torch.index_select(pairs, 0, code.view(-1).int(), out=result.view(-1))
            result.view(torch.bfloat16).mul_(powers.index_select(0, exponent.int())[:, None])
        first = groups.start * GROUP
        values = out.view(torch.bfloat16).view(*map(len, outer), len(rows), len(groups) * GROUP)
        return values[..., columns.start - first : columns.stop - first : columns.step].transpose(-1, -2)


def _pairs() -> torch.Tensor:
    """For each byte the two bf16 values that it stands for, side by side in an int32."""
    low_high = [[E2M1[byte & 15], E2M1[byte >> 4]] for byte in range(256)]
    return torch.tensor(low_high, dtype=torch.bfloat16).view(torch.int32).view(-1)


def _powers() -> torch.Tensor:
    """2^(byte - 127), of which 255 is NaN (OCP Microscaling Formats 1.0, E8M0). Times e2m1: exact in bf16."""
    powers = [2.0 ** (byte - 127) for byte in range(255)]
    return torch.tensor([*powers, math.nan], dtype=torch.float64).to(torch.bfloat16)
