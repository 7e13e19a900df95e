"""Type, threads and compilation: what gives a run the most tokens by its end, as its steps were timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from colossus.hardware.machine import Machine, ranks_here
from colossus.hardware.timings import Setting, Timing
from colossus.job import Job

HOPELESS = 0.1  # of the best rate of products: a type below it is no choice
# Until a run on this machine has seen what compiling gains. What lies between products took 0.65 to 0.78 of
# its time once compiled, in fp32 and bf16 at width 128, with AVX-512 and AMX; the first compiled step took 27
# to 35 s on two cores, and blocks are alike, so that it hardly depends on the model.
REST_COMPILED = 0.75
COMPILE_SECONDS = 30.0
ALIKE = 2.0  # times wider or narrower: what compiling gained there is taken to hold here


@dataclass(frozen=True)
class Compiling:
    """What compiling a run's layers will gain, its rate over that of eager steps, and the seconds it takes.

    seen: a run on this machine has seen it, in a model of about this width.
    """

    gain: float
    seconds: float
    seen: bool = False

    def worth(self, seconds: float) -> float:
        """The seconds of eager steps that `seconds` give, compiling included."""
        return max(0.0, seconds - self.seconds) * self.gain

    def pays(self, seconds: float) -> bool:
        return self.worth(seconds) > seconds


@dataclass(frozen=True)
class Length:
    """Of a run, or of what is left of it: given seconds, or model FLOPs that take as long as they take."""

    seconds: float | None = None
    flops: float = 0.0

    def at(self, flops_per_second: float) -> float:
        """Its seconds, at the rate of eager steps."""
        return self.seconds if self.seconds is not None else self.flops / flops_per_second


@dataclass(frozen=True)
class Choice:
    """flops_per_second: of eager steps. mean_flops_per_second: of the whole run. compile: from the start."""

    setting: Setting
    flops_per_second: float
    mean_flops_per_second: float
    compile: bool


def choose(
    timings: Iterable[Timing],
    length: Length,
    compiling: Callable[[Timing], Compiling | None],
    *,
    forced: bool = False,
) -> Choice:
    """The setting that takes a run the furthest, or the quickest to its end.

    compiling: what it is expected to gain with a setting; None: nothing is to be compiled. A gain that no run
    has seen counts in the choice of the setting, and is left to the run's own first steps. forced: it is
    compiled, whether that pays or not.
    """

    def choice(timing: Timing) -> Choice:
        rate, gains = timing.flops_per_second, compiling(timing)
        seconds = length.at(rate)
        if gains is None or not (forced or gains.pays(seconds)):
            return Choice(timing.setting, rate, rate, compile=False)
        # Where compiling takes all of the time, the one with the better rate is still the better.
        share = max(gains.worth(seconds) / seconds, gains.gain * 1e-6)
        return Choice(timing.setting, rate, rate * share, compile=forced or gains.seen)

    return max(map(choice, timings), key=lambda choice: choice.mean_flops_per_second)


def compiling_of(
    timing: Timing, width: int, peak_flops_per_second: float, kept: Sequence[tuple[int, Timing]]
) -> Compiling:
    """What compiling is expected to gain: as a run has seen it with this setting or, in a model of about this
    width, with this type; else by the share of the time that is no product.

    peak_flops_per_second: of products of the type. kept: (width, what a run saw).
    """
    if timing.gain is not None:
        return Compiling(timing.gain, timing.compile_seconds or 0.0, seen=True)

    def distance(of: tuple[int, Timing]) -> tuple[float, int]:
        return abs(math.log(of[0] / width)), abs(of[1].threads - timing.threads)

    near = [(w, t) for w, t in kept if t.type == timing.type and 1 / ALIKE <= w / width <= ALIKE]
    if near:
        _, seen = min(near, key=distance)
        return Compiling(seen.gain or 1.0, seen.compile_seconds or 0.0, seen=True)
    products = min(1.0, timing.flops_per_second / peak_flops_per_second)
    return Compiling(1 / (products + (1 - products) * REST_COMPILED), COMPILE_SECONDS)


def candidates(job: Job, machine: Machine) -> list[Setting]:
    """Every setting that is open and not hopeless: types, and one thread, half of a rank's cores or all."""
    if job.fleet.device == "cuda":
        threads = job.run.threads or max(1, machine.best_threads // ranks_here(job.layout.num_ranks))
        return [Setting(job.precision.type or "bf16", threads)]
    best = machine.best.flops_per_second
    types = [t for t in dict.fromkeys(r.type for r in machine.rates) if _is_quick(machine, t, best)]
    cores = max(1, machine.cores // ranks_here(job.layout.num_ranks))
    numbers = sorted({cores, max(1, cores // 2), 1}, reverse=True)
    return [
        Setting(kind, threads)
        for kind in ([job.precision.type] if job.precision.type else types)
        for threads in ([job.run.threads] if job.run.threads else numbers)
    ]


def _is_quick(machine: Machine, kind: str, best: float) -> bool:
    return machine.flops_per_second(kind) >= HOPELESS * best
