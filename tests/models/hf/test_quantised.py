"""Quantised tensors against the published formats, decoded here element by element in float64."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colossus.errors import MachineError, UserError
from colossus.models.hf import quantised
from colossus.models.hf.reading import open_source
from tests.models.hf.samples import equal, publish, random

FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
MXFP4 = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.norm"]}}


def float8(byte: int, exponent_bits: int) -> float:
    """e4m3 (no infinities, all ones is NaN) and e5m2 (as IEEE's), Micikevicius et al. 2022, table 1."""
    mantissa_bits = 7 - exponent_bits
    bias = 2 ** (exponent_bits - 1) - 1
    sign = -1.0 if byte & 128 else 1.0
    exponent, mantissa = (byte & 127) >> mantissa_bits, byte & (2**mantissa_bits - 1)
    if exponent_bits == 4 and byte & 127 == 127:
        return math.nan
    if exponent_bits == 5 and exponent == 31:
        return sign * math.inf if mantissa == 0 else math.nan
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)


def e2m1(nibble: int) -> float:
    """OCP Microscaling Formats 1.0, section 5.3.3: bias 1, one bit of mantissa, no infinities."""
    sign = -1.0 if nibble & 8 else 1.0
    exponent, mantissa = (nibble >> 1) & 3, nibble & 1
    return sign * (mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


def bf16(values: np.ndarray[Any, np.dtype[np.float64]]) -> torch.Tensor:
    """Rounded to float32 (in which the published code multiplies), then to bf16, half to even, by hand."""
    with np.errstate(all="ignore"):
        single = values.astype(np.float32)
    bits = single.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype(np.uint16)
    rounded[np.isnan(single)] = 0x7FC0
    return torch.from_numpy(rounded.view(np.int16)).view(torch.bfloat16)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Bit for bit, except that any NaN is as good as another."""
    nan = torch.tensor(math.nan, dtype=left.dtype)
    return equal(torch.where(left.isnan(), nan, left), torch.where(right.isnan(), nan, right))


def float8_by_hand(weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    exponent_bits = 4 if weight.dtype == torch.float8_e4m3fn else 5
    out = np.zeros(weight.shape)
    stored = weight.view(torch.uint8)
    for index in np.ndindex(*weight.shape):
        *outer, row, column = index
        scale = scales[(*outer, row // block[0], column // block[1])].item()
        out[index] = float8(int(stored[index]), exponent_bits) * scale
    return bf16(out)


def mxfp4_by_hand(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[..., groups x 32, rows], as transformers' parameter."""
    *outer, rows, groups, _ = blocks.shape
    out = np.zeros((*outer, groups * 32, rows))
    for index in np.ndindex(*blocks.shape):
        *first, row, group, byte = index
        exponent = int(scales[(*first, row, group)])
        factor = math.nan if exponent == 255 else 2.0 ** (exponent - 127)
        value = int(blocks[index])
        out[(*first, group * 32 + 2 * byte, row)] = e2m1(value & 15) * factor
        out[(*first, group * 32 + 2 * byte + 1, row)] = e2m1(value >> 4) * factor
    return bf16(out)


def scales_for(shape: tuple[int, ...], block: tuple[int, int], seed: int = 1) -> torch.Tensor:
    grid = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    return torch.rand(grid, generator=torch.Generator().manual_seed(seed)) * 1e-3


def boxes(shape: tuple[int, ...]) -> st.SearchStrategy[tuple[slice, ...]]:
    bounds = st.none() | st.integers(0, max(shape))
    return st.tuples(*(st.builds(slice, bounds, bounds, st.none() | st.integers(1, 3)) for _ in shape))


def test_the_decoders_written_here() -> None:
    assert [float8(byte, 4) for byte in (0x01, 0x08, 0x38, 0x7E, 0xB8)] == [2**-9, 2**-6, 1, 448, -1]
    assert [float8(byte, 5) for byte in (0x01, 0x3C, 0x7B, 0xFC)] == [2**-16, 1, 57344, -math.inf]
    assert [e2m1(n) for n in range(8)] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert bf16(np.array([1 + 2**-8, 1 + 3 * 2**-8, -0.0])).tolist() == [1, 1 + 2**-6, 0]  # half to even


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("shape", [(256, 128), (130, 257), (1, 1), (2, 150, 140)])
def test_float8_blocks(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight, scales = random(shape, dtype), scales_for(shape, (128, 128))
    tensors = {"a.weight": weight, "a.weight_scale_inv": scales, "norm.weight": torch.ones(3)}
    source = open_source(publish(tmp_path, tensors, FP8))
    assert sorted(source) == ["a.weight", "norm.weight"]
    assert (source["a.weight"].shape, source["a.weight"].dtype) == (shape, torch.bfloat16)
    assert same(source["a.weight"].read(), float8_by_hand(weight, scales, (128, 128)))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_box_of_float8_blocks(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 11), min_size=2, max_size=3)))
    block = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    weight, scales = random(shape, torch.float8_e4m3fn), scales_for(shape, block)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": list(block)}}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantised, "CHUNK_BYTES", 4 * 11 * 3)
        source = open_source(publish(Path(folder), {"w": weight, "w_scale_inv": scales}, config))
        slices = data.draw(boxes(shape))
        expected = float8_by_hand(weight, scales, block)[slices]
        assert same(source["w"].read(slices), expected)
        wider = torch.empty(expected.shape)
        source["w"].read_into(wider, slices)  # no other values in another type
        assert same(wider, expected.float())


def test_one_factor_for_a_whole_tensor(tmp_path: Path) -> None:
    weight, scale = random((5, 7), torch.float8_e4m3fn), torch.tensor([[0.37]])
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": None}}
    source = open_source(publish(tmp_path, {"w": weight, "w_scale_inv": scale}, config))
    assert same(source["w"].read(), float8_by_hand(weight, scale, (5, 7)))


@pytest.mark.parametrize("shape", [(6, 10), (3, 6, 10)])
@pytest.mark.parametrize(
    "kind", ["one", "one in a row", "one in a matrix", "one a matrix", "as many in blocks"]
)
def test_one_factor_for_each_matrix_or_for_all(tmp_path: Path, kind: str, shape: tuple[int, ...]) -> None:
    """Whatever the size of blocks that is configured."""
    outer = shape[:-2]
    grid = {
        "one": (),
        "one in a row": (1,),
        "one in a matrix": (1,) * len(shape),
        "one a matrix": outer,
        "as many in blocks": (*outer, 1, 1),
    }[kind]
    weight, scales = random(shape, torch.float8_e4m3fn), torch.rand(grid) + 0.5
    each = scales.expand(*outer, 1, 1) if scales.numel() == 1 else scales.view(*outer, 1, 1)
    for block in ([128, 128], None, [4, 4]):
        config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": block}}
        source = open_source(publish(tmp_path, {"w": weight, "w_scale_inv": scales}, config))
        expected = float8_by_hand(weight, each, (6, 10))
        assert same(source["w"].read(), expected)
        slices = (*[slice(1, None)] * len(outer), slice(2, 5, 2), slice(3, 9))
        assert same(source["w"].read(slices), expected[slices])


@pytest.mark.parametrize("stored", [torch.float8_e8m0fnu, torch.uint8])
@pytest.mark.parametrize(("grid", "block"), [((2, 3), (3, 4)), ((2, 12), (3, 1)), ((1, 1), (6, 12))])
def test_factors_that_are_powers_of_two(
    tmp_path: Path, stored: torch.dtype, grid: tuple[int, int], block: tuple[int, int]
) -> None:
    """A byte b is 2^(b - 127), and 255 NaN (OCP Microscaling Formats 1.0, E8M0)."""
    weight = random((6, 12), torch.float8_e4m3fn)
    bytes_ = (torch.arange(grid[0] * grid[1]) * 7 + 100).to(torch.uint8).view(grid)
    bytes_.view(-1)[-3:] = torch.tensor([0, 254, 255])[-grid[0] * grid[1] :]
    factors = torch.tensor([math.nan if b == 255 else 2.0 ** (b - 127) for b in bytes_.view(-1).tolist()])
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [3, 4]}}
    source = open_source(publish(tmp_path, {"w": weight, "w_scale_inv": bytes_.view(stored)}, config))
    assert same(source["w"].read(), float8_by_hand(weight, factors.view(grid), block))


@pytest.mark.parametrize("name", ["a.weight_scale_inv", "a.scale", "a.qscale_weight"])
def test_names_of_factors_and_what_is_said_of_inputs(tmp_path: Path, name: str) -> None:
    weight, scale = random((5, 7), torch.float8_e4m3fn), torch.tensor(0.37)
    tensors = {
        "a.weight": weight,
        name: scale,
        "a.activation_scale": torch.ones(()),
        "b.scale": torch.ones(2),
    }
    source = open_source(publish(tmp_path, tensors, FP8))
    assert sorted(source) == ["a.weight", "b.scale"]
    assert same(source["a.weight"].read(), float8_by_hand(weight, scale.view(1, 1), (5, 7)))


SCALES_OF_THEIRS = {
    "blocks": scales_for((256, 384), (128, 128)),
    "powers of two": torch.randint(90, 140, (2, 3), dtype=torch.uint8).view(torch.float8_e8m0fnu),
    "bytes": torch.randint(90, 140, (256, 12), dtype=torch.uint8),
    "other blocks": scales_for((256, 384), (64, 32)),
    "one": torch.tensor(0.37),
    "one in a row": torch.tensor([0.37]),
    "one in a matrix": torch.tensor([[0.37]]),
}


@pytest.mark.parametrize("kind", SCALES_OF_THEIRS)
def test_float8_as_transformers_reads_it(tmp_path: Path, kind: str) -> None:
    integration = pytest.importorskip("transformers.integrations.finegrained_fp8")
    weight, scales = random((256, 384), torch.float8_e4m3fn), SCALES_OF_THEIRS[kind]
    source = open_source(publish(tmp_path, {"w": weight, "w_scale_inv": scales}, FP8))
    theirs = integration.Fp8Dequantize(None)._dequantize_one(weight, scales, output_dtype=torch.bfloat16)
    assert same(source["w"].read(), theirs)


@pytest.mark.parametrize("shape", [(2, 6, 3, 16), (1, 1, 1, 16), (5, 2, 16)])
def test_mxfp4(tmp_path: Path, shape: tuple[int, ...]) -> None:
    blocks, scales = random(shape, torch.uint8), random(shape[:-1], torch.uint8, seed=1)
    scales.view(-1)[:3] = torch.tensor([0, 254, 255])[: scales.numel()]
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales, f"{name}_bias": torch.ones(2)}
    source = open_source(publish(tmp_path, tensors, MXFP4))
    assert sorted(source) == [name, f"{name}_bias"]
    *outer, rows, groups, _ = shape
    assert (source[name].shape, source[name].dtype) == ((*outer, groups * 32, rows), torch.bfloat16)
    assert same(source[name].read(), mxfp4_by_hand(blocks, scales))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_box_of_mxfp4(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=3)))
    blocks, scales = random((*shape, 16), torch.uint8), random(shape, torch.uint8, seed=1)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantised, "CHUNK_BYTES", 64 * 3)
        source = open_source(publish(Path(folder), {"w_blocks": blocks, "w_scales": scales}, MXFP4))
        slices = data.draw(boxes(source["w"].shape))
        assert same(source["w"].read(slices), mxfp4_by_hand(blocks, scales)[slices])


def test_mxfp4_as_transformers_reads_it(tmp_path: Path) -> None:
    """Exponents of weights: at 2^128 and beyond theirs are infinite, the format's NaN."""
    integration = pytest.importorskip("transformers.integrations.mxfp4")
    blocks, scales = random((3, 8, 5, 16), torch.uint8), random((3, 8, 5), torch.uint8, seed=1) // 2 + 60
    source = open_source(publish(tmp_path, {"w_blocks": blocks, "w_scales": scales}, MXFP4))
    theirs = integration.convert_moe_packed_tensors(blocks, scales)
    assert equal(source["w"].read(), theirs)


def test_float8_that_nothing_says_is_quantised(tmp_path: Path) -> None:
    weight = random((4, 4), torch.float8_e4m3fn)
    source = open_source(publish(tmp_path, {"w": weight}))
    assert equal(source["w"].read(), weight)


def test_what_is_not_read(tmp_path: Path) -> None:
    byte = random((4, 3, 16), torch.uint8)
    e4m3 = random((4, 200), torch.float8_e4m3fn)

    def fails(
        tensors: dict[str, torch.Tensor], config: dict[str, Any], kind: type[Exception], text: str
    ) -> None:
        folder = publish(tmp_path, tensors, {"quantization_config": config})
        with pytest.raises(kind, match=text):
            open_source(folder)

    fp8: dict[str, Any] = FP8["quantization_config"]
    mxfp4: dict[str, Any] = MXFP4["quantization_config"]
    fails(
        {},
        {"quant_method": "mxfp8"},
        UserError,
        r"quant_method=mxfp8: .* is quantised; .*did you mean 'mxfp4'\?",
    )
    fails(
        {}, {"quant_method": "awq"}, UserError, r"quant_method=awq: .* is quantised; fp8 and mxfp4 are read$"
    )
    fails({}, {}, UserError, r"quant_method=None")
    fails(
        {},
        fp8 | {"weight_block_size": [0, 1]},
        UserError,
        r"weight_block_size=\[0, 1\]: must be two positive",
    )
    fails({"a": e4m3}, fp8, MachineError, r"holds a in float8 without its factors, a_scale_inv")
    fails(
        {"a": e4m3, "a_scale_inv": torch.ones(1, 3)},
        fp8,
        MachineError,
        r"a_scale_inv is \[1, 3\] in torch.float32; a \[4, 200\] in blocks of 128 x 128 takes \[1, 2\]",
    )
    fails({"a": e4m3, "a_scale_inv": torch.ones(1, 2).int()}, fp8, MachineError, r"in torch.int32; a")
    fails({"a": e4m3[0].clone(), "a_scale_inv": torch.ones(1, 2)}, fp8, MachineError, r"a \[200\] in blocks")
    fails({"a_blocks": byte}, mxfp4, MachineError, r"holds a_blocks without its exponents, a_scales")
    fails(
        {"a_blocks": byte, "a_scales": byte.clone()},
        mxfp4,
        MachineError,
        r"a_blocks is \[4, 3, 16\] and a_scales \[4, 3, 16\] in torch.uint8; they should be",
    )
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": 4}))
    with pytest.raises(MachineError, match=r"config.json is damaged: quantization_config is 4"):
        open_source(tmp_path)
