"""The bytes of files, decompressed by their endings: of several compressed streams in a file, all of them."""

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
BUFFER_BYTES = 2**20


def open_bytes(path: str) -> BinaryIO:
    """A file's bytes, as a stream."""
    suffix = Path(path).suffix.lower()
    if suffix == ".gz":
        return io.BufferedReader(gzip.open(path), BUFFER_BYTES)
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(path), "zstd"), BUFFER_BYTES)
    makers: dict[str, Callable[[], Any]] = {".bz2": bz2.BZ2Decompressor, ".xz": lzma.LZMADecompressor}
    if suffix in makers:
        return io.BufferedReader(_Streams(path, makers[suffix]), BUFFER_BYTES)
    return Path(path).open("rb")


class _Streams(io.RawIOBase):
    """Compressed streams one behind another, zero bytes between them.

    Python's own readers take whatever cannot be read behind the first stream for the end: padding, which xz
    may put there, and damage.
    """

    def __init__(self, path: str, make: Callable[[], Any]) -> None:
        self._file = Path(path).open("rb")  # noqa: SIM115  # it is closed with this
        self._make = make
        self._decompressor = make()
        self._is_between = False

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data:
            given = b""
            if self._is_between:
                given = self._next_stream()
                if not given:
                    return 0
            elif self._decompressor.needs_input:
                given = self._file.read(BUFFER_BYTES)
                if not given:
                    raise EOFError("compressed file ended before the end of its last stream")
            data = self._decompressor.decompress(given, len(buffer))
            self._is_between = self._decompressor.eof
        buffer[: len(data)] = data
        return len(data)

    def _next_stream(self) -> bytes:
        """The first bytes of the next stream, and a decompressor for it; nothing where there is none."""
        given = self._decompressor.unused_data.lstrip(b"\0")
        while not given and (more := self._file.read(BUFFER_BYTES)):
            given = more.lstrip(b"\0")
        self._decompressor = self._make()
        return given
