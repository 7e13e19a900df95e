"""What training steps reached on this machine, by type and threads: plain data, kept beside its table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Annotated, NamedTuple

from pydantic import Field, TypeAdapter

from colossus.hardware.machine import Count, Positive


class Setting(NamedTuple):
    """What a training step may be computed with."""

    type: str
    threads: int


@dataclass(frozen=True)
class Timing:
    """flops_per_second: model FLOP/s of whole training steps that are not compiled. gain: what compiled ones
    reach over that, once a run has seen it; compile_seconds: what compiling took that run."""

    type: str
    threads: Count
    flops_per_second: Positive
    gain: Positive | None = None
    compile_seconds: Annotated[float, Field(ge=0)] | None = None

    @property
    def setting(self) -> Setting:
        return Setting(self.type, self.threads)


@dataclass(frozen=True)
class Timings:
    """Of one shape of model. width: its. quiet: no other program took the cores meanwhile."""

    width: Count
    timings: tuple[Timing, ...]
    quiet: bool = True

    def of(self, settings: Iterable[Setting]) -> tuple[Timing, ...]:
        wanted = set(settings)
        return tuple(timing for timing in self.timings if timing.setting in wanted)

    def with_best_of(self, other: Timings) -> Timings:
        """The better rate of each setting: what else ran only made them worse. Newer gains stay."""
        merged = {timing.setting: timing for timing in other.timings}
        for timing in self.timings:
            old = merged.get(timing.setting, timing)
            gain, seconds = timing.gain, timing.compile_seconds
            merged[timing.setting] = replace(
                timing,
                flops_per_second=max(timing.flops_per_second, old.flops_per_second),
                gain=old.gain if gain is None else gain,
                compile_seconds=old.compile_seconds if seconds is None else seconds,
            )
        return replace(self, timings=tuple(merged.values()))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Timings:
        """Reads what `to_json` wrote. Raises ValueError where that is damaged."""
        return TypeAdapter(cls).validate_json(text)
