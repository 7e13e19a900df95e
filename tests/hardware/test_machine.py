"""A machine as data: what follows from rates, and what a damaged table is."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colossus.hardware import machine as module
from colossus.hardware.machine import Gpu, Machine, Rate, available_cores, cache_folder, slug


def machine(*rates: tuple[str, int, float], **values) -> Machine:
    return Machine(
        **{
            "processor": "synthetic",
            "cores": 2,
            "rates": tuple(Rate(*rate) for rate in rates),
            "memory_bandwidth_bytes_per_second": 1e10,
            "memory_bytes": 8 * 10**9,
            "dispatch_seconds": 1e-6,
            "compiler": None,
        }
        | values
    )


AVX2 = machine(("fp32", 1, 61e9), ("fp32", 2, 120e9), ("bf16", 1, 0.9e9))
AVX512_BF16 = machine(("fp32", 1, 90e9), ("fp32", 2, 180e9), ("bf16", 1, 210e9), ("bf16", 2, 415e9))


def test_the_type_follows_from_the_rates() -> None:
    assert AVX2.best.type == "fp32" and AVX2.peak_flops_per_second("cpu") == 120e9
    assert AVX512_BF16.best.type == "bf16" and AVX512_BF16.peak_flops_per_second("cpu") == 415e9
    assert AVX2.flops_per_second("bf16") == 0.9e9 and AVX2.flops_per_second("fp64") == 0


def test_threads_that_bring_nothing_are_not_taken() -> None:
    assert AVX512_BF16.best_threads == 2
    assert machine(("fp32", 1, 61e9), ("fp32", 2, 62e9)).best_threads == 1
    assert machine(("fp32", 1, 61e9), ("fp32", 2, 40e9), ("bf16", 2, 9e9)).best_threads == 1


def test_the_threads_are_those_of_the_type_that_is_taken() -> None:
    """fp32 is nearly as quick with half of them: that says nothing of bf16."""
    both = machine(("fp32", 2, 199e9), ("fp32", 4, 199e9), ("bf16", 2, 110e9), ("bf16", 4, 200e9))
    assert both.best.type == "bf16" and both.best_threads == 4


def test_a_gpu_decides_where_there_is_one() -> None:
    with_gpu = dataclasses.replace(AVX2, gpus=(Gpu("H100", 80 * 10**9, 7e14),))
    assert (with_gpu.device, with_gpu.peak_flops_per_second("cuda")) == ("cuda", 7e14)
    assert AVX2.device == "cpu"


def test_the_better_of_each_figure_stays() -> None:
    low = machine(("fp32", 1, 60e9), ("fp32", 2, 50e9), quiet=False, dispatch_seconds=3e-6)
    mixed = machine(("fp32", 1, 40e9), ("fp32", 2, 90e9), ("bf16", 1, 1e9), quiet=False)
    best = low.with_best_of(mixed)
    assert {(r.type, r.threads): r.flops_per_second for r in best.rates} == {
        ("fp32", 1): 60e9,
        ("fp32", 2): 90e9,
        ("bf16", 1): 1e9,
    }
    assert best.dispatch_seconds == 1e-6 and not best.quiet
    assert low.with_best_of(AVX2).quiet


@given(
    rates=st.lists(
        st.tuples(st.sampled_from(["fp32", "bf16"]), st.integers(1, 512), st.floats(1e6, 1e18)), min_size=1
    ),
    name=st.text(),
    gpus=st.lists(st.builds(Gpu, st.text(), st.integers(1, 2**50), st.floats(1e9, 1e18)), max_size=2),
)
def test_what_is_kept_is_what_is_read(rates, name, gpus) -> None:
    one = machine(*rates, processor=name, gpus=tuple(gpus), versions={"torch": "2.13.0"})
    assert Machine.from_json(one.to_json()) == one


@pytest.mark.parametrize(
    "damage",
    [
        {"rates": []},
        {"rates": [{"type": "fp32", "threads": 1, "flops_per_second": float("nan")}]},
        {"rates": [{"type": "fp32", "threads": 0, "flops_per_second": 1e9}]},
        {"rates": None},
        {"cores": 0},
        {"cores": "many"},
        {"dispatch_seconds": -1.0},
        {"memory_bandwidth_bytes_per_second": 0},
        {"processor": None},
    ],
)
def test_a_damaged_table_is_refused(damage: dict) -> None:
    with pytest.raises(ValueError):
        Machine.from_json(json.dumps(AVX2.to_dict() | damage))


@pytest.mark.parametrize("text", ["", "[]", "3", "null", AVX2.to_json()[:-20]])
def test_what_is_no_table_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Machine.from_json(text)


def test_a_table_of_a_newer_version_is_read() -> None:
    assert Machine.from_json(json.dumps(AVX2.to_dict() | {"new_field": 1})) == AVX2


def test_the_cores_are_those_that_this_process_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6), raising=False)
    assert available_cores() == 6  # no container
    for limit, cores in {"max": 6, "400000": 4, "900000": 6, "250000": 2, "1000": 1}.items():
        (tmp_path / "cpu.max").write_text(f"{limit} 100000\n")
        assert available_cores() == cores
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert available_cores() == 1


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLOSSUS_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("COLOSSUS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "colossus"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "colossus"


def test_a_processor_s_name_as_a_file_name() -> None:
    assert slug("AMD EPYC 9B14 (family 25.17)") == "amd-epyc-9b14-family-25-17"
    assert slug("Apple M3 Max") != slug("Apple M3") and slug("!!") == "unknown"
