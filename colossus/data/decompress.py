"""The bytes of files, decompressed by their endings."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

ENDINGS = (".gz", ".bz2", ".xz", ".zst")
FAILURES = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading raises where a file cannot be read, or is not what its ending says."""


def open_bytes(path: str) -> BinaryIO:
    """A file's bytes, as a stream."""
    openers: dict[str, Callable[[str], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    suffix = Path(path).suffix.lower()
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(path), "zstd"), 2**20)
    return openers.get(suffix, lambda p: Path(p).open("rb"))(path)
