"""A checkpoint that changed since it was written never loads wrongly; the one before it does load."""

from __future__ import annotations

import dataclasses
import random
import zlib
from pathlib import Path

import pytest
import torch

from colossus.checkpoints import format as layout
from colossus.checkpoints.find import read_exactly
from colossus.checkpoints.index import DONE
from colossus.checkpoints.load import DamagedCheckpoint, latest, newest_whole, open_checkpoint, verify
from colossus.checkpoints.manifest import encode
from colossus.checkpoints.save import Saver
from colossus.errors import UserError
from tests.checkpoints.samples import equal, state, zeros_like

FILES = ["COMMITTED", "manifest.json", "pieces-00000.index", "pieces-00000.safetensors"]
SMALL = {key: tensor for key, tensor in state().items() if tensor.numel() < 10_000}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 1 and 2, of equal values."""
    with Saver(tmp_path) as saver:
        for step in (1, 2):
            saver.save(step, SMALL, {"step": step})
    return tmp_path


def loads_rightly(path: Path) -> bool:
    """Whether it loads. If so, then as it was saved."""
    tensors = zeros_like(SMALL)
    try:
        open_checkpoint(path).load_into(tensors)
    except DamagedCheckpoint:
        return False
    assert all(equal(tensors[key], value) for key, value in SMALL.items())
    return True


def check_damage_is_seen(run: Path, file: str) -> None:
    """Step 2 is damaged in `file`; step 1 is whole."""
    path = run / "checkpoints" / "step-00000002"
    with pytest.raises(DamagedCheckpoint, match=file if file in FILES else None):
        verify(path)
    loads_rightly(path)
    said: list[str] = []
    found = newest_whole(run, say=said.append)
    assert found is not None
    assert found.step == 1
    torn = (path / "COMMITTED").stat().st_size < 131  # as by a kill: it was never committed
    assert len(said) == (0 if torn else 1)
    assert loads_rightly(found.path)


@pytest.mark.parametrize("file", FILES)
def test_any_flipped_bit_is_seen(run: Path, file: str) -> None:
    path = run / "checkpoints" / "step-00000002" / file
    whole = path.read_bytes()
    draw = random.Random(file)
    places = {0, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(40))}
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        check_damage_is_seen(run, file)
    path.write_bytes(whole)
    verify(path.parent)


@pytest.mark.parametrize("file", FILES)
def test_any_other_length_is_seen(run: Path, file: str) -> None:
    path = run / "checkpoints" / "step-00000002" / file
    whole = path.read_bytes()
    draw = random.Random(file)
    end = len(whole.removesuffix(DONE)) if file.endswith(".index") else len(whole)
    for length in {0, 1, end - 1, *(draw.randrange(end) for _ in range(40))}:
        path.write_bytes(whole[:length])
        check_damage_is_seen(run, file)
        assert not loads_rightly(path.parent)
    path.write_bytes(whole + b"\0")
    check_damage_is_seen(run, file)


@pytest.mark.parametrize("file", FILES)
def test_a_lost_file_is_seen(run: Path, file: str) -> None:
    path = run / "checkpoints" / "step-00000002" / file
    path.unlink()
    assert not loads_rightly(path.parent)
    newest = latest(run, say=lambda message: None)
    assert newest is not None
    assert newest.name == "step-00000001"


def test_the_message_names_file_and_tensor(tmp_path: Path) -> None:
    with Saver(tmp_path) as saver:
        saver.save(1, state(), {})
    path = tmp_path / "checkpoints" / "step-00000001"
    pieces = path / "pieces-00000.safetensors"
    (piece,) = open_checkpoint(path).pieces("large")
    data = bytearray(pieces.read_bytes())
    data[piece.begin + layout.CHUNK_BYTES + 5] ^= 1  # in the second chunk
    pieces.write_bytes(data)
    checkpoint = open_checkpoint(path)
    for read in (
        lambda: verify(path),
        lambda: checkpoint.read("large"),
        lambda: checkpoint.load_into(state()),
    ):
        with pytest.raises(
            DamagedCheckpoint, match=r"pieces-00000\.safetensors is damaged: large \(weight\)"
        ):
            read()
    rows = layout.CHUNK_BYTES // (4 * 1025)  # lie in the first chunk alone
    assert equal(checkpoint.read("large", slices=(slice(0, rows),)), state()["large", "weight"][:rows])
    assert latest(tmp_path) == path  # which reads no data
    with pytest.raises(DamagedCheckpoint, match=r"no checkpoint in .* is whole"):
        newest_whole(tmp_path)


@pytest.mark.parametrize("box", [[slice(2)], [slice(5, 6)], [slice(5, 7), slice(3, 9)], [slice(7, 8)]])
@pytest.mark.parametrize("row", [0, 5, 7])
def test_of_a_part_of_a_chunk_the_whole_is_looked_at(row: int, box: list[slice], tmp_path: Path) -> None:
    tensor = torch.arange(8 * 100.0).reshape(8, 100)
    with Saver(tmp_path) as saver:
        saver.save(1, {("rows", "weight"): tensor}, {})
    checkpoint = open_checkpoint(tmp_path / "checkpoints" / "step-00000001")
    assert torch.equal(checkpoint.read("rows", slices=box), tensor[tuple(box)])
    (piece,) = checkpoint.pieces("rows")
    data = bytearray((checkpoint.path / piece.file).read_bytes())
    data[piece.begin + 4 * (row * 100 + 5)] ^= 1
    (checkpoint.path / piece.file).write_bytes(data)
    with pytest.raises(DamagedCheckpoint, match=r"rows .* changed since it was written"):
        checkpoint.read("rows", slices=box)


def test_of_a_file_that_ends_early_only_what_there_is_counts(tmp_path: Path) -> None:
    """Cut while it is read: a buffer holds what was read of another before."""
    (tmp_path / "file").write_bytes(b"abcdef")
    room = memoryview(bytearray(b"bcdefgh"))
    with (tmp_path / "file").open("rb", buffering=0) as stream:
        assert read_exactly(stream, room, 1) == zlib.crc32(b"bcdef")


def test_after_falling_back_the_run_s_own_saves_are_the_newest(run: Path) -> None:
    with Saver(run) as saver:
        saver.save(100, SMALL, {})
    flip(run / "checkpoints" / "step-00000100" / "pieces-00000.safetensors")
    found = newest_whole(run, say=lambda message: None)
    assert found is not None
    assert found.step == 2
    with Saver(run, keep=1) as saver:
        saver.save(60, SMALL, {})
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000060"]


def test_a_newer_format_is_refused_in_words(run: Path) -> None:
    path = run / "checkpoints" / "step-00000002"
    data = encode(dataclasses.replace(verify(path), format=layout.FORMAT + 1))
    (path / "manifest.json").write_bytes(data)
    (path / "COMMITTED").write_text(layout.committed_line(2, data))
    with pytest.raises(UserError, match="format 3; this version of colossus reads up to 2"):
        newest_whole(run)


@pytest.mark.parametrize(("version", "name"), [(1, "step-00000007"), (2, "step-00000008")])
def test_every_format_always_loads(version: int, name: str) -> None:
    path = Path(__file__).parent / "fixtures" / name
    verify(path)
    checkpoint = open_checkpoint(path)
    assert checkpoint.manifest.format == version
    assert checkpoint.meta == {"step": 7, "sample": 448, "decisions": [], "tokens": 57344}
    assert sorted(checkpoint.names()) == [
        ("embedding.weight", "exp_avg"),
        ("embedding.weight", "weight"),
        ("norm.weight", "weight"),
        ("offset", "buffer"),
        ("used", "buffer"),
    ]
    values = torch.arange(35, dtype=torch.float32).view(7, 5)
    assert equal(checkpoint.read("embedding.weight"), values)
    assert equal(checkpoint.read("embedding.weight", "exp_avg"), values.neg())
    assert equal(checkpoint.read("norm.weight"), torch.ones(5, dtype=torch.bfloat16))
    assert equal(checkpoint.read("used", "buffer"), torch.tensor([True, False]))
    assert equal(checkpoint.read("offset", "buffer"), torch.tensor(-(2**40)))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
