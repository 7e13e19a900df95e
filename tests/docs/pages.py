"""The pages of the documentation, and what stands in them.

A fenced block may be told apart by an HTML comment on the line before it:

    <!-- not run: REASON -->     its commands are checked, not run
    <!-- exact -->               what it shows is exactly what its one command prints
    <!-- file: NAME -->          it is the content of a file that later blocks use
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOP = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CHANGELOG.md")]
PAGES = [*TOP, *sorted((ROOT / "docs").glob("*.md"))]
NOTE = re.compile(r"<!-- (not run|exact|file)(?:: (.+))? -->")


def name(page: Path) -> str:
    """As it is called in reports of tests."""
    return str(page.relative_to(ROOT))


@dataclass(frozen=True)
class Block:
    """A fenced block. note, said: of the comment before it, such as "not run" and the reason."""

    page: Path
    line: int
    language: str
    text: str
    note: str = ""
    said: str = ""

    @property
    def where(self) -> str:
        return f"{name(self.page)}:{self.line}"

    def commands(self) -> list[tuple[str, list[str]]]:
        """Each line that begins with `$ ` (continued by a backslash), and what is shown below it."""
        found: list[tuple[str, list[str]]] = []
        for line in self.text.replace("\\\n", " ").splitlines():
            if line.startswith("$ "):
                found.append((line[2:].strip(), []))
            elif found:
                found[-1][1].append(line)
        return found


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    begin: int | None = None
    for index, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if begin is None:
            begin = index
            continue
        note = NOTE.fullmatch(lines[begin - 1]) if begin else None
        kind, said = (note[1], note[2] or "") if note else ("", "")
        text = "\n".join(lines[begin + 1 : index]) + "\n"
        yield Block(page, begin + 1, lines[begin][3:].strip(), text, kind, said)
        begin = None
    assert begin is None, f"{name(page)}: the block of line {begin} does not end"


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def code(page: Path) -> list[str]:
    """What is marked as code: `spans` of the prose, and blocks but those of Python, which are run."""
    spans = re.findall(r"`([^`\n]+)`", prose(page))
    return spans + [block.text for block in blocks(page) if block.language != "python"]
