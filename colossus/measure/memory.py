"""Whether to keep memory that was freed, for what is allocated next, instead of giving it back to the system.

glibc maps large pieces of memory anew each time, and the system then fills them with zeros page by page: a
training step may take 48,000 page faults, and a product with an output of 32 MiB a third of its speed (on a
Xeon with AMX; elsewhere nothing). What was freed is kept within the process, whose memory so stays near its
peak.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
import resource
import sys
import time
from functools import lru_cache
from pathlib import Path

import torch

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt(3)
KEEP_BYTES = 2**30  # up to which a piece is kept
# As glibc begins, but for a threshold of mappings that had grown with what was freed, up to this.
GIVE_BACK_BYTES = {TRIM_THRESHOLD: 2 * 2**25, MMAP_THRESHOLD: 2**25}
OUTPUT_BYTES = 40 * 2**20  # of the product that shows it: beyond what glibc keeps of itself
ROUNDS = 6


@lru_cache(maxsize=1)
def can_keep() -> bool:
    """Whether this process's memory is glibc's: elsewhere there is nothing to choose."""
    return platform.libc_ver()[0] == "glibc" and hasattr(ctypes.CDLL(None), "mallopt")


def keep_freed(keep: bool) -> bool:
    """Keeps freed memory from now on, or gives it back as usual; whether it is kept."""
    if not can_keep():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    most = 2**31 - 1  # of a C int
    wanted = {TRIM_THRESHOLD: most, MMAP_THRESHOLD: KEEP_BYTES} if keep else GIVE_BACK_BYTES
    done = [mallopt(name, value) for name, value in wanted.items()]
    if not keep:
        ctypes.CDLL(None).malloc_trim(0)
    return keep and all(done)


def keeping_gain() -> float:
    """How many times quicker a product into fresh memory is where freed memory is kept; 1 where that cannot
    be. Leaves this process giving memory back, but for what it has kept by then."""
    if not can_keep():
        return 1.0
    rows = OUTPUT_BYTES // (4 * 1024)
    left, right = torch.ones(rows, 64), torch.ones(64, 1024)

    def quickest() -> float:
        times = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            left @ right
            times.append(time.perf_counter() - began)
        return min(times)

    keep_freed(False)
    given_back = quickest()  # before anything is kept, which would be taken from then on
    try:
        keep_freed(True)
        return given_back / quickest()
    finally:
        keep_freed(False)


def peak_memory_bytes() -> int:
    """The most that this process has had in memory so far."""
    # What Linux counts below has what the process that started this one had, too.
    with contextlib.suppress(OSError, IndexError):
        return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def peak_device_bytes() -> dict[str, int]:
    """The most that this process has had on its GPU so far: of tensors, and reserved for them. Empty without
    one."""
    if not torch.cuda.is_initialized():
        return {}
    return {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
    }
