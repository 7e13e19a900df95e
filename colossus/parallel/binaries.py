"""The compiler's cache: one for each kind of vector instructions, free of what a killed compilation left.

The compiler keeps its binaries between runs and loads any that is there. A linker that was killed leaves half
a file, and every later run would fail on it ("file too short"). And what was compiled while PyTorch used
AVX-512 wrote behind the ends of tensors in a process that is held to AVX2 (ATEN_CPU_CAPABILITY): losses that
are no numbers, or a crash somewhere else.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import sys
from pathlib import Path

from colossus.untrusted import open_to_append


def choose_cache() -> None:
    """Lets this process and its children compile into a folder of the processor's vector instructions, unless
    the environment names one."""
    import torch
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    capability = torch.backends.cpu.get_cpu_capability().lower().replace(" ", "-")
    usual = default_cache_dir()
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", usual) == usual:  # PyTorch itself sets it, where it is not
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(usual) / capability)


def drop_torn_binaries(folder: Path | None = None) -> list[Path]:
    """Removes half-written binaries from the compiler's cache, or `folder`; returns which.

    A lock, shared by all runs until they end, tells whether one of them may be writing just now: then
    nothing is removed.
    """
    if folder is None:
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        folder = Path(cache_dir())
    torn: list[Path] = []
    with contextlib.suppress(OSError):  # a cache that can't be written is not ours to mend
        folder.mkdir(parents=True, exist_ok=True)
        lock = open_to_append(folder / "colossus.lock")  # stays open: held to the end
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            torn = [path for end in ("so", "o") for path in folder.glob(f"*/*.{end}") if not is_whole(path)]
            for path in torn:
                path.unlink(missing_ok=True)
        fcntl.flock(lock, fcntl.LOCK_SH)
    return torn


def is_whole(path: Path) -> bool:
    """Whether a binary has all that its header speaks of; not on Linux: whether it has anything."""
    with path.open("rb") as file:
        header, size = file.read(64), os.fstat(file.fileno()).st_size
    if sys.platform != "linux":
        return size > 0
    if len(header) < 64 or header[:4] != b"\x7fELF":
        return False
    (sections_begin,) = struct.unpack_from("<Q", header, 0x28)
    entry_size, num_entries = struct.unpack_from("<HH", header, 0x3A)
    return 0 < sections_begin <= sections_begin + entry_size * num_entries <= size
