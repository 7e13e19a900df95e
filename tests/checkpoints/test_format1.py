"""Manifests of format 1, which list every piece: those of a run are read, and none that no save wrote."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from colossus.checkpoints.copy import copy_checkpoint
from colossus.checkpoints.find import verify
from colossus.checkpoints.load import DamagedCheckpoint, newest_whole, open_checkpoint
from tests.checkpoints.samples import sign, tree_of

Tree = dict[str, Any]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    there = tmp_path / "run" / "checkpoints" / "step-00000007"
    shutil.copytree(Path(__file__).parent / "fixtures" / "step-00000007", there)
    return there


def w(tree: Tree) -> Tree:
    found: Tree = next(entry for entry in tree["tensors"] if entry["name"] == "embedding.weight")
    return found


def piece(tree: Tree) -> Tree:
    found: Tree = w(tree)["pieces"][0]
    return found


def rename(name: str) -> Callable[[Tree], Any]:
    def change(tree: Tree) -> None:
        tree["files"][name] = tree["files"].pop("pieces-00000.safetensors")
        for entry in tree["tensors"]:
            for each in entry["pieces"]:
                each["file"] = name

    return change


CHANGES: dict[str, Callable[[Tree], Any]] = {
    "absolute name": rename("/etc/hostname"),
    "name of a parent": rename("../../../pieces-00000.safetensors"),
    "name in a folder": rename("sub/pieces-00000.safetensors"),
    "other name": rename("weights.bin"),
    "name with a line": rename("pieces-00000.safetensors\n"),
    "empty name": rename(""),
    "shape too large": lambda t: w(t).update(shape=[10**15, 5]),
    "shape and piece too large": lambda t: (
        w(t).update(shape=[10**15, 5]),
        piece(t).update(shape=[10**15, 5]),
    ),
    "negative shape": lambda t: w(t).update(shape=[-40, -5]),
    "shape of floats": lambda t: w(t).update(shape=[40.0, 5.0]),
    "shape of booleans": lambda t: w(t).update(shape=[True, True]),
    "shape of text": lambda t: w(t).update(shape="40"),
    "many dimensions": lambda t: (
        w(t).update(shape=[1] * 10_000),
        piece(t).update(shape=[1] * 10_000, offset=[0] * 10_000),
    ),
    "piece outside": lambda t: piece(t).update(offset=[1, 0]),
    "piece of fewer dimensions": lambda t: piece(t).update(offset=[0]),
    "piece before the data": lambda t: piece(t).update(begin=0),
    "negative begin": lambda t: piece(t).update(begin=-1),
    "piece behind the end": lambda t: piece(t).update(begin=10**12),
    "piece of no file": lambda t: piece(t).update(file="pieces-00001.safetensors"),
    "the same bytes often": lambda t: w(t).update(
        shape=[40 * 10_000, 5], pieces=[piece(t) | {"offset": [40 * n, 0]} for n in range(10_000)]
    ),
    "no checksums": lambda t: piece(t).update(checksums=[]),
    "too many checksums": lambda t: piece(t).update(checksums=[0] * 10_000),
    "checksums of text": lambda t: piece(t).update(checksums=["0"]),
    "unknown type": lambda t: w(t).update(dtype="F128"),
    "no type": lambda t: w(t).pop("dtype"),
    "type of a list": lambda t: w(t).update(dtype=["F32"]),
    "no name": lambda t: w(t).update(name=None),
    "a tensor twice": lambda t: t["tensors"].append(w(t)),
    "chunks of nothing": lambda t: t.update(chunk_bytes=0),
    "huge chunks": lambda t: t.update(chunk_bytes=2**50),
    "huge header": lambda t: t["files"]["pieces-00000.safetensors"].update(header_bytes=10**12),
    "header as long as the file": lambda t: t["files"]["pieces-00000.safetensors"].update(
        header_bytes=t["files"]["pieces-00000.safetensors"]["bytes"]
    ),
    "no files": lambda t: t.pop("files"),
    "files of a list": lambda t: t.update(files=[]),
    "a file of a list": lambda t: t.update(files={"pieces-00000.safetensors": []}),
    "a file with more": lambda t: t["files"]["pieces-00000.safetensors"].update(mode=7),
    "tensors of numbers": lambda t: t.update(tensors=[1, 2]),
    "no tensors": lambda t: t.update(tensors=None),
    "meta of text": lambda t: t.update(meta="step"),
    "step of text": lambda t: t.update(step="1"),
    "negative step": lambda t: t.update(step=-1),
    "format of text": lambda t: t.update(format="1"),
    "negative format": lambda t: t.update(format=-1),
    "another serial": lambda t: t.update(serial=2),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_manifest_that_no_save_writes(case: str, path: Path) -> None:
    tree = tree_of(path)
    CHANGES[case](tree)
    sign(path, json.dumps(tree).encode(), serial=3)
    for act in (open_checkpoint, verify):
        with pytest.raises(DamagedCheckpoint) as caught:
            act(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DamagedCheckpoint, match="is whole"):
        newest_whole(path.parents[1], say=lambda message: None)


def test_a_copy_is_of_the_same_format(path: Path, tmp_path: Path) -> None:
    """And stands alone, with what is said of it anew."""
    copied = copy_checkpoint(path, tmp_path / "other", {"decisions": [1]})
    shutil.rmtree(path)
    assert (verify(copied).format, verify(copied).serial) == (1, 1)
    assert open_checkpoint(copied).meta["decisions"] == [1]
