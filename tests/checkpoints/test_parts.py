"""How the parts of ranks become one checkpoint, and which do not."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from colossus.checkpoints.format import Key, pieces_name
from colossus.checkpoints.parts import Part, announce, announce_failure, collect, merge
from colossus.checkpoints.shards import shard_of
from colossus.checkpoints.write import write_shards
from colossus.errors import MachineError


def part(folder: Path, rank: int, name: str, held: list[Key] | None = None) -> Part:
    file, entries = write_shards(
        folder / pieces_name(rank), [shard_of((name, "weight"), torch.full((4, 3), float(rank)))]
    )
    return Part(pieces_name(rank), file, entries, held or [])


def test_parts_are_taken_of_this_save_alone(tmp_path: Path) -> None:
    """What an attempt that was killed has announced is none of it."""
    announced = part(tmp_path, 1, "b")
    announce(tmp_path, 1, "killed-0", announced)
    with pytest.raises(MachineError, match="rank 1 wrote no part in 0 s"):
        collect(tmp_path, "alive-0", 2, 0.05, threading.Event())
    assert collect(tmp_path, "killed-0", 2, 5.0, threading.Event()) == [announced]


def test_a_failure_is_told_by_the_rank_that_it_happened_to(tmp_path: Path) -> None:
    announce_failure(tmp_path, 1, "alive-0", "no space is left")
    with pytest.raises(MachineError, match="rank 1: no space is left"):
        collect(tmp_path, "alive-0", 2, 5.0, threading.Event())


def test_what_a_rank_holds_some_rank_has_written(tmp_path: Path) -> None:
    first = part(tmp_path, 0, "a")
    assert merge([first, part(tmp_path, 1, "b", held=[("a", "weight")])]).keys() == {
        ("a", "weight"),
        ("b", "weight"),
    }
    with pytest.raises(MachineError, match=r"no rank wrote c \(weight\)"):
        merge([first, part(tmp_path, 2, "d", held=[("c", "weight")])])
