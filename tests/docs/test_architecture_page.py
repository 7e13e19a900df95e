"""The map of the house names every room on its floor, and only tests and files that exist."""

from __future__ import annotations

import importlib.util
import re

from tests.docs.pages import ROOT

TEXT = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")


def floors() -> dict[str, int]:
    """Room -> floor, as the checker has them."""
    spec = importlib.util.spec_from_file_location("check_floors", ROOT / "tools" / "check_floors.py")
    assert spec is not None and spec.loader is not None
    import sys

    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module.FLOORS


def test_every_room_is_on_its_floor() -> None:
    rows = re.findall(r"^\| (\d) \| `(\w+)` \|", TEXT, re.MULTILINE)
    assert {room: int(floor) for floor, room in rows} == floors()
    there = {path.stem for path in (ROOT / "colossus").iterdir() if path.suffix in ("", ".py")}
    assert {room for _, room in rows} == there - {"__init__", "__pycache__"}
    assert [floor for floor, _ in rows] == sorted((floor for floor, _ in rows), reverse=True)


def test_every_file_that_is_named_exists() -> None:
    named = re.findall(r"`([\w/]+(?:\.py|/))(?:::\w+)?`", TEXT)
    missing = [path for path in named if not ((ROOT / path).exists() or (ROOT / "colossus" / path).exists())]
    assert len(named) > 40 and not missing


def test_every_invariant_has_a_test_that_exists() -> None:
    table = TEXT.partition("## What holds")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    for row in rows:
        tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert tests, row
        for path, name in tests:
            assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE), f"{path}::{name}"
    assert len(rows) > 10
