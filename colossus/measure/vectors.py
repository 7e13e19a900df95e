"""Times products of a matrix with few rows, which are what generation waits for: they are bound by memory,
not by arithmetic, so that the quickest type for training need not be theirs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache

import torch

from colossus.models.packed import Packed, can_pack, pack, product
from colossus.precision.policy import TYPES

SIZE = 1024
MATRICES = 16  # 64 MiB in fp32: beyond most caches
PROBE_SECONDS = 0.03
CLEAR = 1.2  # so many times as quick as fp32 is a narrower type, where it is worth its rounding
HOPELESS = 8.0  # so many times slower with one small matrix: a type that is not timed further


@dataclass(frozen=True)
class VectorProduct:
    """A type, whether matrices are packed (see `models.packed`), and the seconds of a matrix of 1,024^2."""

    type: str
    packed: bool
    seconds: float

    @property
    def dtype(self) -> torch.dtype:
        return TYPES[self.type]


def quickest_vector_product(dtype: torch.dtype | None = None) -> VectorProduct:
    """On this processor, in one type or in any: fp32 unless another is clearly quicker."""
    ways = [way for way in _vector_products() if dtype in (None, way.dtype)]
    return min(ways, key=lambda way: way.seconds * (CLEAR if way.dtype != torch.float32 else 1.0))


@lru_cache(maxsize=1)
def _vector_products() -> tuple[VectorProduct, ...]:
    """Every way, timed in about half a second; ways that are hopeless by one matrix alone.

    On one thread: which way is the quickest does not depend on it, and other programs disturb it less.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        small = {(name, packed): _seconds(name, packed, 1) for name in TYPES for packed in _layouts(name)}
        limit = HOPELESS * min(small.values())
        return tuple(
            VectorProduct(name, packed, seconds if seconds > limit else _seconds(name, packed, MATRICES))
            for (name, packed), seconds in small.items()
        )
    finally:
        torch.set_num_threads(threads)


def _layouts(name: str) -> tuple[bool, ...]:
    return (False, True) if can_pack(TYPES[name]) else (False,)


def _seconds(name: str, packed: bool, num_matrices: int) -> float:
    """Of one matrix: the quickest of the passes over all that fit into the time of a probe."""
    dtype = TYPES[name]
    matrices = [torch.full((SIZE, SIZE), 0.5, dtype=dtype) for _ in range(num_matrices)]
    copies: list[Packed | None] = [pack([matrix], [], dtype) if packed else None for matrix in matrices]
    x = torch.ones(1, SIZE, dtype=dtype)
    times: list[float] = []
    end = time.perf_counter() + PROBE_SECONDS
    with torch.no_grad():
        while len(times) < 3 or time.perf_counter() < end:
            started = time.perf_counter()
            for matrix, copy in zip(matrices, copies, strict=True):
                product(x, matrix, None, copy)
            times.append((time.perf_counter() - started) / num_matrices)
    return min(times[1:])
