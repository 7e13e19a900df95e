"""Manifests that no save writes, with a right checksum: an error in words, and nothing is read or taken."""

from __future__ import annotations

import hashlib
import json
import os
import resource
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from colossus.checkpoints.find import latest, verify
from colossus.checkpoints.format import is_committed
from colossus.checkpoints.index import Index, decode_index, encode_index, split
from colossus.checkpoints.load import DamagedCheckpoint, newest_whole, open_checkpoint
from colossus.checkpoints.save import Saver
from colossus.errors import UserError
from colossus.generation.load import open_weights
from colossus.models.hf.header import TYPES
from tests.checkpoints.samples import sign, tree_of

Tree = dict[str, Any]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with Saver(tmp_path / "run") as saver:
        saver.save(1, {("w", "weight"): torch.ones(40, 5), ("n", "buffer"): torch.tensor(1)}, {"step": 1})
    return tmp_path / "run" / "checkpoints" / "step-00000001"


def w(tree: Tree) -> Tree:
    found: Tree = next(entry for entry in tree["tensors"] if entry["name"] == "w")
    return found


def vouched(tree: Tree) -> list[Any]:
    found: list[Any] = tree["writers"]["vouched"]
    return found


def cut(tree: Tree, *cuts: object) -> None:
    """As if `w` was cut so."""
    tree["cuts"].append(cuts)
    w(tree)["cuts"] = len(tree["cuts"]) - 1


def writers(tree: Tree, num: object, group: object = 1, **more: object) -> None:
    tree["writers"].update(num=num, group=group, **more)


CHANGES: dict[str, Callable[[Tree], Any]] = {
    "shape too large": lambda t: w(t).update(shape=[10**15, 5]),
    "shape and file too large": lambda t: (
        w(t).update(shape=[10**15, 5]),
        vouched(t).__setitem__(0, [10**17, vouched(t)[0][1]]),
    ),
    "another shape": lambda t: w(t).update(shape=[39, 5]),
    "negative shape": lambda t: w(t).update(shape=[-40, -5]),
    "shape of floats": lambda t: w(t).update(shape=[40.0, 5.0]),
    "shape of text": lambda t: w(t).update(shape="405"),
    "shape of many dimensions": lambda t: w(t).update(shape=[1] * 10_000),
    "no shape": lambda t: w(t).pop("shape"),
    "unknown type": lambda t: w(t).update(dtype="F128"),
    "no type": lambda t: w(t).pop("dtype"),
    "type of a list": lambda t: w(t).update(dtype=["F32"]),
    "another type": lambda t: w(t).update(dtype="F16"),
    "no name": lambda t: w(t).update(name=None),
    "another name": lambda t: w(t).update(name="v", dtype="I64", shape=[100]),
    "a tensor twice": lambda t: t["tensors"].append(w(t)),
    "a tensor more": lambda t: t["tensors"].append(w(t) | {"name": "v", "shape": [1]}),
    "a tensor less": lambda t: t["tensors"].pop(),
    "first writer that is none": lambda t: w(t).update(first=1),
    "first writer below zero": lambda t: w(t).update(first=-1),
    "first writer of text": lambda t: w(t).update(first="0"),
    "rule that is none": lambda t: w(t).update(cuts=1),
    "rule below zero": lambda t: w(t).update(cuts=-1),
    "parts for more writers": lambda t: cut(t, [0, 1, 2, 1]),
    "parts for very many writers": lambda t: cut(t, [0, 1, 10**12, 1]),
    "two parts for one writer": lambda t: cut(t, [0, 1, 1, 0]),
    "pieces without end": lambda t: cut(t, [0, 10**12, 1, 1]),
    "no pieces": lambda t: cut(t, [0, 0, 1, 1]),
    "dimension that is none": lambda t: cut(t, [2, 1, 1, 1]),
    "cuts without end": lambda t: cut(t, *([0, 1, 1, 1] for _ in range(10_000))),
    "cut of text": lambda t: cut(t, "0111"),
    "cut of less": lambda t: cut(t, [0, 1, 1]),
    "no cuts": lambda t: t.pop("cuts"),
    "no writers": lambda t: writers(t, 0),
    "more writers": lambda t: writers(t, 2),
    "very many writers": lambda t: writers(t, 10**12, 10**12),
    "groups of none": lambda t: writers(t, 1, 0),
    "writers of text": lambda t: writers(t, "1"),
    "a group that is none": lambda t: writers(t, 1, 64),
    "nobody vouched for": lambda t: writers(t, 1, vouched=[]),
    "vouched for without a checksum": lambda t: vouched(t)[0].pop(),
    "a checksum of text": lambda t: vouched(t)[0].__setitem__(1, "../" * 21 + "x"),
    "another checksum": lambda t: vouched(t)[0].__setitem__(1, "0" * 64),
    "another length": lambda t: vouched(t)[0].__setitem__(0, vouched(t)[0][0] + 1),
    "other chunks": lambda t: t.update(chunk_bytes=100),
    "chunks of nothing": lambda t: t.update(chunk_bytes=0),
    "huge chunks": lambda t: t.update(chunk_bytes=2**50),
    "tensors of numbers": lambda t: t.update(tensors=[1, 2]),
    "no tensors": lambda t: t.update(tensors=None),
    "meta of text": lambda t: t.update(meta="step"),
    "step of text": lambda t: t.update(step="1"),
    "negative step": lambda t: t.update(step=-1),
    "format of text": lambda t: t.update(format="1"),
    "negative format": lambda t: t.update(format=-1),
    "another format": lambda t: t.update(format=1),
    "another serial": lambda t: t.update(serial=2),
}


SEEN_WHEN_READ = {"another shape", "another type", "another name", "a tensor more", "a tensor less",
                  "another checksum", "other chunks"}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_a_manifest_that_no_save_writes(case: str, path: Path) -> None:
    tree = tree_of(path)
    CHANGES[case](tree)
    sign(path, json.dumps(tree).encode())

    def load(path: Path) -> None:
        checkpoint = open_checkpoint(path)
        entries = checkpoint.manifest.tensors.items()
        checkpoint.load_into({key: torch.empty(e.shape, dtype=TYPES[e.dtype]) for key, e in entries})

    for act in (load, verify) if case in SEEN_WHEN_READ else (open_checkpoint, verify):
        with pytest.raises(DamagedCheckpoint) as caught:
            act(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DamagedCheckpoint, match="is whole"):
        newest_whole(path.parents[1], say=lambda message: None)


INDEXES: dict[str, Callable[[Index], bytes]] = {
    "huge header": lambda i: encode_index(replace(i, file=replace(i.file, header_bytes=10**12))),
    "header as long as the file": lambda i: encode_index(
        replace(i, file=replace(i.file, header_bytes=i.file.bytes))
    ),
    "shorter header": lambda i: encode_index(replace(i, file=replace(i.file, header_bytes=8))),
    "another length": lambda i: encode_index(replace(i, file=replace(i.file, bytes=i.file.bytes + 1))),
    "another checksum of the header": lambda i: encode_index(
        replace(i, file=replace(i.file, header_checksum=7))
    ),
    "other rules": lambda i: encode_index(replace(i, rules=i.rules ^ 1)),
    "no checksums": lambda i: encode_index(replace(i, checksums=array("I"))),
    "more checksums": lambda i: encode_index(replace(i, checksums=array("I", [*i.checksums, 0]))),
    "other checksums": lambda i: encode_index(replace(i, checksums=array("I", [0] * len(i.checksums)))),
    "half a checksum": lambda i: encode_index(i)[:-1],
    "nothing": lambda i: b"",
    "no table": lambda i: b"[]\n",
    "nested": lambda i: b"[" * 10**6,
    "numbers of text": lambda i: encode_index(i).replace(b'"file":[', b'"file":["'),
}


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_that_no_save_writes(case: str, path: Path) -> None:
    """Although the manifest vouches for it."""
    file, tree = path / "pieces-00000.index", tree_of(path)
    data = INDEXES[case](decode_index(split(file.read_bytes())[0]))
    file.write_bytes(data)
    vouched(tree)[0][1] = hashlib.sha256(data).hexdigest()
    sign(path, json.dumps(tree).encode())
    for act in (verify, lambda path: newest_whole(path.parents[1], say=lambda message: None)):
        with pytest.raises(DamagedCheckpoint) as caught:
            act(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"null", b"[" * 10**6, b'{"meta":' * 10**6, b"\xff\xfe", b'{"format": 1}']
)
def test_what_is_no_manifest(data: bytes, path: Path) -> None:
    sign(path, data)
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json is no manifest"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "name", ["COMMITTED", "manifest.json", "pieces-00000.index", "pieces-00000.safetensors"]
)
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
