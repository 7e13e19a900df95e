"""The probes, on this machine."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from colossus.hardware.machine import Machine, Rate, available_cores, slug
from colossus.measure import machine as probes
from colossus.measure.machine import (
    compiler,
    compiler_lacks,
    free_memory_bytes,
    measure_again,
    measure_machine,
    memory_bytes,
    processor_name,
    this_machine,
)
from colossus.precision.policy import TYPES


@pytest.fixture(scope="module")
def measured() -> Machine:
    return measure_machine()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, as a new process meets it."""
    monkeypatch.setenv("COLOSSUS_CACHE", str(tmp_path))
    this_machine.cache_clear()
    yield tmp_path
    this_machine.cache_clear()


def keep(machine: Machine, age_seconds: float = 0.0) -> Path:
    """Puts a table where this machine's lies."""
    path = probes.table_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(machine.to_json())
    then = time.time() - age_seconds
    os.utime(path, (then, then))
    return path


def marked(machine: Machine, **values) -> Machine:
    """A table that no measurement yields, so that one sees where it came from."""
    return dataclasses.replace(machine, memory_bandwidth_bytes_per_second=1.0, **values)


def test_it_takes_about_a_second(measured: Machine) -> None:
    assert measured.seconds < (2.5 if measured.quiet else 15.0)


def test_what_was_measured_can_be(measured: Machine) -> None:
    assert {rate.type for rate in measured.rates} == {"fp32", "bf16"}
    assert {r.threads for r in measured.rates if r.type == measured.best.type} >= {1, measured.cores}
    assert 1e8 < measured.best.flops_per_second < 1e15
    assert 1e8 < measured.memory_bandwidth_bytes_per_second < 1e13
    assert 1e-8 < measured.dispatch_seconds < 1e-3
    assert 0 < free_memory_bytes() <= memory_bytes() == measured.memory_bytes
    assert measured.cores == available_cores() <= (os.cpu_count() or 1)


def test_products_are_of_several_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library may run one size on one thread and the next on two: the best of all is the rate."""
    monkeypatch.setattr(probes, "PROBE_SECONDS", 0.01)
    found = probes._rates_by_size("fp32", torch.float32, 1)
    assert [rate.size for rate in found][:2] == [768, 1024] and len({rate.size for rate in found}) == len(
        found
    )
    monkeypatch.setattr(
        probes, "_rates_by_size", lambda *_: [Rate("fp32", 1, r, n) for n, r in enumerate((3, 9, 5), 1)]
    )
    assert probes._undisturbed_rate("fp32", torch.float32, 1)[0] == Rate("fp32", 1, 9, 2)


def test_a_product_s_flops_are_those_that_torch_counts() -> None:
    with FlopCounterMode(display=False) as counter:
        probes._product(64, torch.float32)()
    assert counter.get_total_flops() == probes._flops(64)


def test_a_hopeless_type_is_not_timed_at_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "HOPELESS", 1.0)  # of two types the slower one, then
    monkeypatch.setattr(probes, "PROBE_SECONDS", 0.01)
    rates = measure_machine().rates
    counts = sorted(sum(rate.type == type for rate in rates) for type in TYPES)
    assert counts[0] == 1 and len(rates) == 1 + counts[1]


@pytest.mark.parametrize("threads", [1, 2])
def test_the_thread_count_is_left_as_it_was(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        monkeypatch.setattr(probes, "PROBE_SECONDS", 0.001)
        measure_machine()
        assert torch.get_num_threads() == threads
        monkeypatch.setattr(probes, "_memory_bandwidth", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            measure_machine()
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_a_kept_table_is_used(cache: Path, measured: Machine) -> None:
    keep(marked(measured, quiet=True), age_seconds=10**7)
    assert this_machine().memory_bandwidth_bytes_per_second == 1.0


def test_of_a_kept_table_the_compiler_and_the_memory_are_those_of_today(
    cache: Path, measured: Machine
) -> None:
    keep(dataclasses.replace(measured, compiler="gone", memory_bytes=7, quiet=True))
    assert (this_machine().compiler, this_machine().memory_bytes) == (compiler(), memory_bytes())


def test_the_table_is_named_after_the_processor(cache: Path) -> None:
    machine = this_machine()
    (path,) = cache.rglob("*.json")
    assert path.stem.startswith(slug(processor_name())) and Machine.from_json(path.read_text()) == machine
    assert not list(cache.rglob("*.part"))


def test_a_table_holds_for_as_many_cores(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = probes.table_path()
    monkeypatch.setattr(probes, "available_cores", lambda: 64)
    assert probes.table_path() != here and "64-cores" in probes.table_path().name


def test_rates_are_of_one_byte_and_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of 64 MiB moves twice as much, 100 calls are timed together; here a probe takes a second."""
    monkeypatch.setattr(probes, "_fastest", lambda act, seconds: 1.0)
    assert probes._memory_bandwidth() == 2 * 64 * 2**20
    assert probes._dispatch_seconds() == 0.01


@pytest.mark.parametrize("damage", ["", "{", '{"processor": "x"}', "[]"])
def test_a_damaged_table_is_measured_again(
    cache: Path, measured: Machine, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "PROBE_SECONDS", 0.01)
    path = keep(measured)
    path.write_text(damage)
    assert this_machine().processor == measured.processor
    assert Machine.from_json(path.read_text()).rates  # and it is whole again


def test_a_disturbed_table_does_for_a_while_and_keeps_the_better(
    cache: Path, measured: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "measure_machine", lambda: dataclasses.replace(measured, quiet=False))
    fast = Rate("fp32", 1, 1e15)
    keep(marked(measured, rates=(fast,), quiet=False), age_seconds=1)
    assert this_machine().rates == (fast,)
    this_machine.cache_clear()
    keep(marked(measured, rates=(fast,), quiet=False), age_seconds=probes.DISTURBED_SECONDS + 1)
    again = this_machine()
    assert fast in again.rates and len(again.rates) == len(measured.rates)
    assert again.memory_bandwidth_bytes_per_second == measured.memory_bandwidth_bytes_per_second
    assert not again.quiet


def test_measuring_again_replaces_what_this_process_knew(
    cache: Path, measured: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(marked(measured, quiet=True))
    assert this_machine().memory_bandwidth_bytes_per_second == 1.0
    monkeypatch.setattr(probes, "PROBE_SECONDS", 0.01)
    assert measure_again().memory_bandwidth_bytes_per_second > 1.0
    assert this_machine().memory_bandwidth_bytes_per_second > 1.0


def test_a_cache_that_cannot_be_written_is_no_hindrance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("COLOSSUS_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(probes, "PROBE_SECONDS", 0.01)
    this_machine.cache_clear()
    assert this_machine().rates
    this_machine.cache_clear()


@pytest.mark.skipif(sys.platform != "linux", reason="a process is bound to a core")
def test_another_program_on_the_cores_is_noticed() -> None:
    """All on one core, whose time a busy process takes half of."""
    core = {min(os.sched_getaffinity(0))}
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(busy.pid, core)
        os.sched_setaffinity(0, core)
        torch.set_num_threads(1)
        _, undisturbed = probes._undisturbed_rate("fp32", torch.float32, 1)
        assert not undisturbed
    finally:
        busy.kill()
        busy.wait()
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)


def test_the_compiler_is_the_one_that_torch_would_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "my-cxx"
    mine.write_text("#!/bin/sh\n")
    mine.chmod(0o755)
    monkeypatch.setenv("CXX", str(mine))
    assert compiler() == (None if compiler_lacks() else str(mine))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert compiler() is None and "no-such-compiler" in str(compiler_lacks())


def test_free_memory_is_at_least_what_nothing_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside that, what the system would give back counts."""
    monkeypatch.setattr(probes, "CGROUP", tmp_path)
    unused = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    assert 0.5 * unused < free_memory_bytes() <= memory_bytes()


def test_a_container_s_memory_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = memory_bytes()
    monkeypatch.setattr(probes, "CGROUP", tmp_path)
    assert memory_bytes() >= whole
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 200000\n")
    assert (memory_bytes(), free_memory_bytes()) == (1_000_000, 500_000)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_bytes() >= whole
