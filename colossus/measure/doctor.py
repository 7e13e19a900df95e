"""What this machine has and lacks, as measured, and what follows from it: one screen of text."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch.torch_version import TorchVersion

from colossus import __version__
from colossus.architecture import num_parameters
from colossus.hardware.machine import Machine, cache_folder
from colossus.job import Job
from colossus.measure.machine import compiler_lacks, free_memory_bytes
from colossus.words import count, duration, plural, rate, short, size

OLDEST_TORCH, NEWEST_TORCH = "2.11", "2.13.0"  # the range that pyproject.toml states
EXTRAS = {"datasets": "corpora named hf:NAME"}  # package -> what needs it
SLOW_TYPE = 0.5  # of the best type's rate: below it, a warning
SCARCE_BYTES = 2 * 10**9  # of memory or disk: less is a warning; the default job takes most of it
WIDTH = 100  # characters of a line
Row = tuple[str, str]


def report(machine: Machine, job: Job | None = None, runs: Path = Path("runs")) -> str:
    """The machine in words.

    job: a resolved one, of which is told what it would train.
    runs: where runs are kept, for the space left on that disk.
    """
    parts = [
        _rows("This machine", _has(machine, runs)),
        _rates(machine),
        _rows("What follows", _follows(machine, job)),
        _notes("What to know", _warnings(machine, runs)),
    ]
    return "\n\n".join(part for part in parts if part)


def torch_in_range(version: str) -> bool:
    """Whether Colossus is made for this release of torch; a build's suffix ("+cpu") does not count."""
    release = TorchVersion(version.partition("+")[0])
    return bool(release >= OLDEST_TORCH and release <= NEWEST_TORCH)


def _has(machine: Machine, runs: Path) -> Iterator[Row]:
    yield "processor", f"{machine.processor}, {plural(machine.cores, 'core')}"
    bandwidth = f"{size(machine.memory_bandwidth_bytes_per_second)}/s"
    memory = f"{size(machine.memory_bytes)}, of which {size(free_memory_bytes())} are free now"
    yield "memory", f"{memory}; copied at {bandwidth}"
    yield "GPUs", "; ".join(_gpus(machine)) or "none that PyTorch can use"
    yield "compiler", machine.compiler or f"none: {compiler_lacks()} is missing"
    yield "disk", f"{_space(runs)} free for {runs}/, {_space(cache_folder())} for {_short(cache_folder())}"
    yield "software", f"Python {platform.python_version()}, torch {torch.__version__}, Colossus {__version__}"


def _gpus(machine: Machine) -> Iterator[str]:
    for gpu in dict.fromkeys(machine.gpus):
        number = machine.gpus.count(gpu)
        name = f"{number} x {gpu.name}" if number > 1 else gpu.name
        yield f"{name}, {size(gpu.memory_bytes)}, bf16 at {rate(gpu.bf16_flops_per_second)}"


def _rates(machine: Machine) -> str:
    """The products' rates as a table: a row for each type, a column for each number of threads."""
    threads = sorted({r.threads for r in machine.rates})
    rates = {(r.type, r.threads): rate(r.flops_per_second) for r in machine.rates}
    types = sorted({r.type for r in machine.rates}, key=machine.flops_per_second, reverse=True)
    table = [["", *(plural(n, "thread") for n in threads)]]
    table += [[type, *(rates.get((type, n), "-") for n in threads)] for type in types]
    lines = [f"  {row[0]:<10}" + "".join(f"{cell:>14}" for cell in row[1:]) for row in table]
    return "\n".join(["Matrix products, the best of several sizes, as measured on the processor", *lines])


def _follows(machine: Machine, job: Job | None) -> Iterator[Row]:
    if machine.gpus:
        yield "device", f"{plural(len(machine.gpus), 'GPU')}, one rank each"
        yield "type", "bf16, with weights in fp32"
    else:
        yield "type", f"{_type(machine)}; weights are kept in fp32"
        yield "threads", f"{machine.best_threads} of {plural(machine.cores, 'core')}"
        if job is not None and job.run.threads is not None:
            threads = plural(job.run.threads, "thread")
            yield "training", f"{job.precision.type} on {threads}, whose steps were timed to be the quickest"
        yield "memory", _freed(machine)
    yield (
        "MFU",
        f"counted against {rate(machine.peak_flops_per_second(machine.device))}, {_denominator(machine)}",
    )
    yield (
        "compile",
        "where a run's first steps show that it pays" if machine.compiler else "no: layers run as they are",
    )
    if job is not None:
        yield "a run", _run(job)


def _freed(machine: Machine) -> str:
    if not machine.keeps_freed_memory:
        return "what was freed goes back to the system: keeping it gains nothing here"
    return f"what was freed is kept in training: large products {_times(machine.keeping_gain)} as fast"


def _type(machine: Machine) -> str:
    best = machine.best
    others = {r.type: machine.flops_per_second(r.type) for r in machine.rates if r.type != best.type}
    compared = (
        f"{_times(best.flops_per_second / other)} as fast as {type}" for type, other in others.items()
    )
    return ", ".join([best.type, *compared])


def _denominator(machine: Machine) -> str:
    if machine.gpus:
        return "the bf16 products of one GPU"
    return f"the best of the products: {machine.best.type} on {plural(machine.best.threads, 'thread')}"


def _run(job: Job) -> str:
    arch, run = job.model, job.run
    length = f"{duration(60 * run.minutes)} of training: " if run.minutes is not None else ""
    tokens = f" on {count(run.tokens)} tokens" if run.tokens is not None else ""
    shape = f"{plural(arch.num_layers, 'layer')} of width {count(arch.hidden_size)}"
    return f"{length}a model of {count(num_parameters(arch))} parameters ({shape}){tokens}"


def _warnings(machine: Machine, runs: Path) -> Iterator[str]:
    if not torch_in_range(torch.__version__):
        supported = f"{OLDEST_TORCH} to {NEWEST_TORCH}"
        yield f"torch {torch.__version__} is not in the range {supported} that Colossus is tested with."
    best = machine.best
    for type in sorted({r.type for r in machine.rates}):
        share = machine.flops_per_second(type) / best.flops_per_second
        if share < SLOW_TYPE and type != "fp32":
            yield f"{type} is {_times(1 / share)} slower than {best.type} here: it is never used unasked."
    if not machine.quiet:
        yield (
            "Other programs took the cores while this was measured, so rates may be too low. They are "
            "measured again once that is two minutes old; now: colossus doctor --refresh"
        )
    if not machine.compiler:
        yield f"torch.compile needs {compiler_lacks()}; without it training is slower, not different."
    if (free := free_memory_bytes()) < SCARCE_BYTES:
        yield f"Only {size(free)} of memory is free: close something, or train a smaller model."
    if (space := _free_bytes(runs)) < SCARCE_BYTES:
        yield f"Only {size(space)} of disk is free for runs: checkpoints may find no room."
    for package, need in EXTRAS.items():
        if importlib.util.find_spec(package) is None:
            yield f"{package} is not installed, which {need} need: pip install {package}"


def _times(ratio: float) -> str:
    """2.3 times, 130 times."""
    return f"{short(ratio, 2) if ratio < 99.5 else count(round(ratio, -1))} times"


def _space(path: Path) -> str:
    return size(_free_bytes(path))


def _free_bytes(path: Path) -> int:
    """Free space of the disk on which `path` lies or would be made."""
    path = path.absolute()
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free


def _short(path: Path) -> str:
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


def _rows(title: str, rows: Iterable[Row]) -> str:
    return "\n".join([title, *(f"  {name:<10} {text}" for name, text in rows)])


def _notes(title: str, notes: Iterable[str]) -> str:
    lines = [
        textwrap.fill(f"- {note}", WIDTH, initial_indent="  ", subsequent_indent="    ") for note in notes
    ]
    return "\n".join([title, *lines]) if lines else ""
