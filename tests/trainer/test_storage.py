"""Nodes that see other folders than the first one are found before the first step."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from colossus.data.sources import TrainingData
from colossus.errors import UserError
from colossus.layout import Layout
from colossus.parallel.world import World
from colossus.trainer.storage import check_same_data, check_shared
from tests.parallel.real_ranks import in_ranks


def said_of(folders: list[Path], local_ranks: list[str], patience: float) -> str:
    """What this rank is told where each is a process of a node and sees a folder of its own."""
    rank = int(os.environ["RANK"])
    os.environ |= {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": local_ranks[rank]}
    with World.join(Layout(dp_shard=len(folders)), "cpu") as world:
        try:
            check_shared(folders[rank], world, patience)
        except UserError as error:
            return str(error)
        return ""


@pytest.mark.parametrize("stale", [False, True])
def test_a_folder_that_one_node_does_not_see(stale: bool, tmp_path: Path) -> None:
    shared, own = tmp_path / "shared", tmp_path / "own"
    shared.mkdir()
    own.mkdir()
    if stale:
        (own / "seen").write_text("what an earlier run wrote")
    assert in_ranks(3, said_of, [shared] * 3, ["0"] * 3, 5.0) == [""] * 3
    first, second, third = in_ranks(3, said_of, [shared, shared, own], ["0"] * 3, 0.2)
    assert first == second == third
    assert third.startswith(f"run.folder={own}: rank 2 on ") and "that all nodes share" in third
    assert not (shared / "seen").exists()
    # Of a node, one process looks.
    assert in_ranks(3, said_of, [shared, shared, own], ["0", "0", "1"], 0.2) == [""] * 3


@dataclasses.dataclass
class Shards:
    """All that is compared of a corpus."""

    fingerprint: str


def compared(fingerprints: list[str]) -> str:
    rank = int(os.environ["RANK"])
    sources = [Shards("of the texts"), Shards(fingerprints[rank])]
    data = TrainingData(sources[:1], sources[1:], None, [], None)  # type: ignore[arg-type]
    with World.join(Layout(dp_shard=len(fingerprints)), "cpu") as world:
        try:
            check_same_data(data, "cache/tokens", world)
        except UserError as error:
            return str(error)
        return ""


def test_a_node_with_other_shards() -> None:
    assert in_ranks(2, compared, ["a", "a"]) == ["", ""]
    first, second = in_ranks(2, compared, ["a", "b"])
    assert first == second and first.startswith("data.folder=cache/tokens: rank 1 on ")
