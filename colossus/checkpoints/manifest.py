"""The manifest of a checkpoint: written, read, and held to what a save writes. Nothing here imports torch."""

from __future__ import annotations

import json
import re
from dataclasses import astuple
from pathlib import Path
from typing import Any

from colossus.checkpoints.format import (
    COMMITTED,
    FORMAT,
    MANIFEST,
    DamagedCheckpoint,
    Entry,
    Key,
    Manifest,
    Vouched,
    Writers,
    committed_line,
    read_bytes,
    read_marker,
)
from colossus.checkpoints.format1 import check_all, decode_lists, demand, natural, title
from colossus.checkpoints.index import cuts_from_json, entry_from_json, entry_to_json
from colossus.cuts import Cut
from colossus.errors import UserError
from colossus.untrusted import MIB, parse_json

MAX_MANIFEST_BYTES = 2048 * MIB  # of format 1; one of format 2 has less than a MiB
MAX_CUTS = 16
MAX_GROUP = 1 << 16
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


def encode(manifest: Manifest) -> bytes:
    """The manifest as it is stored. Raises ValueError where `meta` is not plain JSON."""
    assert isinstance(manifest.source, Writers), "format 1 is only read"
    cuts: dict[tuple[Cut, ...], int] = {}
    entries = [
        entry_to_json(entry, cuts.setdefault(entry.cuts, len(cuts))) for entry in manifest.tensors.values()
    ]
    tree = {
        "format": manifest.format,
        "step": manifest.step,
        "serial": manifest.serial,
        "chunk_bytes": manifest.chunk_bytes,
        "meta": manifest.meta,
        "writers": {
            "num": manifest.source.num,
            "group": manifest.source.group,
            "vouched": [astuple(each) for each in manifest.source.vouched],
        },
        "cuts": [[astuple(cut) for cut in each] for each in cuts],
        "tensors": entries,
    }
    return json.dumps(tree, allow_nan=False, separators=(",", ":")).encode()


def decode(data: bytes) -> Manifest:
    """The manifest from its stored form.

    Raises:
        UserError: a format newer than this program's.
        ValueError: it is none, or contradicts itself.
    """
    tree = parse_json(data)
    try:
        if natural(tree["format"]) > FORMAT:
            raise UserError(
                f"the checkpoint is of format {tree['format']}; this version of colossus reads up to {FORMAT}"
            )
        return decode_lists(tree) if tree["format"] < 2 else _decode_rules(tree)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__} at {error}") from None


def _decode_rules(tree: dict[str, Any]) -> Manifest:
    writers = tree["writers"]
    cuts = [cuts_from_json(each) for each in tree["cuts"]]
    tensors: dict[Key, Entry] = {}
    for each in tree["tensors"]:
        demand(natural(each["cuts"]) < len(cuts), "a tensor is cut by no rule")
        entry = entry_from_json(each, cuts[each["cuts"]])
        tensors[entry.key] = entry
    manifest = Manifest(
        step=natural(tree["step"]),
        serial=natural(tree["serial"]),
        meta=tree["meta"],
        tensors=tensors,
        source=Writers(
            natural(writers["num"]),
            natural(writers["group"]),
            tuple(Vouched(natural(size), sha256) for size, sha256 in writers["vouched"]),
        ),
        chunk_bytes=natural(tree["chunk_bytes"]),
        format=tree["format"],
    )
    check_all(manifest, len(tree["tensors"]))
    check_rules(manifest)
    return manifest


def check_rules(manifest: Manifest) -> None:
    """Raises ValueError unless each part of a tensor has a writer of its own, and files hold them all."""
    source = manifest.source
    assert isinstance(source, Writers)
    demand(0 < source.group <= MAX_GROUP and source.num > 0, "there are no writers")
    demand(len(source.vouched) == -(-source.num // source.group), "not every writer is vouched for")
    for each in source.vouched:
        demand(_SHA256.fullmatch(each.sha256) is not None, f"{each.sha256!r:.80} is no SHA-256")
    known = dict[tuple[Cut, ...], tuple[int, int]]()  # dimensions, and how far it is to the last writer
    for entry in manifest.tensors.values():
        if entry.cuts not in known:
            known[entry.cuts] = _reach(entry, source.num)
        dims, reach = known[entry.cuts]
        demand(dims <= len(entry.shape), f"{title(entry)} is cut along a dimension that it does not have")
        demand(entry.first + reach < source.num, f"{title(entry)} has more parts than there are writers")
    held = sum(entry.num_bytes for entry in manifest.tensors.values())
    demand(held <= manifest.num_bytes, "there are more tensors than files hold")


def _reach(entry: Entry, num: int) -> tuple[int, int]:
    demand(len(entry.cuts) <= MAX_CUTS, f"{title(entry)} is cut too often")
    reach = 0
    for cut in sorted(entry.cuts, key=lambda cut: cut.stride):
        demand(0 < cut.pieces <= num and 0 < cut.parts <= num, f"{title(entry)} is cut by no rule")
        demand(cut.stride > reach, f"two parts of {title(entry)} have one writer")
        reach += (cut.parts - 1) * cut.stride
    return max((cut.dim + 1 for cut in entry.cuts), default=0), reach


def read_claim(path: Path) -> Manifest:
    """The manifest of a committed checkpoint, of whose other files nothing is known yet.

    Raises DamagedCheckpoint, with the file at fault; UserError for a newer format.
    """
    marker = read_marker(path)
    data = read_bytes(path / MANIFEST, min(int(marker.group(2)), MAX_MANIFEST_BYTES))
    if committed_line(int(marker.group(1)), data) != marker.group(0):
        raise DamagedCheckpoint(f"{path / MANIFEST} changed since it was written ({COMMITTED} disagrees)")
    try:
        manifest = decode(data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except ValueError as error:
        raise DamagedCheckpoint(f"{path / MANIFEST} is no manifest: {error}") from None
    if manifest.serial != int(marker.group(1)):
        raise DamagedCheckpoint(f"{path / COMMITTED} changed since it was written")
    return manifest


def with_meta(data: bytes, serial: int, meta: dict[str, Any]) -> bytes:
    """A stored manifest of any format, with another serial number and this over its `meta`."""
    tree = json.loads(data)
    tree |= {"serial": serial, "meta": tree["meta"] | meta}
    return json.dumps(tree, allow_nan=False, separators=(",", ":")).encode()
