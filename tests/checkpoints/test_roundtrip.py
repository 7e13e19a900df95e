"""What is saved is what is read, bit for bit, in whatever layout."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colossus.checkpoints.format import CHUNK_BYTES, Entry, Piece
from colossus.checkpoints.format1 import check_tiling
from colossus.checkpoints.load import DamagedCheckpoint, latest, newest_whole, open_checkpoint, verify
from colossus.checkpoints.save import Saver
from colossus.cuts import Cut
from colossus.errors import MachineError, UserError
from tests.checkpoints.samples import equal, parts_of, save_parts, state, zeros_like

META = {"step": 3, "tokens": 10**15, "loss": 0.1 + 0.2, "decisions": [{"name": "type", "value": "fp32"}]}


@pytest.mark.parametrize("asynchronous", [True, False])
def test_round_trip_is_bitwise(tmp_path: Path, asynchronous: bool) -> None:
    saved = state()
    with Saver(tmp_path) as saver:
        assert saver.save(3, saved, META, asynchronous) > 0
    path = latest(tmp_path)
    assert path == tmp_path / "checkpoints" / "step-00000003"
    checkpoint = open_checkpoint(path)
    assert (checkpoint.step, checkpoint.meta) == (3, META)
    assert set(checkpoint.names()) == set(saved)
    assert all(equal(checkpoint.read(*key), tensor) for key, tensor in saved.items())
    loaded = zeros_like(saved)
    checkpoint.load_into(loaded)
    assert all(equal(loaded[key], tensor) for key, tensor in saved.items())
    verify(path)


def test_pieces_are_plain_safetensors(tmp_path: Path) -> None:
    saved = state()
    with Saver(tmp_path) as saver:
        saver.save(1, saved, {})
    path = latest(tmp_path)
    assert path is not None
    assert sorted(p.name for p in path.iterdir()) == [
        "COMMITTED",
        "manifest.json",
        "pieces-00000.index",
        "pieces-00000.safetensors",
    ]
    read = safetensors.torch.load_file(path / "pieces-00000.safetensors")
    assert all(equal(read[f"{kind}/{name}"], tensor) for (name, kind), tensor in saved.items())


@pytest.mark.parametrize("length", range(1, 9))
def test_values_begin_at_a_multiple_of_eight_bytes(length: int, tmp_path: Path) -> None:
    """Whatever the names: readers that map a file ask for it."""
    with Saver(tmp_path) as saver:
        saver.save(1, {("w" * length, "weight"): torch.ones(3)}, {})
    path = latest(tmp_path)
    assert path is not None
    header = (path / "pieces-00000.safetensors").read_bytes()[:8]
    assert int.from_bytes(header, "little") % 8 == 0


def test_snapshot_is_of_the_moment_of_the_call(tmp_path: Path) -> None:
    weights = {("w", "weight"): torch.ones(300_000)}
    with Saver(tmp_path, keep=9) as saver:
        saver.prepare(weights)
        for step in range(1, 5):
            weights["w", "weight"].fill_(step)
            saver.save(step, weights, {"step": step})
            weights["w", "weight"].fill_(-1)
    for step in range(1, 5):
        checkpoint = open_checkpoint(tmp_path / "checkpoints" / f"step-{step:08d}")
        assert checkpoint.meta == {"step": step}
        assert (checkpoint.read("w") == step).all()


def test_finished_saves_are_reported_once(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    assert saver.poll() == []
    saver.save(5, {("w", "weight"): torch.ones(10)}, {})
    saver.wait()
    (saved,) = saver.poll()
    assert (saved.step, saved.path.name, saver.poll()) == (5, "step-00000005", [])
    assert 0 < saved.blocked_seconds <= saved.seconds
    assert saved.num_bytes == (saved.path / "pieces-00000.safetensors").stat().st_size


def test_same_step_again_goes_to_a_new_folder(tmp_path: Path) -> None:
    for value in (1.0, 2.0, 3.0):
        with Saver(tmp_path) as saver:
            saver.save(5, {("w", "weight"): torch.tensor(value)}, {})
    checkpoint = newest_whole(tmp_path)
    assert checkpoint is not None
    assert checkpoint.path.name == "step-00000005.3"
    assert checkpoint.read("w").item() == 3.0


def test_floats_are_converted_and_others_are_not(tmp_path: Path) -> None:
    with Saver(tmp_path) as saver:
        saver.save(1, {("w", "weight"): torch.tensor([[1.5, 2.5]]), ("n", "buffer"): torch.tensor(7)}, {})
    checkpoint = newest_whole(tmp_path)
    assert checkpoint is not None
    half = torch.zeros(1, 2, dtype=torch.bfloat16)
    checkpoint.load_into({("w", "weight"): half})
    assert half.tolist() == [[1.5, 2.5]]
    scalar = torch.tensor(0)
    checkpoint.load_into({("n", "buffer"): scalar})
    assert scalar.item() == 7
    for wrong in (
        {("n", "buffer"): torch.tensor(0.0)},
        {("w", "weight"): torch.zeros(2, 1)},
        {("v", "weight"): torch.zeros(1)},
        {("w", "exp_avg"): torch.zeros(1, 2)},
    ):
        with pytest.raises(UserError, match="step-00000001"):
            checkpoint.load_into(wrong)
    with pytest.raises(UserError, match="did you mean 'w'"):
        open_checkpoint(checkpoint.path).read("W")


def test_meta_must_be_plain_json(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    with pytest.raises(TypeError):
        saver.save(1, {}, {"device": torch.device("cpu")})
    with pytest.raises(ValueError, match="JSON"):
        saver.save(1, {}, {"loss": float("nan")})
    saver.save(1, {}, {"fine": True})
    saver.wait()
    assert latest(tmp_path) is not None


def test_nothing_saved_and_no_such_folder(tmp_path: Path) -> None:
    assert latest(tmp_path / "nowhere") is None
    assert newest_whole(tmp_path) is None
    with pytest.raises(UserError, match="no such folder"):
        open_checkpoint(tmp_path / "step-00000001")
    with pytest.raises(DamagedCheckpoint, match="COMMITTED"):
        open_checkpoint(tmp_path)


def test_strided_slices_of_a_large_tensor(tmp_path: Path) -> None:
    whole = torch.arange(3 * CHUNK_BYTES // 4, dtype=torch.int32).view(-1, 1024)
    path = save_parts(tmp_path, 1, parts_of(whole, (), 1))
    checkpoint = open_checkpoint(path)
    for rows, columns in [
        (slice(1000, 2000), slice(None)),
        (slice(5, 9), slice(3, 4)),
        (slice(None), slice(-1, None)),
    ]:
        assert equal(checkpoint.read("w", slices=(rows, columns)), whole[rows, columns])
    assert checkpoint.read("w", slices=(slice(7, 7),)).shape == (0, 1024)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_cut_is_read_in_any_other(data: st.DataObject) -> None:
    """Axes cut dimensions again and again, in any order of their strides."""
    shape = tuple(data.draw(st.lists(st.integers(0, 9), max_size=3)))
    dtype = data.draw(
        st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int16, torch.bool])
    )
    whole = torch.randint(0, 100, shape).to(dtype)
    cuts, num = list[Cut](), 1
    for _ in range(data.draw(st.integers(0, 3)) if shape else 0):
        parts = data.draw(st.integers(2, 4))
        cuts.append(Cut(data.draw(st.integers(0, len(shape) - 1)), 1, parts, num))
        num *= parts
    order = tuple(data.draw(st.permutations(cuts)))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = open_checkpoint(save_parts(Path(folder), 1, parts_of(whole, order, num)))
        assert equal(checkpoint.read("w"), whole)
        for _ in range(4):
            ends = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
            box = tuple(slice(*each) for each in ends)
            assert equal(checkpoint.read("w", slices=box), whole[box])
        verify(checkpoint.path)


def test_pieces_of_pieces_are_read(tmp_path: Path) -> None:
    """FSDP over tensor parallel, uneven: 22 rows, of which each of 2 ranks of tp has 11, and each of 3 others
    some of these."""
    whole = torch.arange(22 * 5.0).view(22, 5)
    cuts = (Cut(0, 2, 3, 2), Cut(0, 1, 2, 1))
    checkpoint = open_checkpoint(save_parts(tmp_path, 1, parts_of(whole, cuts, 6)))
    assert [piece.offset[0] for piece in checkpoint.pieces("w")] == [0, 11, 4, 15, 8, 19]
    assert equal(checkpoint.read("w"), whole)
    for first in range(22):
        assert equal(checkpoint.read("w", slices=[slice(first, first + 4)]), whole[first : first + 4])


def boxes(shape: tuple[int, ...], data: st.DataObject) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Boxes (offset, sizes), none empty, that cut `shape` on a grid."""
    axes = []
    for size in shape:
        inner = data.draw(st.sets(st.integers(1, size - 1), max_size=3)) if size > 1 else set[int]()
        axes.append([(a, b - a) for a, b in itertools.pairwise([0, *sorted(inner), size])])
    return [(tuple(a for a, _ in box), tuple(n for _, n in box)) for box in itertools.product(*axes)]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_holes_and_overlaps_in_lists_are_seen(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    cut = boxes(shape, data)
    index = data.draw(st.integers(0, len(cut) - 1))
    offset, sizes = cut[index]
    axis = data.draw(st.integers(0, len(shape) - 1))
    grown = (offset, tuple(n + (i == axis) for i, n in enumerate(sizes)))
    moved = (tuple(o + (i == axis) for i, o in enumerate(offset)), sizes)

    def check(boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
        check_tiling(Entry("w", "weight", "F32", shape), [Piece("f", o, n, 0, ()) for o, n in boxes])

    check(cut)
    for wrong in (
        [*cut, cut[index]],
        cut[:index] + cut[index + 1 :],
        *([*cut[:index], other, *cut[index + 1 :]] for other in (grown, moved)),
    ):
        with pytest.raises(DamagedCheckpoint):
            check(wrong)


def test_a_missing_part_is_not_committed(tmp_path: Path) -> None:
    halves = parts_of(torch.ones(4), (Cut(0, 1, 2, 1),), 2)
    with pytest.raises(MachineError, match="rank 1 wrote other tensors, or other parts, than its share"):
        save_parts(tmp_path, 1, [halves[0], []])
    assert latest(tmp_path) is None
