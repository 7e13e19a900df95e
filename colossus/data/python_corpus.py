"""The default corpus: the sources of the standard library of the Python that runs this."""

from __future__ import annotations

import sys
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from colossus.data.corpus import Corpus, Part, fingerprint_of

NEAR = 0.8  # share of common lines (Jaccard) from which on two files count as one
SKETCH = 8  # smallest line hashes of a file; near files share most of them
SHARED = 3  # of these, from which on two files are compared


@dataclass(frozen=True)
class _Source:
    path: str

    def __call__(self) -> Iterator[str]:
        yield Path(self.path).read_text(encoding="utf-8")


def python_corpus() -> Corpus:
    """Every source file but installed packages; tests too, where they are there. Files that (nearly)
    repeat an earlier one are left out, so that what is held out is not also learned."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(p for p in root.rglob("*.py") if not {"site-packages", "dist-packages"} & set(p.parts))
    kept: list[tuple[str, int, int]] = []
    seen = _Seen()
    repeats = unreadable = 0
    for file in files:
        try:
            data = file.read_bytes()
            data.decode("utf-8")
        except (OSError, UnicodeDecodeError):
            unreadable += 1
            continue
        if not data.strip():
            continue
        lines = frozenset(zlib.crc32(line) for line in map(bytes.strip, data.splitlines()) if line)
        if seen.repeats(lines):
            repeats += 1
            continue
        kept.append((str(file.relative_to(root)), len(data), zlib.crc32(data)))
    parts = tuple(Part(name, size, _Source(str(root / name))) for name, size, _ in kept)
    version = ".".join(map(str, sys.version_info[:3]))
    fingerprint = fingerprint_of([(name, crc) for name, _, crc in kept])
    size = sum(part.num_bytes for part in parts)
    note = (
        f"Python {version}'s standard library: {len(parts):,} files, {size / 1e6:.1f} MB, fingerprint "
        f"{fingerprint}; left out: {repeats} that repeat another, {unreadable} that are not UTF-8"
    )
    return Corpus("python", parts, fingerprint, (note,))


class _Seen:
    """Files by the hashes of their lines, found again by the smallest of these (Broder 1997)."""

    def __init__(self) -> None:
        self._files: list[frozenset[int]] = []
        self._with: dict[int, list[int]] = {}

    def repeats(self, lines: frozenset[int]) -> bool:
        """Whether a file of these lines is near one that was seen; if not, it is seen now."""
        sketch = sorted(lines)[:SKETCH]
        shared = Counter(file for key in sketch for file in self._with.get(key, ()))
        for file, count in shared.items():
            other = self._files[file]
            if count >= min(SHARED, len(sketch)) and len(lines & other) >= NEAR * len(lines | other):
                return True
        for key in sketch:
            self._with.setdefault(key, []).append(len(self._files))
        self._files.append(lines)
        return False
