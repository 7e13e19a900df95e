"""Disturbed is who lacked the cores because of others, never who started few threads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from colossus.measure import accounting
from colossus.measure.accounting import Reading, read, taken_by_others, was_disturbed

START = Reading(10.0, 5.0, 100.0)


def after(wall: float, own: float, all: float | None) -> Reading:
    return Reading(START.wall + wall, START.own + own, None if all is None else 100.0 + all)


@pytest.mark.parametrize(
    ("threads", "own", "all", "disturbed"),
    [
        (2, 2.0, 2.0, False),
        (2, 1.0, 1.0, False),  # a library that runs its product on one thread (oneDNN, AMX)
        (2, 1.4, 2.0, True),  # another program had 0.6 s of the 2
        (2, 1.8, 2.0, False),
        (1, 1.0, 2.0, False),  # another program had the other core
        (1, 0.5, 2.0, True),
        (2, 2.0, 1.9, False),  # ticks are coarse
    ],
)
def test_two_cores_for_a_second(threads: int, own: float, all: float, disturbed: bool) -> None:
    assert was_disturbed(START, after(1.0, own, all), threads, cores=2) == disturbed


def test_some_of_many_cores_disturb_no_one() -> None:
    assert not was_disturbed(START, after(1.0, 59.0, 64.0), 64, cores=64)
    assert was_disturbed(START, after(1.0, 40.0, 64.0), 64, cores=64)


def test_where_the_system_says_nothing_the_one_sure_thread_tells() -> None:
    before = Reading(10.0, 5.0, None)
    assert taken_by_others(before, after(1.0, 1.0, None)) is None
    assert not was_disturbed(before, after(1.0, 1.0, None), 8, cores=8)
    assert was_disturbed(before, after(1.0, 0.5, None), 8, cores=8)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no cores to be bound to")
def test_of_the_system_s_ticks_those_count_that_were_not_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3})
    cores = ["cpu0 10 20 30 1000 500 1 2 7 5 5", "cpu1 99 99 99 99 99 99 99 99", "cpu3 1 0 0 0 0 0 0 0 0 0"]
    stat = "\n".join(["cpu 9 9 9 9 9 9 9 9 0 0", *cores, "intr 1"])
    assert accounting._busy_seconds(stat) == 71 / os.sysconf("SC_CLK_TCK")
    assert accounting._busy_seconds("cpu0 0 0 0 0 0 0 0 0") is None


def test_a_container_with_a_share_has_its_own_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounting, "CGROUP", tmp_path)
    (tmp_path / "cpu.max").write_text("200000 100000\n")
    (tmp_path / "cpu.stat").write_text("usage_usec 3000000\nuser_usec 1\nthrottled_usec 500000\n")
    assert read().all == 3.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert read().all != 3.5
