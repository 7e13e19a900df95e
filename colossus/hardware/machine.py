"""This machine as measured: plain data, kept as JSON; and what of it is at hand, without measuring."""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

CGROUP = Path("/sys/fs/cgroup")  # the limits of a container, where this is one
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
KEEPING_PAYS = 1.05  # times quicker, at least
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Rate:
    """What square matrix products of one type reach on so many threads, at the size where that is most."""

    type: str
    threads: Count
    flops_per_second: Positive
    size: Count = 1024


@dataclass(frozen=True)
class Gpu:
    """One accelerator, and what its bf16 products reach."""

    name: str
    memory_bytes: Count
    bf16_flops_per_second: Positive


@dataclass(frozen=True)
class Machine:
    """A measured machine. What depends on the moment (free memory) is read when asked.

    compiler: what torch.compile would use on the processor; None where it can't.
    instructions: what the libraries of products may use; "" in a table that does not say.
    keeping_gain: how many times quicker a large product is where freed memory is kept.
    quiet: no other program held the cores while the rates were measured.
    seconds: what measuring took.
    """

    processor: str
    cores: Count
    rates: Annotated[tuple[Rate, ...], Field(min_length=1)]
    memory_bandwidth_bytes_per_second: Positive
    memory_bytes: Count
    dispatch_seconds: Positive
    compiler: str | None
    gpus: tuple[Gpu, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    instructions: str = ""
    keeping_gain: Positive = 1.0
    quiet: bool = True
    seconds: float = 0.0

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"

    @property
    def best(self) -> Rate:
        """The quickest type on a processor and its thread count."""
        return max(self.rates, key=lambda rate: rate.flops_per_second)

    @property
    def best_threads(self) -> int:
        """The fewest threads that come within 3% of the best rate."""
        best = self.best
        same = (rate for rate in self.rates if rate.type == best.type)
        return min(rate.threads for rate in same if rate.flops_per_second >= 0.97 * best.flops_per_second)

    @property
    def keeps_freed_memory(self) -> bool:
        """Whether that pays on a processor."""
        return not self.gpus and self.keeping_gain >= KEEPING_PAYS

    def peak_flops_per_second(self, device: str) -> float:
        """The denominator of MFU: of one GPU, or of the whole processor in its best type."""
        return self.gpus[0].bf16_flops_per_second if device == "cuda" else self.best.flops_per_second

    def flops_per_second(self, type: str) -> float:
        """The best rate of one type; 0 where it was not measured."""
        return max((rate.flops_per_second for rate in self.rates if rate.type == type), default=0.0)

    def with_best_of(self, other: Machine) -> Machine:
        """This machine with the better of each figure of both: what else ran only made them worse."""
        rates = {(rate.type, rate.threads): rate for rate in other.rates}
        for rate in self.rates:
            kept = rates.setdefault((rate.type, rate.threads), rate)
            if rate.flops_per_second > kept.flops_per_second:
                rates[rate.type, rate.threads] = rate
        bandwidths = (m.memory_bandwidth_bytes_per_second for m in (self, other))
        return replace(
            self,
            rates=tuple(rates.values()),
            memory_bandwidth_bytes_per_second=max(bandwidths),
            dispatch_seconds=min(self.dispatch_seconds, other.dispatch_seconds),
            quiet=self.quiet or other.quiet,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Machine:
        """Reads what `to_json` wrote. Raises ValueError where that is damaged."""
        return TypeAdapter(cls).validate_json(text)


def available_cores() -> int:
    """Cores that this process may use: its affinity, and a container's share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = (CGROUP / "cpu.max").read_text().split()
        if quota != "max":
            return min(cores, max(1, round(int(quota) / int(period))))
    return cores


def ranks_here(num_ranks: int) -> int:
    """Of the ranks of a job, those on this machine: as many as its launcher started here, else all."""
    return min(num_ranks, max(1, int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))))


def cache_folder() -> Path:
    """Where measurements and token shards are kept: COLOSSUS_CACHE, else the user's cache folder."""
    if folder := os.environ.get("COLOSSUS_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "colossus"


def keep_text(path: Path, text: str) -> None:
    """Keeps a file of the cache, whole or not at all, and not where a link leads. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.part")
    temporary.unlink(missing_ok=True)
    with temporary.open("x", encoding="utf-8") as file:
        file.write(text)
    temporary.replace(path)


def slug(text: str) -> str:
    """`text` as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unknown"
