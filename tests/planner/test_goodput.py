"""Goodput in closed form: against a simulation, against published runs, and at its limits."""

from __future__ import annotations

import math

import numpy as np
import pytest

from colossus.hardware.fleets import hardware_of
from colossus.planner.goodput import goodput, spare_nodes
from colossus.sections import Fleet
from tests.planner.problems import hardware


def simulated(failures: float, tau: float, save: float, restart: float, days: float, seed: int) -> float:
    """Share of productive time, event by event."""
    rng = np.random.default_rng(seed)
    clock, productive, end = 0.0, 0.0, days * 86400
    while clock < end:
        until = rng.exponential(1 / failures)
        whole = int(until // (tau + save))
        productive += whole * tau
        clock += until + restart
    return productive / clock


@pytest.mark.parametrize("rate", [3.8, 10.0])
def test_the_closed_form_is_the_simulations_mean(rate):
    fleet = hardware(16384, save_seconds=5.0, restart_seconds=600.0)
    made = goodput(fleet, 16384, rate)
    runs = [
        simulated(made.failures_per_day / 86400, made.interval, 5.0, 600.0, 300, seed) for seed in range(8)
    ]
    assert made.share == pytest.approx(np.mean(runs), abs=0.01)
    parts = made.lost_to_saving + made.lost_to_repeating + made.lost_to_restarts
    assert made.share + parts == pytest.approx(1.0, abs=1e-9)


def test_llama_3_reached_more_than_nine_tenths():
    # arXiv 2407.21783: 419 unexpected interruptions in 54 days on 2,048 servers, over 90% effective time.
    made = goodput(hardware(16384, save_seconds=5.0, restart_seconds=600.0), 16384, 3.8)
    assert made.failures_per_day == pytest.approx(419 / 54, rel=0.01)
    assert 0.90 < made.share < 0.96


def test_the_interval_is_near_youngs_and_beats_its_neighbours():
    fleet = hardware(1024, save_seconds=10.0, restart_seconds=300.0)
    made = goodput(fleet, 1024, 6.5)
    young = math.sqrt(2 * 10.0 * 86400 / made.failures_per_day)
    assert made.interval == pytest.approx(young, rel=0.05)


def test_without_failures_nothing_is_lost():
    made = goodput(hardware(8), 8, 0.0)
    assert made.share == 1.0 and made.spare_nodes == 0


def test_spares_cover_the_mean_in_repair_and_three_deviations():
    # 12,500 servers at 6.5 per 1000 node-days, repaired in a day: 81 in repair in the mean.
    assert spare_nodes(12500 * 6.5 / 1000 / 86400, 86400) == math.ceil(81.25 + 3 * math.sqrt(81.25))


def test_more_accelerators_fail_more():
    shares = [goodput(hardware(n), n, 6.5).share for n in (1024, 16384, 100000)]
    assert shares == sorted(shares, reverse=True)


def test_racks_fail_as_often_as_their_accelerators_do_in_servers_of_8():
    """One rate per 1,000 days of a server of 8 holds for any way to put the same accelerators together."""
    eights = goodput(hardware(14400, node_size=8), 14400, 3.8)
    assert eights.failures_per_day == pytest.approx(14400 / 8 * 3.8 / 1000)
    for size in (4, 16, 72):
        made = goodput(hardware(14400, node_size=size), 14400, 3.8)
        assert made.failures_per_day == pytest.approx(eights.failures_per_day)
        assert made.share == pytest.approx(eights.share)


def test_a_part_of_a_server_fails_as_the_whole():
    assert goodput(hardware(8), 3, 3.8).failures_per_day == pytest.approx(3.8 / 1000)
    assert goodput(hardware(72, node_size=72), 9, 3.8).failures_per_day == pytest.approx(2 * 3.8 / 1000)


def test_a_fleet_of_racks_says_how_often_they_fail():
    racks = hardware_of(Fleet(accelerator="gb200", count=144))
    assert racks.node_size == 72
    assert any("72 fail 9 times as often as a server of 8" in words for words in racks.assumptions)
    assert not any("times as often" in words for words in hardware().assumptions)
