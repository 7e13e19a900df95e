"""The catalogue: every group has a kind and a source; values agree with each other."""

import math

import pytest

from colossus.errors import UserError
from colossus.hardware.catalogue import accelerator, accelerator_names, node, node_names, table
from colossus.hardware.fleets import hardware_of
from colossus.job import load_job, preset_facts, preset_names
from colossus.perf.ledger import Ledger, Row
from colossus.perf.price import Pricer
from colossus.perf.software import OURS
from tests.derive.machines import machine

KINDS = {"datasheet", "measured", "reported", "shipped", "second-hand", "projected", "assumed"}
FLEETS = [name for name in preset_names("fleet") if name != "this-machine"]


@pytest.mark.parametrize("file", ["accelerators", "measured", "nodes"])
def test_every_group_says_its_kind_and_its_source(file):
    for family in table(file).values():
        for name, row in family.items():
            assert row["kind"] in KINDS, name
            assert row["source"], name


def test_rates_follow_from_units_and_clock():
    # Hopper: 4 tensor cores a unit, 1024 bf16 FLOPs a cycle each (NVIDIA H100 white paper); Ampere 512.
    h100 = accelerator("h100-sxm")
    assert h100.bf16 == pytest.approx(132 * 4 * 1024 * 1.83e9, rel=1e-3)
    assert accelerator("a100-sxm-80").bf16 == pytest.approx(108 * 4 * 512 * 1.41e9, rel=1e-3)
    assert h100.fp8 == pytest.approx(2 * h100.bf16, rel=1e-3)


def test_an_h200_differs_from_an_h100_in_memory_alone():
    h100, h200 = accelerator("h100-sxm"), accelerator("h200-sxm")
    assert h200.bf16 == pytest.approx(h100.bf16, rel=1e-3)
    assert 1.38 < h200.copy / h100.copy < 1.42
    assert h200.memory / h100.memory == pytest.approx(143156 / 81082, rel=1e-6)


def test_every_accelerator_is_plausible():
    for name in accelerator_names():
        part = accelerator(name)
        assert 0.3 < part.reachable < 0.9 and part.copy < part.memory_bandwidth, name
        assert 30 * 2**30 < part.memory < 300 * 2**30, name
        assert part.source, name


def test_every_server_names_an_accelerator_of_the_catalogue():
    for name in node_names():
        assert node(name).accelerator in table("accelerators")["accelerator"], name


@pytest.mark.parametrize("name", FLEETS)
def test_presets_resolve_and_are_sourced(name):
    fleet = load_job(None, [f"fleet={name}"]).fleet
    hardware = hardware_of(fleet)
    assert hardware.count > 0 and hardware.watts > 0 and hardware.nic > 0
    assert preset_facts("fleet", name)["source"]


def test_the_mixed_fleet_has_its_two_pools_and_says_what_it_assumes():
    hardware = hardware_of(load_job(None, ["fleet=colossus-200k"]).fleet)
    assert [(p.accelerator.name, p.count) for p in hardware.pools] == [
        ("h100-sxm", 150000),
        ("h200-sxm", 50000),
    ]
    assert any("oversubscription" in words for words in hardware.assumptions)
    assert [pool.count for pool in hardware.with_count(2000).pools] == [1500, 500]


def test_power_of_100k_lies_in_the_published_band():
    # Epoch AI: 142.7 MW computed, 174 MW by the site, everything included.
    hardware = hardware_of(load_job(None, ["fleet=colossus-100k"]).fleet)
    rated = node("xai-supermicro-4u-lcc").watts / 8 * hardware.count * hardware.pue / 1e6
    drawn = hardware.watts * hardware.count * hardware.pue / 1e6
    assert drawn < rated < 174 and math.isclose(rated, 146.6, rel_tol=0.01)


def test_ranks_of_a_processor_share_it():
    whole, third = (hardware_of(load_job(None, words).fleet, machine()) for words in ([], ["fleet.count=3"]))
    assert (whole.count, third.count) == (1, 3)
    one, other = (hardware.accelerator for hardware in (whole, third))
    assert 3 * other.memory == pytest.approx(one.memory)
    product = Ledger.of([Row("wq", "forward", "dense", "product", precision="fp32", m=64, n=64, k=64)])
    seconds = [Pricer.of(hardware, OURS).seconds(product)[0, 0] for hardware in (whole, third)]
    assert seconds[1] == pytest.approx(3 * seconds[0])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fleet.accelerator=h10-sxm"], "did you mean 'h100-sxm'"),
        (["fleet.accelerator=h100-sxm", "fleet.node=dgx-h10"], "fleet.node=dgx-h10"),
        (["fleet.count=7"], "of what?"),
        (["fleet=colossus-200k", "fleet.count=7"], "two accounts"),
        ([], "says no accelerators"),
    ],
)
def test_mistakes_name_the_field(words, said):
    with pytest.raises(UserError, match=said.replace("?", r"\?")):
        hardware_of(load_job(None, words).fleet)
