"""Manifests that no save writes, with a right checksum: an error in words, and nothing is read or taken."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from colossus.checkpoints.find import latest, verify
from colossus.checkpoints.format import committed_line, is_committed
from colossus.checkpoints.load import DamagedCheckpoint, newest_whole, open_checkpoint
from colossus.checkpoints.save import Saver
from colossus.errors import UserError
from colossus.generation.load import open_weights

Tree = dict[str, Any]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with Saver(tmp_path / "run") as saver:
        saver.save(1, {("w", "weight"): torch.ones(40, 5), ("n", "buffer"): torch.tensor(1)}, {"step": 1})
    return tmp_path / "run" / "checkpoints" / "step-00000001"


def sign(path: Path, data: bytes, serial: int = 1) -> None:
    (path / "manifest.json").write_bytes(data)
    (path / "COMMITTED").write_text(committed_line(serial, data))


def tree_of(path: Path) -> Tree:
    tree: Tree = json.loads((path / "manifest.json").read_bytes())
    return tree


def w(tree: Tree) -> Tree:
    found: Tree = next(entry for entry in tree["tensors"] if entry["name"] == "w")
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
    sign(path, json.dumps(tree).encode())
    for act in (open_checkpoint, verify):
        with pytest.raises(DamagedCheckpoint) as caught:
            act(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DamagedCheckpoint, match="is whole"):
        newest_whole(path.parents[1], say=lambda message: None)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"null", b"[" * 10**6, b'{"meta":' * 10**6, b"\xff\xfe", b'{"format": 1}']
)
def test_what_is_no_manifest(data: bytes, path: Path) -> None:
    sign(path, data)
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json is no manifest"):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["COMMITTED", "manifest.json", "pieces-00000.safetensors"])
@pytest.mark.parametrize("kind", ["fifo", "device", "link", "folder", "sparse"])
def test_what_is_no_file_of_the_checkpoint(name: str, kind: str, path: Path, tmp_path: Path) -> None:
    """A link to the right bytes, too: they lie elsewhere."""
    file = path / name
    if kind == "link":
        (tmp_path / name).write_bytes(file.read_bytes())
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "sparse":
        with file.open("wb") as stream:
            stream.truncate(2**42)
    else:
        file.symlink_to(tmp_path / name if kind == "link" else "/dev/zero")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DamagedCheckpoint):
        verify(path)
    with pytest.raises(DamagedCheckpoint):
        open_checkpoint(path).read("w")
    assert is_committed(path) is (name != "COMMITTED" or kind == "sparse")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def test_a_pipe_in_place_of_a_part_that_was_whole_when_it_was_opened(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    (path / "pieces-00000.safetensors").unlink()
    os.mkfifo(path / "pieces-00000.safetensors")
    with pytest.raises(DamagedCheckpoint, match="no regular file"):
        checkpoint.read("w")


def test_checkpoints_that_lie_elsewhere(path: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "checkpoints").symlink_to(path.parent)
    with pytest.raises(UserError, match="a link that leads out of the run"):
        latest(theirs)
    (theirs / "checkpoints").unlink()
    (theirs / "checkpoints").mkdir()
    (theirs / "checkpoints" / path.name).symlink_to(path)
    with pytest.raises(DamagedCheckpoint, match=r"no checkpoint in .* is whole; passed over .*: a link"):
        latest(theirs, say=lambda message: None)
    (tmp_path / "link to a run").symlink_to(path.parents[1])  # the user's own words
    assert latest(tmp_path / "link to a run") is not None


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({}, r"its manifest describes no model \(architecture"),
        ({"architecture": 5}, r"its manifest describes no model \(architecture"),
        ({"architecture": {"hidden_size": -1}}, r"its manifest describes no model \(architecture"),
        ({"architecture": {"hidden_size": 64, "num_layers": 99_999}}, "too few tensors for the 99999 layers"),
    ],
)
def test_a_manifest_of_no_model(meta: Tree, message: str, path: Path) -> None:
    sign(path, json.dumps(tree_of(path) | {"meta": meta}).encode())
    with pytest.raises(UserError, match=message):
        open_weights(path)
