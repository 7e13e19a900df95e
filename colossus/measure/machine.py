"""Measures this machine in about a second, and keeps the result under its processor's name.

Processors differ by more than two orders of magnitude in the same type, so nothing is taken from a name.

Products are timed at several sizes: a library may run those of one size on one thread and of the next on two.
What else runs only makes a probe slower. So each takes the quickest of many runs, and where others took the
cores meanwhile, it tries once more. A table that was disturbed all the same is measured again once it is two
minutes old; each figure keeps the better of both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

from colossus.hardware.machine import (
    CGROUP,
    Gpu,
    Machine,
    Rate,
    available_cores,
    cache_folder,
    keep_text,
    slug,
)
from colossus.measure import accounting
from colossus.measure.instructions import held_to, instructions
from colossus.measure.memory import keeping_gain
from colossus.precision.policy import TYPES

SIZES = (768, 1024)  # of square products; then larger ones, as long as one takes no more than PROBE_SECONDS
LARGER, LARGEST = 1.5, 8192
GPU_SIZE = 8192
SMALL = 128  # a product that shows a hopeless type within milliseconds
PROBE_SECONDS = 0.05
SMALL_SECONDS = 0.01
ATTEMPTS = 2  # at a probe that was disturbed
DISTURBED_SECONDS = 120.0  # for so long a disturbed table does
HOPELESS = 0.1  # of the best type's rate on small products: a type below it is not timed at full size


@lru_cache(maxsize=1)
def this_machine() -> Machine:
    """The machine from its kept table, or measured now."""
    kept = _kept()
    if kept is None or not (kept.quiet or age_seconds(table_path()) < DISTURBED_SECONDS):
        return measure_again()
    return kept


def measure_again() -> Machine:
    """Measures, and keeps the table where the cache can be written."""
    machine, kept = measure_machine(), _kept()
    if kept is not None and not machine.quiet:
        machine = machine.with_best_of(kept)
    this_machine.cache_clear()
    path = table_path()
    with contextlib.suppress(OSError):  # where nothing can be kept, measuring again costs a second
        keep_text(path, machine.to_json())
    return machine


def measure_machine() -> Machine:
    """Times matrix products by type and threads, memory and dispatch; restores the thread count."""
    started, threads = time.perf_counter(), torch.get_num_threads()
    cores = available_cores()
    try:
        rates, quiet = _rates(cores)
        best = max(rates, key=lambda rate: rate.flops_per_second)
        torch.set_num_threads(best.threads)
        bandwidth, dispatch = _memory_bandwidth(), _dispatch_seconds()
        keeping = keeping_gain()
    finally:
        torch.set_num_threads(threads)
    return Machine(
        processor=processor_name(),
        cores=cores,
        rates=tuple(rates),
        memory_bandwidth_bytes_per_second=bandwidth,
        memory_bytes=memory_bytes(),
        dispatch_seconds=dispatch,
        compiler=compiler(),
        gpus=_gpus(),
        versions={"torch": str(torch.__version__), "python": platform.python_version()},
        instructions=instructions(),
        keeping_gain=round(keeping, 3),
        quiet=quiet,
        seconds=round(time.perf_counter() - started, 3),
    )


def memory_bytes() -> int:
    """Memory of the machine, or a container's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int((CGROUP / "memory.max").read_text()))
    except (OSError, ValueError):  # no container, or one without a limit: "max"
        return total


def free_memory_bytes() -> int:
    """Memory that can be taken now, within a container's limit; the whole where the system does not say."""
    free = memory_bytes()
    with contextlib.suppress(OSError, ValueError, KeyError):
        free = min(free, 1024 * _numbers(Path("/proc/meminfo"))["MemAvailable"])
    with contextlib.suppress(OSError, ValueError, KeyError):
        files = _numbers(CGROUP / "memory.stat")["inactive_file"]  # given back when memory is short
        used = int((CGROUP / "memory.current").read_text()) - files
        free = min(free, max(0, memory_bytes() - used))
    return free


def _numbers(file: Path) -> dict[str, int]:
    """`name 123` or `name: 123 kB` of each line."""
    lines = (line.replace(":", " ").split() for line in file.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1}


def processor_name() -> str:
    """As the system calls it, and what the environment holds it to: what is measured of a processor that is
    held to fewer instructions is not true of it free. It names the table, and decides nothing."""
    held = (f"{library} held to {value}" for library, value in held_to().items())
    return ", ".join([_system_name(), *held])


def _system_name() -> str:
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        names = {key.strip(): value.strip() for key, value in fields.items()}
        if "model name" in names:
            model = f"{names.get('cpu family', '')}.{names.get('model', '')}"
            return f"{names['model name']} (family {model})"
        if "CPU part" in names:  # arm has numbers instead of a name
            return f"{platform.machine()} (implementer {names['CPU implementer']}, part {names['CPU part']})"
    if platform.system() == "Darwin":
        asked = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        )
        if asked.returncode == 0:
            return asked.stdout.strip()
    return platform.processor() or platform.machine()


def compiler() -> str | None:
    """The C++ compiler that torch.compile would use on a processor; None where it lacks something."""
    return None if compiler_lacks() else shutil.which(_compiler_name())


def compiler_lacks() -> str | None:
    """What torch.compile misses on this machine, in words; None where it has all."""
    if shutil.which(_compiler_name()) is None:
        return f"the C++ compiler {_compiler_name()}"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "the headers of Python (Python.h)"  # what it compiles is a module of Python
    return None


def _compiler_name() -> str:
    return os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")


def table_path() -> Path:
    """Where the table of this machine is kept: named after all that its rates depend on."""
    gpus = torch.cuda.device_count()
    name = (
        f"{processor_name()} {available_cores()} cores torch {torch.__version__} {gpus} gpus {instructions()}"
    )
    return cache_folder() / "machines" / f"{slug(name)}.json"


def kept_folder() -> Path:
    """Where what was timed later is kept, beside that table."""
    return table_path().with_suffix("")


def age_seconds(path: Path) -> float:
    """Since it was written."""
    return time.time() - path.stat().st_mtime


def _kept() -> Machine | None:
    try:
        machine = Machine.from_json(table_path().read_text())
    except (OSError, ValueError):
        return None
    return dataclasses.replace(machine, compiler=compiler(), memory_bytes=memory_bytes())


def _rates(cores: int) -> tuple[list[Rate], bool]:
    """Every type on 1, half and all cores, and whether nothing disturbed that.

    A type that is hopeless on one thread is not timed further.
    """
    torch.set_num_threads(1)
    small = {
        name: _flops(SMALL) / _fastest(_product(SMALL, dtype), SMALL_SECONDS) for name, dtype in TYPES.items()
    }
    rates: list[Rate] = []
    quiet = True
    for name, dtype in TYPES.items():
        if small[name] < HOPELESS * max(small.values()):
            rates.append(Rate(name, 1, small[name]))
            continue
        for threads in sorted({1, max(1, cores // 2), cores}):
            torch.set_num_threads(threads)
            rate, undisturbed = _undisturbed_rate(name, dtype, threads)
            rates.append(rate)
            quiet = quiet and undisturbed
    return rates, quiet


def _undisturbed_rate(name: str, dtype: torch.dtype, threads: int) -> tuple[Rate, bool]:
    """The best rate, and whether others left the cores to the last attempt."""
    found: list[Rate] = []
    for _ in range(ATTEMPTS):
        before = accounting.read()
        found += _rates_by_size(name, dtype, threads)
        if not accounting.was_disturbed(before, accounting.read(), threads):
            return _best(found), True
    return _best(found), False


def _rates_by_size(name: str, dtype: torch.dtype, threads: int) -> list[Rate]:
    found: list[Rate] = []
    size = SIZES[0]
    while True:
        seconds = _fastest(_product(size, dtype), PROBE_SECONDS)
        found.append(Rate(name, threads, _flops(size) / seconds, size))
        if len(found) < len(SIZES):
            size = SIZES[len(found)]
            continue
        size = 32 * round(LARGER * size / 32)
        if size > LARGEST or _flops(size) / found[-1].flops_per_second > PROBE_SECONDS:
            return found


def _best(rates: list[Rate]) -> Rate:
    return max(rates, key=lambda rate: rate.flops_per_second)


def _product(size: int, dtype: torch.dtype) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(size, size, generator=generator).to(dtype)
    right = torch.randn(size, size, generator=generator).to(dtype)
    out = torch.empty(size, size, dtype=dtype)
    return lambda: torch.mm(left, right, out=out)


def _flops(size: int) -> float:
    return 2.0 * size**3


def _memory_bandwidth() -> float:
    source = torch.ones(16 * 2**20)  # 64 MiB: beyond most caches
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / _fastest(lambda: target.copy_(source), PROBE_SECONDS)


def _dispatch_seconds() -> float:
    one = torch.ones(1)

    def hundred() -> None:
        for _ in range(100):
            one.add_(0.0)

    return _fastest(hundred, 0.02) / 100


def _fastest(act: Callable[[], object], seconds: float) -> float:
    """The quickest of the runs that fit into `seconds`, after one that warms up."""
    act()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        started = time.perf_counter()
        act()
        times.append(time.perf_counter() - started)
    return min(times)


def _gpus() -> tuple[Gpu, ...]:
    gpus: list[Gpu] = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        rate = _flops(GPU_SIZE) / _fastest(_gpu_product(torch.device("cuda", index)), PROBE_SECONDS)
        gpus.append(Gpu(properties.name, properties.total_memory, rate))
    return tuple(gpus)


def _gpu_product(device: torch.device) -> Callable[[], object]:
    left, right = (torch.randn(GPU_SIZE, GPU_SIZE, device=device, dtype=torch.bfloat16) for _ in range(2))

    def product() -> None:
        _ = left @ right
        torch.cuda.synchronize(device)

    return product
