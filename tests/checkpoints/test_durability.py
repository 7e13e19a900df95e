"""What a power failure leaves: of what was written, only what was synced is sure to be there.

The calls of the system that saves make are recorded. For each moment the folder is made again as storage may
hold it then: without anything that was not synced, or without what was not synced of one file alone.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from colossus.checkpoints import committer
from colossus.checkpoints.claims import committed
from colossus.checkpoints.find import verify
from colossus.checkpoints.load import DamagedCheckpoint
from colossus.checkpoints.save import Saver
from tests.checkpoints import outside
from tests.checkpoints.crashing import saved_step, state


@dataclasses.dataclass(frozen=True)
class Call:
    """what: "make" (a file), "mkdir", "write", "sync", "unlink", "rmdir", or "saved" (the step in `data`)."""

    what: str
    path: str = ""
    data: bytes = b""


class Calls:
    """What this process and the one that commits have done to files, in order."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def __iter__(self) -> Iterator[Call]:
        for line in self._log.read_text().splitlines():
            what, path, data = json.loads(line)
            yield Call(what, path, base64.b64decode(data))

    def saved(self, path: str, step: int) -> None:
        line = json.dumps(["saved", path, base64.b64encode(bytes([step])).decode()])
        with self._log.open("a") as log:
            log.write(line + "\n")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Calls]:
    log = tmp_path / "log"
    monkeypatch.setattr(committer, "command", outside.with_fault("record", log))
    outside.record(log, monkeypatch.setattr)
    yield Calls(log)
    monkeypatch.undo()


def durable(calls: list[Call], run: Path, lost: Callable[[str], bool]) -> dict[str, bytes | None]:
    """Path -> content (None: a folder) after these calls, without what was not synced of what is `lost`."""
    now: dict[str, bytes | None] = {}  # as the program sees it
    names: set[str] = set()  # of what is there for sure
    contents: dict[str, bytes | None] = {}
    for call in calls:
        if call.what in ("make", "mkdir"):
            now[call.path] = contents[call.path] = b"" if call.what == "make" else None
        elif call.what == "write":
            now[call.path] = (now[call.path] or b"") + call.data
        elif call.what in ("unlink", "rmdir"):
            del now[call.path]
        elif call.what == "sync" and call.path in now and now[call.path] is not None:
            contents[call.path] = now[call.path]
        elif call.what == "sync":
            names = {path for path in names if Path(path).parent != Path(call.path)}
            names |= {path for path in now if Path(path).parent == Path(call.path)}
    found = {path: content for path, content in now.items() if not lost(path)}
    found |= {path: contents[path] for path in names if lost(path)}

    def has_a_place(path: str) -> bool:
        return all(
            found.get(str(p), b"") is None for p in Path(path).parents if p.is_relative_to(run) and p != run
        )

    return {path: found[path] for path in sorted(found) if has_a_place(path)}


def restore(tree: dict[str, bytes | None], run: Path, there: Path) -> None:
    there.mkdir()
    for path, content in tree.items():
        target = there / Path(path).relative_to(run)
        if content is None:
            target.mkdir(exist_ok=True)
        else:
            target.write_bytes(content)


def test_a_power_failure_at_any_moment(calls: Calls, tmp_path: Path) -> None:
    """Also in the first save of all, and while the checkpoint before is deleted. What was told as saved is
    there, and nothing ever claims to be a checkpoint and is not."""
    run = tmp_path / "run"
    run.mkdir()
    with Saver(run, keep=1) as saver:
        for step in (1, 2, 3):
            saver.save(step, state(step), {"step": step})
            saver.wait()
            calls.saved(str(run / "."), step)
    record = [c for c in calls if Path(c.path).is_relative_to(run) and c != Call("mkdir", str(run))]
    names = {call.path for call in record if call.what in ("make", "mkdir")}
    assert len(record) > 60 and len(names) == 16  # 3 x (folder, four files), and `checkpoints`
    told, seen, tried = 0, set[int](), 0
    for end in range(1, len(record) + 1):
        told = record[end - 1].data[0] if record[end - 1].what == "saved" else told
        trees = [durable(record[:end], run, lambda path: True)]
        trees += [durable(record[:end], run, lambda path, name=name: path == name) for name in names]
        for tree in {tuple(sorted(tree.items())): tree for tree in trees}.values():
            tried += 1
            there = tmp_path / f"there-{tried}"
            restore(tree, run, there)
            try:
                step = saved_step(there)
                for path in committed(there):
                    verify(path)
            except DamagedCheckpoint as error:
                raise AssertionError(f"after {record[:end][-3:]}: {error}") from error
            assert step >= told, f"after {record[:end][-3:]}: {told} was saved, {step} is found"
            seen.add(step)
    assert seen == {0, 1, 2, 3}


def test_the_order_of_a_commit(calls: Calls, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Saver(run) as saver:
        saver.save(1, state(1), {"step": 1})
    folder = run / "checkpoints" / "step-00000001"
    order = [(call.what, os.path.relpath(call.path, folder)) for call in calls]
    files = ["pieces-00000.safetensors", "pieces-00000.index", "manifest.json", "COMMITTED"]
    expected = [("mkdir", "."), ("sync", "..")]
    for name in files:
        expected += [("make", name), ("sync", name), ("sync", ".")]
    kept = [call for call in order if call in expected]
    assert [call for n, call in enumerate(kept) if call not in kept[:n] or call == ("sync", ".")] == expected
    assert order.index(("sync", "../..")) < order.index(("mkdir", "."))  # the name of `checkpoints`
