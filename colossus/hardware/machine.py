"""This machine as measured: plain data, kept as JSON."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Rate:
    """What a square matrix product of one type reaches on so many threads."""

    type: str
    threads: int
    flops_per_second: float


@dataclass(frozen=True)
class Gpu:
    """One accelerator, and what its bf16 products reach."""

    name: str
    memory_bytes: int
    bf16_flops_per_second: float


@dataclass(frozen=True)
class Machine:
    """A measured machine. Rates that depend on the moment (free memory) are read when asked."""

    processor: str
    cores: int
    rates: tuple[Rate, ...]
    memory_bandwidth_bytes_per_second: float
    memory_bytes: int
    dispatch_seconds: float
    compiler: str | None
    gpus: tuple[Gpu, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"

    @property
    def best(self) -> Rate:
        """The quickest type on a processor and its thread count."""
        return max(self.rates, key=lambda rate: rate.flops_per_second)

    @property
    def best_type(self) -> str:
        """The quickest type for matrix products: "fp32" or "bf16"."""
        return "bf16" if self.gpus else self.best.type

    @property
    def best_threads(self) -> int:
        """The fewest threads that come within 3% of the best rate."""
        best = self.best
        near = [
            r
            for r in self.rates
            if r.type == best.type and r.flops_per_second >= 0.97 * best.flops_per_second
        ]
        return min(rate.threads for rate in near)

    @property
    def peak_flops_per_second(self) -> float:
        """The denominator of MFU: of one GPU, or of the whole processor in its best type."""
        return self.gpus[0].bf16_flops_per_second if self.gpus else self.best.flops_per_second

    def flops_per_second(self, type: str) -> float:
        """The best rate of one type; 0 where it was not measured."""
        return max((rate.flops_per_second for rate in self.rates if rate.type == type), default=0.0)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Machine:
        values: dict[str, Any] = json.loads(text)
        values["rates"] = tuple(Rate(**rate) for rate in values["rates"])
        values["gpus"] = tuple(Gpu(**gpu) for gpu in values["gpus"])
        return cls(**values)


def cache_folder() -> Path:
    """Where measurements and token shards are kept: COLOSSUS_CACHE, else the user's cache folder."""
    if folder := os.environ.get("COLOSSUS_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "colossus"


def slug(text: str) -> str:
    """`text` as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unknown"
