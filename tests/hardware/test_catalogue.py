"""The catalogue: every group has a kind and a source; values agree with each other."""

import math
from dataclasses import replace

import pytest

from colossus.errors import UserError
from colossus.hardware.catalogue import (
    accelerator,
    accelerator_names,
    accelerator_of,
    name_of_driver,
    node,
    node_names,
    table,
)
from colossus.hardware.fleets import hardware_of
from colossus.hardware.machine import Gpu
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


LINKS = ("nvlink_practical_GBps_per_direction", "nvlink_GBps_per_direction", "xgmi_GBps_per_direction")
NEEDED = (("bf16_TFLOPs",), ("memory_GBps",), ("tdp_W",), ("sms", "compute_units"), LINKS)


@pytest.mark.parametrize("name", accelerator_names())
def test_a_value_that_is_missing_is_named_and_never_made_up(name):
    row = table("accelerators")["accelerator"][name]
    assumed = row.get("assumed", {})

    def without(*keys):
        kept = {k: v for k, v in row.items() if k not in keys}
        return kept | {"assumed": {k: v for k, v in assumed.items() if k not in keys}}

    for keys in NEEDED:
        with pytest.raises(
            UserError, match=f"fleet.accelerator={name}: the catalogue does not know its {keys[0]}"
        ):
            accelerator_of(name, without(*keys))
    part = accelerator(name)
    for key, value in assumed.items():
        if key != "why":
            assert any(f"{key}={value:g}" in words for words in part.assumed)


def test_a_peak_that_nobody_published_is_no_peak():
    with pytest.raises(UserError, match=r"accelerator=h100-nvl: the catalogue does not know its fp32_TF"):
        accelerator("h100-nvl").peak("fp32")
    assert accelerator("a100-sxm-80").peak("fp8") == accelerator("a100-sxm-80").bf16  # which has no float8
    for unpriced in ("h200-nvl", "h100-custom-hbm2e"):
        with pytest.raises(UserError, match=f"fleet.accelerator={unpriced}: the catalogue does not know"):
            accelerator(unpriced)


@pytest.mark.parametrize("name", accelerator_names())
def test_a_gigabyte_of_memory_is_a_gibibyte_of_every_part(name):
    """Vendors count in 2^30 bytes, of which a program gets 98% and more."""
    share = accelerator(name).memory / (table("accelerators")["accelerator"][name]["memory_GB"] * 2**30)
    assert 0.98 < share < 1


def test_the_memory_of_amd_s_parts_is_what_pytorch_says_of_them():
    """Its messages speak of 191.98 and of 255.98 GiB; the first one's driver of 201,310,208 KiB."""
    assert accelerator("mi300x").memory == 201_310_208 * 1024
    assert round(accelerator("mi300x").memory / 2**30, 2) == 191.98
    assert round(accelerator("mi325x").memory / 2**30, 2) == 255.98


def test_links_within_a_server_are_those_of_the_datasheets():
    """GB/s one way; the H800's are what DeepSeek reached of 200."""
    known = {"a100-sxm-80": 300, "h100-sxm": 450, "h800-sxm": 160, "h200-sxm": 450, "b200-sxm": 900,
             "mi300x": 448, "mi325x": 448}  # fmt: skip
    assert {name: accelerator(name).nvlink / 1e9 for name in known} == known


@pytest.mark.parametrize(
    ("title", "gigabytes", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 85, "h100-sxm"),
        ("NVIDIA H100 PCIe", 85, "h100-pcie"),
        ("NVIDIA H100 NVL", 100, "h100-nvl"),
        ("NVIDIA H200", 150, "h200-sxm"),
        ("NVIDIA H200 NVL", 150, None),
        ("NVIDIA H20", 102, "h20"),
        ("NVIDIA GH200 480GB", 102, "gh200-96"),
        ("NVIDIA A100-SXM4-40GB", 42, "a100-sxm-40"),
        ("NVIDIA A100-SXM4-80GB", 85, "a100-sxm-80"),
        ("NVIDIA A100-PCIE-40GB", 42, None),
        ("NVIDIA GB200", 198, "gb200"),
        ("NVIDIA B200", 191, "b200-sxm"),
        ("AMD Instinct MI325X", 256, "mi325x"),
        ("NVIDIA GeForce RTX 4090", 25, None),
        ("Tesla V100-SXM2-16GB", 17, None),
    ],
)
def test_a_gpu_is_taken_for_what_it_is_or_for_nothing(title, gigabytes, name):
    assert name_of_driver(title, gigabytes * 1e9) == name
    here = replace(machine(), gpus=(Gpu(title, int(gigabytes * 1e9), 100e12),))
    if name is None:
        with pytest.raises(UserError, match="the catalogue does not know this machine's"):
            hardware_of(load_job(None, []).fleet, here)
    else:
        assert hardware_of(load_job(None, []).fleet, here).accelerator.nvlink == accelerator(name).nvlink


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


def test_networks_are_in_bytes_and_servers_in_their_own_numbers():
    """400 Gb/s for each of 8 H100s, 200 for A100s; a rack of 72."""
    for name, size, nic in (("dgx-h100", 8, 50e9), ("dgx-a100", 8, 25e9), ("dgx-b300", 8, 100e9)):
        assert (node(name).size, node(name).nics, node(name).nic) == (size, size, nic)
    assert node("gb200-nvl72").size == 72 and node("gb200-nvl72").watts == 120e3
    hardware = hardware_of(load_job(None, ["fleet.accelerator=a100-sxm-80", "fleet.count=16"]).fleet)
    assert (hardware.node_size, hardware.nic) == (8, 25e9)


def test_a_mixed_fleet_costs_and_scales_by_its_numbers():
    """Three times as many of one kind; a third of each is left, and none is lost to rounding."""
    pools = "[{accelerator='h100-sxm', count=96}, {accelerator='a100-sxm-80', count=32}]"
    mixed = hardware_of(load_job(None, [f"fleet.pools={pools}"]).fleet)
    alone = [
        hardware_of(load_job(None, [f"fleet.accelerator={name}", "fleet.count=8"]).fleet).usd_per_hour
        for name in ("h100-sxm", "a100-sxm-80")
    ]
    assert mixed.usd_per_hour == pytest.approx((96 * alone[0] + 32 * alone[1]) / 128)
    halves = "[{accelerator='h100-sxm', count=64}, {accelerator='a100-sxm-80', count=64}]"
    assert hardware_of(load_job(None, [f"fleet.pools={halves}"]).fleet).with_count(5).count == 5
    for count in (127, 64, 43, 5):
        fewer = mixed.with_count(count)
        assert fewer.count == count and sum(pool.count for pool in fewer.pools) == count
        assert [pool.count / count for pool in fewer.pools] == pytest.approx([0.75, 0.25], abs=1 / count)


def test_hours_minutes_and_seconds_of_a_fleet():
    words = ["fleet.accelerator=h100-sxm", "fleet.count=8"]
    usual = hardware_of(load_job(None, words).fleet)
    assert (usual.restart_seconds, usual.save_seconds, usual.repair_seconds) == (600.0, 2.0, 86400.0)
    times = ["fleet.restart_minutes=3", "fleet.save_seconds=4", "fleet.repair_hours=5"]
    given = hardware_of(load_job(None, [*words, *times]).fleet)
    assert (given.restart_seconds, given.save_seconds, given.repair_seconds) == (180.0, 4.0, 18000.0)


def test_memory_is_what_a_program_sees_of_it():
    """Sold as 80 and 141 GB; PyTorch tells of 79.1 and 139.8 GiB."""
    found = [accelerator(name).memory / 2**30 for name in ("h100-sxm", "h200-sxm")]
    assert found == pytest.approx([79.1, 139.8], abs=0.15)
