"""Published checkpoints read: every type, any box, one file or several; damage is named."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from colossus.errors import MachineError, UserError
from colossus.models.hf import reading
from colossus.models.hf.reading import open_source
from colossus.models.hf.tensors import bands
from tests.models.hf.samples import equal, of_every_type, publish, publish_sharded, random

SHAPES = st.lists(st.integers(0, 9), max_size=4).map(tuple)


@st.composite
def shapes_and_slices(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[slice, ...]]:
    shape = draw(SHAPES)
    axes = draw(st.integers(0, len(shape)))
    bounds = st.none() | st.integers(-10, 10)
    slices = [draw(st.builds(slice, bounds, bounds, st.none() | st.integers(1, 4))) for _ in range(axes)]
    return shape, tuple(slices)


def test_every_type_as_the_library_reads_it(tmp_path: Path) -> None:
    tensors = of_every_type()
    source = open_source(publish(tmp_path / "a", tensors, {"model_type": "llama"}))
    assert source.config == {"model_type": "llama"}
    assert set(source) == set(tensors)
    for name, tensor in tensors.items():
        assert (source[name].shape, source[name].dtype) == (tuple(tensor.shape), tensor.dtype)
        assert equal(source[name].read(), tensor), name


def test_several_files_and_what_the_index_leaves_out(tmp_path: Path) -> None:
    a, b, c = random((3, 4)), random((5,), torch.bfloat16), random((2, 2))
    folder = publish_sharded(tmp_path / "a", [{"a": a, "c": c}, {"b": b}])
    index = folder / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": dict(list(json.loads(index.read_text())["weight_map"].items())[::2])})
    )
    source = open_source(folder)
    assert list(source) == ["a", "b"]
    assert "c" not in source
    assert equal(source["a"].read(), a)
    assert equal(source["b"].read(), b)
    assert source.config == {}  # there is no config.json


@given(shapes_and_slices(), st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]), st.integers(0, 64))
@settings(max_examples=150, deadline=None)
def test_any_box_is_what_indexing_gives(
    case: tuple[tuple[int, ...], tuple[slice, ...]], dtype: torch.dtype, gap_bytes: int
) -> None:
    shape, slices = case
    tensor = random(shape, dtype)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "GAP_BYTES", gap_bytes)  # so that short rows are read in every way
        patch.setattr(reading, "STAGING_BYTES", 64 + 9 * 8)
        source = open_source(publish(Path(folder), {"t": tensor, "other": torch.ones(3)}))
        expected = tensor[slices]
        assert equal(source["t"].read(slices), expected)
        wider = torch.full((*expected.shape, 2), 7.0, dtype=torch.float64)
        source["t"].read_into(wider[..., 0], slices)
        assert torch.equal(wider[..., 0].nan_to_num(), expected.double().nan_to_num())
        assert bool((wider[..., 1] == 7).all())


@given(SHAPES, st.integers(1, 400))
def test_bands_are_the_row_major_bytes(shape: tuple[int, ...], max_bytes: int) -> None:
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
    parts = [tensor[band] for band in bands(shape, 8, max_bytes)]
    assert torch.equal(torch.cat([part.reshape(-1) for part in parts]), tensor.reshape(-1))
    assert all(part.numel() <= 1 or part.numel() * 8 <= max_bytes for part in parts)


def test_a_wide_matrix_by_columns(tmp_path: Path) -> None:
    """With the real sizes: rows beyond the longest gap are skipped, shorter ones read in passing."""
    tensors = {"wide": random((300, 9000)), "narrow": random((9000, 300)), "experts": random((3, 1000, 500))}
    source = open_source(publish(tmp_path, tensors))
    for name, tensor in tensors.items():
        for box in (slice(None), slice(100, 250)), (slice(0, None, 2), slice(1, 300, 3)):
            box = box if tensor.ndim == 2 else (slice(1, 3), *box)
            assert equal(source[name].read(box), tensor[box])


def test_a_nearby_name(tmp_path: Path) -> None:
    source = open_source(publish(tmp_path, {"model.norm.weight": torch.ones(2)}))
    with pytest.raises(
        UserError, match=r"holds no tensor 'model.norm.wieght'; did you mean 'model.norm.weight'\?"
    ):
        source["model.norm.wieght"]


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere is no Hugging Face checkpoint: there is no such folder"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has neither model.safetensors nor model.safetensors.index.json$"):
        open_source(tmp_path)
    (tmp_path / "pytorch_model-00001-of-00002.bin").touch()
    with pytest.raises(UserError, match=r"pytorch_model.bin is a pickle, which could run code"):
        open_source(tmp_path)


def header_of(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    tree: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return tree


def with_header(file: Path, header: bytes, data_bytes: int = 48) -> None:
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(data_bytes))


def entry(**changes: Any) -> bytes:
    """A header of two tensors of 24 bytes, the second changed."""
    first = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    second = {"dtype": "F32", "shape": [6], "data_offsets": [24, 48]} | changes
    return json.dumps({"a": first, "b": second}).encode()


DAMAGE: dict[str, tuple[bytes | Callable[[bytes], bytes], int, type[Exception], str]] = {
    "cut": (
        entry(),
        40,
        MachineError,
        r"model.safetensors is cut short: b ends at byte \d+, the file has \d+ bytes",
    ),
    "cut header": (b" " * 5, -3, MachineError, r"is cut short: it has 10 bytes, its header alone 13"),
    "not json": (b"{'a': 1}", 48, MachineError, r"is damaged or no safetensors file: its header: Expecting"),
    "not utf-8": (
        b'{"\xff": 1}',
        48,
        MachineError,
        r"is damaged or no safetensors file: its header: 'utf-8'",
    ),
    "a list": (b"[1]", 48, MachineError, r"its header: not an object"),
    "nested": (b"[" * 100_000, 48, MachineError, r"its header: maximum recursion"),
    "twins": (b'{"a": 1, "a": 2}', 48, MachineError, r"its header: it tells twice of 'a'"),
    "no shape": (
        b'{"a": {"dtype": "F32"}}',
        48,
        MachineError,
        r"the header's entry of a is \{'dtype': 'F32'\}",
    ),
    "a number": (b'{"a": 7}', 48, MachineError, r"the header's entry of a is 7"),
    "negative": (entry(shape=[-6]), 48, MachineError, r"the header's entry of b is"),
    "fraction": (entry(shape=[6.0]), 48, MachineError, r"the header's entry of b is"),
    "text": (entry(shape="ab"), 48, MachineError, r"the header's entry of b is"),
    "size": (entry(shape=[5]), 48, MachineError, r"b has 24 bytes; F32 \[5\] takes 20"),
    "overlap": (entry(data_offsets=[20, 44]), 44, MachineError, r"is damaged: b overlaps a"),
    "longer": (entry(), 50, MachineError, r"its header tells of \d+ bytes, the file has \d+"),
    "type": (entry(dtype="F4"), 48, UserError, r"b has the type 'F4'; types that are read: F64, F32, .*BOOL"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file(tmp_path: Path, case: str) -> None:
    header, data_bytes, kind, message = DAMAGE[case]
    with_header(tmp_path / "model.safetensors", header, max(data_bytes, 0))
    if data_bytes < 0:
        whole = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(whole[:data_bytes])
    with pytest.raises(kind, match=message) as caught:
        open_source(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(caught.value)


def test_a_file_that_is_no_safetensors(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(MachineError, match=r"is cut short: it has 0 bytes, its header alone 8"):
        open_source(tmp_path)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n" * 3)
    with pytest.raises(MachineError, match=r"is cut short"):
        open_source(tmp_path)
    with (tmp_path / "model.safetensors").open("wb") as stream:
        stream.write((200_000_000).to_bytes(8, "little"))
        stream.truncate(300_000_000)  # a hole, no space
    with pytest.raises(MachineError, match=r"is no safetensors file: its header would have 200000000 bytes"):
        open_source(tmp_path)


def test_a_damaged_index(tmp_path: Path) -> None:
    folder = publish_sharded(tmp_path / "a", [{"a": torch.ones(2)}, {"b": torch.ones(3)}])
    index = folder / "model.safetensors.index.json"

    def fails(tree: object, message: str) -> None:
        index.write_text(tree if isinstance(tree, str) else json.dumps(tree))
        with pytest.raises(MachineError, match=message):
            open_source(folder)

    name = "model-00001-of-00002.safetensors"
    fails("{", r"index.json is damaged: Expecting")
    fails([1], r"index.json is damaged: it is no JSON object")
    fails({"weight_map": [1]}, r"index.json is damaged: it has no weight_map of names to files")
    fails({"weight_map": {"a": 1}}, r"index.json is damaged: it has no weight_map of names to files")
    fails({"weight_map": {"a": "../a"}}, r"index.json is damaged: '../a' is no file of this folder")
    fails(
        {"weight_map": {"a": name, "b": name}},
        rf"{name} holds no b, although model.safetensors.index.json says so",
    )
    fails(
        {"weight_map": {"a": name, "b": "model-00003-of-00003.safetensors"}},
        r"model-00003-of-00003.safetensors is missing; model.safetensors.index.json says that it holds b",
    )


def test_a_config_that_is_no_json(tmp_path: Path) -> None:
    publish(tmp_path, {"a": torch.ones(2)})
    (tmp_path / "config.json").write_text("{,}")
    with pytest.raises(
        MachineError, match=rf"{re.escape(str(tmp_path / 'config.json'))} is damaged: Expecting"
    ):
        open_source(tmp_path)


def test_a_file_that_shrinks_or_vanishes_while_open(tmp_path: Path) -> None:
    source = open_source(publish(tmp_path, {"a": torch.ones(1000)}))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(MachineError, match=r"was cut short meanwhile: it has 2000 bytes; it held a"):
        source["a"].read()
    file.unlink()
    with pytest.raises(MachineError, match=r"model.safetensors: No such file or directory; it holds a"):
        source["a"].read()


def test_one_file_is_preferred_as_transformers_does(tmp_path: Path) -> None:
    publish_sharded(tmp_path / "a", [{"a": torch.ones(2)}])
    save_file({"b": torch.ones(1)}, tmp_path / "a/model.safetensors")
    assert list(open_source(tmp_path / "a")) == ["b"]


def test_what_the_system_reads_in_pieces_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it may, from a network or beyond 2 GiB."""
    tensors = of_every_type()
    publish(tmp_path, tensors)
    read = os.preadv

    def some(descriptor: int, rooms: list[memoryview], begin: int) -> int:
        (room,) = rooms
        return read(descriptor, [room[: max(1, len(room) // 3)]], begin)

    monkeypatch.setattr(os, "preadv", some)
    source = open_source(tmp_path)
    for name, tensor in tensors.items():
        assert equal(source[name].read(), tensor), name
