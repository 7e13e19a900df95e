"""How what the writers have announced becomes one checkpoint, and what does not; in groups, too."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from colossus.checkpoints.announce import announce, announce_failure, take_back
from colossus.checkpoints.commit import Order, collected, commit, merge
from colossus.checkpoints.committer import Committer, command, environment
from colossus.checkpoints.format import DamagedCheckpoint, Entry, Key, group_name, group_size
from colossus.checkpoints.index import DONE, Index, Row
from colossus.checkpoints.load import latest, open_checkpoint, verify
from colossus.checkpoints.shards import Shard
from colossus.checkpoints.write import write_shards
from colossus.cuts import Cut
from colossus.errors import MachineError
from tests.checkpoints.samples import equal, parts_of

GIVES_UP = 5.0


def pause(seconds: float) -> None:
    time.sleep(seconds)


def write(folder: Path, rank: int, name: str, save: str = "alive", held: list[Key] | None = None) -> Index:
    entry = Entry(name, "weight", "F32", (4, 3), rank)
    shard = Shard(entry, (0, 0), torch.full((4, 3), float(rank)))
    return write_shards(folder, [shard], rank, save, held or [])


def test_parts_are_taken_of_this_save_alone(tmp_path: Path) -> None:
    """What an attempt that was killed has announced is none of it."""
    announce(tmp_path, 0, write(tmp_path, 0, "b", "killed"))
    with pytest.raises(MachineError, match="rank 0 wrote no part in 0 s"):
        collected(tmp_path, "alive", 1, (1, 1, {}), 0.05, pause)
    assert collected(tmp_path, "killed", 1, (1, 1, {}), GIVES_UP, pause).step == 1


def test_an_index_counts_once_it_is_on_storage(tmp_path: Path) -> None:
    """It says so itself, behind all that a checkpoint vouches for: what is lost of that then is no damage."""
    announce(tmp_path, 0, write(tmp_path, 0, "a"))
    index = tmp_path / "pieces-00000.index"
    data = index.read_bytes()
    assert data.endswith(DONE)
    index.write_bytes(data.removesuffix(DONE))
    with pytest.raises(MachineError, match="rank 0 wrote no part in 0 s"):
        collected(tmp_path, "alive", 1, (1, 1, {}), 0.05, pause)
    index.write_bytes(data)
    commit(tmp_path, collected(tmp_path, "alive", 1, (1, 1, {}), GIVES_UP, pause))
    verify(tmp_path)
    index.write_bytes(data.removesuffix(DONE))
    verify(tmp_path)


def test_a_failure_is_told_by_the_rank_that_it_happened_to(tmp_path: Path) -> None:
    announce(tmp_path, 0, write(tmp_path, 0, "a"))
    announce_failure(tmp_path, "pieces-00001.index", "killed", "another one")
    announce_failure(tmp_path, "pieces-00002.index", "alive", "no space is left")
    announce(tmp_path, 1, write(tmp_path, 1, "b"))
    with pytest.raises(MachineError, match=r"^rank 2: no space is left$"):
        collected(tmp_path, "alive", 3, (1, 1, {}), GIVES_UP, pause)


def test_what_a_rank_holds_some_rank_has_written(tmp_path: Path) -> None:
    announce(tmp_path, 0, write(tmp_path, 0, "a"))
    announce(tmp_path, 1, write(tmp_path, 1, "b", held=[("a", "weight")]))
    assert collected(tmp_path, "alive", 2, (1, 1, {}), GIVES_UP, pause).tensors.keys() == {
        ("a", "weight"),
        ("b", "weight"),
    }
    announce(tmp_path, 2, write(tmp_path, 2, "d", held=[("c", "weight")]))
    with pytest.raises(MachineError, match=r"no rank wrote c \(weight\)"):
        collected(tmp_path, "alive", 3, (1, 1, {}), GIVES_UP, pause)


ROWS = Cut(0, 1, 2, 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda entry: dataclasses.replace(entry, shape=(8, 4)), "rank 1 wrote other tensors"),
        (lambda entry: dataclasses.replace(entry, cuts=(Cut(1, 1, 2, 1),)), "rank 1 wrote other tensors"),
        (lambda entry: dataclasses.replace(entry, first=1, cuts=()), "two ranks disagree about w"),
        (None, "rank 1 wrote other tensors"),
    ],
    ids=["another shape", "another rule", "a first writer of its own", "nothing"],
)
def test_ranks_that_follow_other_rules_make_no_checkpoint(change: object, said: str, tmp_path: Path) -> None:
    entry = Entry("w", "weight", "F32", (8, 3), 0, (ROWS,))
    other = [] if change is None else [change(entry)]  # type: ignore[operator]
    announce(tmp_path, 0, write_shards(tmp_path, [Shard(entry, (0, 0), torch.ones(4, 3))], 0))
    announce(tmp_path, 1, write_shards(tmp_path, [Shard(e, (4, 0), torch.ones(4, 3)) for e in other], 1))
    with pytest.raises(MachineError, match=said):
        collected(tmp_path, "", 2, (1, 1, {}), GIVES_UP, pause)


def test_more_parts_than_writers() -> None:
    with pytest.raises(MachineError, match="rank 1 has a part to write, but there are 1 writers"):
        merge([Entry("w", "weight", "F32", (8,), 0, (ROWS,))], [], [Row(0, 0, "")])


def groups(folder: Path, num: int, whole: torch.Tensor) -> list[Committer]:
    """The writers of a save, and the processes that lead them: that of rank 0 last."""
    folder.mkdir(parents=True)
    for rank, shards in enumerate(parts_of(whole, (Cut(0, 1, num, 1),), num)):
        announce(folder, rank, write_shards(folder, shards, rank, "alive"))
    leaders = []
    for rank in reversed(range(0, num, group_size(num))):
        what = (1, 1, {"of": "rank 0"}) if rank == 0 else None
        leaders.append(Committer())
        leaders[-1].begin(Order("alive", str(folder), rank, num, GIVES_UP, what))
    return leaders


def test_many_writers_come_together_by_groups(tmp_path: Path) -> None:
    """Each process waits for few; a reader reads the index of a group, and of the writer that it needs."""
    num, folder = 150, tmp_path / "checkpoints" / "step-00000001"
    whole = torch.arange(400.0 * 3).view(400, 3)  # the last ranks have none of it
    for leader in groups(folder, num, whole):
        leader.answer()
        leader.close()
    assert [group_size(n) for n in (1, 64, 65, 4096, 4097, 16_384)] == [64, 64, 64, 64, 65, 128]
    assert sorted(path.name for path in folder.glob("group-*")) == [group_name(n) for n in range(3)]
    assert verify(folder).num_bytes == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.meta == {"of": "rank 0"}
    assert equal(checkpoint.read("w"), whole)
    (folder / "pieces-00100.safetensors").rename(tmp_path / "lost")
    assert latest(tmp_path) == folder  # looks at few files
    with pytest.raises(DamagedCheckpoint, match=r"pieces-00100\.safetensors"):
        verify(folder)
    (tmp_path / "lost").rename(folder / "pieces-00100.safetensors")
    for name in (group_name(1), "pieces-00100.index"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(DamagedCheckpoint, match=f"{name} changed since it was written"):
            verify(folder)
        (folder / name).write_bytes(data)


def test_a_group_that_fails_is_told_by_its_rank(tmp_path: Path) -> None:
    num, folder = 150, tmp_path / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    announce_failure(folder, "pieces-00064.index", "alive", "no space is left")
    for rank in range(64):
        announce(folder, rank, write_shards(folder, [], rank, "alive"))
    leader, first = Committer(), Committer()
    first.begin(Order("alive", str(folder), 0, num, GIVES_UP, (1, 1, {})))
    leader.begin(Order("alive", str(folder), 64, num, GIVES_UP))
    for process in (leader, first):
        with pytest.raises(MachineError, match=r"^rank 64: no space is left$"):
            process.answer()
        process.close()
    take_back(folder, "another")
    assert len(list(folder.iterdir())) == 2 * 64 + 3
    take_back(folder, "alive")
    assert not list(folder.iterdir())


def test_a_save_that_is_given_up_is_not_waited_for(tmp_path: Path) -> None:
    process = Committer()
    process.begin(Order("alive", str(tmp_path), 0, 2, 60.0, (1, 1, {})))
    process.cancel("an earlier one")
    process.cancel("alive", "enough")
    with pytest.raises(MachineError, match=r"^enough$"):
        process.answer()
    process.begin(Order("alive", str(tmp_path), 0, 2, 0.05, (1, 1, {})))  # the same process
    with pytest.raises(MachineError, match="rank 0 wrote no part in 0 s"):
        process.answer()
    process.close()


@pytest.mark.parametrize("when", ["waits", "may commit"])
def test_where_training_has_ended_nothing_is_committed(when: str, tmp_path: Path) -> None:
    """By then another attempt may have begun."""
    folder = tmp_path / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    if when == "may commit":
        announce(folder, 0, write(folder, 0, "a"))
    order = Order("alive", str(folder), 0, 1, 60.0, (1, 1, {}))
    done = subprocess.run(
        command(),
        input=json.dumps(asdict(order)) + "\n",
        env=environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (folder / "COMMITTED").exists() and not (folder / "manifest.json").exists()


def test_it_imports_no_torch() -> None:
    script = "import colossus.checkpoints.commit, sys; print({'torch', 'numpy', 'pydantic'} & {*sys.modules})"
    done = subprocess.run(
        [*command()[:-2], "-c", script],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "set()\n", done.stderr
