"""Measures this machine in about a second, and keeps the result under its processor's name.

Processors differ by more than two orders of magnitude in the same type, so nothing is taken from a name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

from colossus.hardware.machine import Gpu, Machine, Rate, cache_folder, slug

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZE = 1024  # of the square products
SMALL = 128  # a product that shows a hopeless type within milliseconds
PROBE_SECONDS = 0.1
SMALL_SECONDS = 0.01
HOPELESS = 0.1  # of the best type's rate on small products: a type below it is not timed at full size


@lru_cache(maxsize=1)
def this_machine() -> Machine:
    """The machine from its cached table, or measured now."""
    return _cached() or measure_again()


def measure_again() -> Machine:
    """Measures, and keeps the table where the cache can be written."""
    machine = measure_machine()
    path = _table()
    with contextlib.suppress(OSError):  # where nothing can be kept, measuring again costs a second
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.part")
        temporary.write_text(machine.to_json())
        temporary.replace(path)
    return machine


def measure_machine() -> Machine:
    """Times matrix products by type and threads, memory and dispatch; restores the thread count."""
    started, threads = time.perf_counter(), torch.get_num_threads()
    try:
        rates = _rates(available_cores())
        best = max(rates, key=lambda rate: rate.flops_per_second)
        torch.set_num_threads(best.threads)
        bandwidth, dispatch = _memory_bandwidth(), _dispatch_seconds()
    finally:
        torch.set_num_threads(threads)
    return Machine(
        processor=processor_name(),
        cores=available_cores(),
        rates=tuple(rates),
        memory_bandwidth_bytes_per_second=bandwidth,
        memory_bytes=memory_bytes(),
        dispatch_seconds=dispatch,
        compiler=compiler(),
        gpus=_gpus(),
        versions={"torch": str(torch.__version__), "python": platform.python_version()},
        seconds=round(time.perf_counter() - started, 3),
    )


def available_cores() -> int:
    """Cores that this process may use: its affinity, and a container's share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            return min(cores, max(1, round(int(quota) / int(period))))
    return cores


def memory_bytes() -> int:
    """Memory of the machine, or a container's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        return min(total, int(limit)) if limit != "max" else total
    except (OSError, ValueError):
        return total


def free_memory_bytes() -> int:
    """Memory that can be taken now; the whole where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        return min(available, memory_bytes())
    except (OSError, StopIteration):
        return memory_bytes()


def processor_name() -> str:
    """As the system calls it; it names the table, and decides nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        names = {key.strip(): value.strip() for key, value in fields.items()}
        if "model name" in names:
            model = f"{names.get('cpu family', '')}.{names.get('model', '')}"
            return f"{names['model name']} (family {model})"
    except OSError:
        pass
    if platform.system() == "Darwin":
        asked = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        )
        if asked.returncode == 0:
            return asked.stdout.strip()
    return platform.processor() or platform.machine()


def compiler() -> str | None:
    """The C++ compiler that torch.compile would use on a processor."""
    names = [os.environ.get("CXX", ""), "g++", "clang++"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _table() -> Path:
    key = (
        f"{processor_name()} {available_cores()} cores torch {torch.__version__} {torch.cuda.device_count()}"
    )
    return cache_folder() / "machines" / f"{slug(key)}.json"


def _cached() -> Machine | None:
    try:
        machine = Machine.from_json(_table().read_text())
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return dataclasses.replace(machine, compiler=compiler(), memory_bytes=memory_bytes())


def _rates(cores: int) -> list[Rate]:
    """Every type on 1, half and all cores; a type that is hopeless on one thread is not timed further."""
    torch.set_num_threads(1)
    small = {name: _product_rate(SMALL, dtype, SMALL_SECONDS) for name, dtype in TYPES.items()}
    rates: list[Rate] = []
    for name, dtype in TYPES.items():
        if small[name] < HOPELESS * max(small.values()):
            rates.append(Rate(name, 1, small[name]))
            continue
        for threads in sorted({1, max(1, cores // 2), cores}):
            torch.set_num_threads(threads)
            rates.append(Rate(name, threads, _product_rate(SIZE, dtype, PROBE_SECONDS)))
    return rates


def _product_rate(size: int, dtype: torch.dtype, seconds: float) -> float:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(size, size, generator=generator).to(dtype)
    right = torch.randn(size, size, generator=generator).to(dtype)
    out = torch.empty(size, size, dtype=dtype)
    return 2 * size**3 / _fastest(lambda: torch.mm(left, right, out=out), seconds)


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
    """The quickest of the runs that fit into `seconds`, after one that warms up: what else runs on the
    machine only makes a run slower."""
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
        size, device = 8192, torch.device("cuda", index)
        left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))

        def product(
            left: torch.Tensor = left, right: torch.Tensor = right, device: torch.device = device
        ) -> None:
            _ = left @ right
            torch.cuda.synchronize(device)

        properties = torch.cuda.get_device_properties(index)
        rate = 2 * size**3 / _fastest(product, PROBE_SECONDS)
        gpus.append(Gpu(properties.name, properties.total_memory, rate))
    return tuple(gpus)
