"""Price and messages: against measured products and all-reduce curves of the catalogue, and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from colossus.hardware.catalogue import accelerator, table
from colossus.hardware.fleets import hardware_of
from colossus.perf import communication as comm
from colossus.perf.corrections import Corrections
from colossus.perf.ledger import Ledger, Row
from colossus.perf.price import Pricer, fitted, product_share
from colossus.perf.software import MEGATRON_CORE, OURS
from colossus.sections import Fleet

H100 = hardware_of(Fleet(accelerator="h100-sxm", count=64))


def group(size: float, stride: float = 1.0) -> comm.Group:
    return comm.Group(np.array([size]), np.array([stride]))


def test_square_products_take_what_was_measured():
    """H100, torch.matmul, 2048 to 8192: within a quarter, at the rate before what training loses."""
    pricer = Pricer.of(H100, OURS, hopper_products=1.0)
    for size, measured in table("measured")["measured"]["gemm_h100_by_size"]["bf16"][1:4]:
        row = Row("x", "forward", "layer", "product", m=size, n=size, k=size)
        seconds = float(pricer.seconds(Ledger.of([row]))[0, 0])
        assert 2 * size**3 / seconds / 1e12 == pytest.approx(measured, rel=0.25)


def test_full_tiles_and_waves_and_long_products_are_the_best():
    part = accelerator("h100-sxm")
    one = np.ones(1)

    def share(m, n, k, count=1.0):
        return float(product_share(m * one, n * one, k * one, count * one, part)[0])

    assert share(128 * 132, 256 * 8, 8192) == pytest.approx(8192 / (8192 + 256))
    assert share(128, 256, 8192) < share(128 * 132, 256, 8192) / 40  # one tile of 132 multiprocessors
    assert share(128 * 132 + 1, 256, 8192) < 0.6 * share(128 * 132, 256, 8192)  # a second wave for one row
    assert share(8192, 8192, 256) < share(8192, 8192, 8192)


def test_an_all_reduce_on_one_node_takes_what_was_measured():
    """DGX H100, nccl-tests: from 64 KiB to 1 GiB within 60%, and within 25% from 128 MiB on."""
    points = table("networks")["allreduce"]["h100_1node_8gpu_nvls"]["points"]
    for size, micro, _ in points:
        if 65536 <= size <= 2**30:
            seconds = float(comm.reduce_seconds(np.array([float(size)]), group(8), H100, 0.94)[0])
            assert seconds == pytest.approx(micro * 1e-6, rel=0.25 if size >= 2**27 else 2.5)


def test_what_leaves_a_node_goes_through_its_members_cards():
    size = np.array([2.0**30])
    near = float(comm.gather_seconds(size, group(8), H100, 1.0)[0])
    two_nodes = float(comm.gather_seconds(size, group(16), H100, 1.0)[0])
    one_of_each = float(comm.gather_seconds(size, group(8, 8), H100, 1.0)[0])
    # 7/8 of a GiB through one card of 50 GB/s, against NVLink's 360
    assert one_of_each == pytest.approx(7 / 8 * 2**30 / 50e9, rel=0.02)
    assert near < two_nodes < one_of_each


def test_oversubscription_slows_what_leaves_a_pod():
    from dataclasses import replace

    worse = replace(H100, pod=16, oversubscription=7.0)
    size = np.array([2.0**28])
    inside, beyond = (float(comm.gather_seconds(size, group(n, 8), worse, 1.0)[0]) for n in (2, 8))
    assert inside == pytest.approx(float(comm.gather_seconds(size, group(2, 8), H100, 1.0)[0]))
    assert beyond > 5 * float(comm.gather_seconds(size, group(8, 8), H100, 1.0)[0])


def test_groups_sit_where_their_order_says():
    ones = np.ones(1)
    axes = {"tp": 8 * ones, "cp": 2 * ones, "dp_shard": 4 * ones, "dp_replicate": ones, "pp": 2 * ones,
            "ep": ones, "etp": ones}  # fmt: skip
    groups = comm.groups_of(axes, OURS.order)
    assert [float(groups[name].stride[0]) for name in ("tp", "cp", "pp", "dp_shard")] == [1, 8, 16, 32]
    groups = comm.groups_of(axes, MEGATRON_CORE.order)
    assert [float(groups[name].stride[0]) for name in ("tp", "cp", "dp_shard", "pp")] == [1, 8, 16, 64]
    assert float(groups["fsdp"].size[0]) == 8 and float(groups["experts"].size[0]) == 64


def test_a_few_scalars_price_everything():
    assert 0 < len(fitted()) <= 12
    for name, value in fitted().items():
        assert value > 0, name


def test_an_h200_is_quicker_where_memory_binds_alone():
    rows = [Row("x", "forward", "layer", "elementwise", bytes=2.0**33),
            Row("y", "forward", "layer", "product", m=8192, n=8192, k=8192)]  # fmt: skip
    ledger = Ledger.of(rows)
    first, second = (
        Pricer.of(hardware_of(Fleet(accelerator=name, count=8)), OURS).seconds(ledger)[:, 0]
        for name in ("h100-sxm", "h200-sxm")
    )
    assert first[0] / second[0] == pytest.approx(4.15 / 2.97, rel=1e-3)
    assert first[1] / second[1] == pytest.approx(1.0, rel=1e-3)


def test_what_is_computed_again_takes_as_long_as_the_first_time():
    """Also where the passes were measured apart: forward 3 times the formula, backward half of it."""
    shape = (4096.0, 1024.0, 2048.0, 1.0)
    ratios = {
        ("product", "", "bf16", "forward"): [(shape, 3.0)],
        ("product", "", "bf16", "backward"): [(shape, 0.5)],
    }
    plain, measured = Pricer.of(H100, OURS), Pricer.of(H100, OURS, Corrections.of(ratios))
    rows = [
        Row("x", phase, "layer", "product", m=shape[0], n=shape[1], k=shape[2])
        for phase in ("forward", "recompute", "backward")
    ]
    by_formula, found = (pricer.seconds(Ledger.of(rows))[:, 0] for pricer in (plain, measured))
    assert found / by_formula == pytest.approx([3.0, 3.0, 0.5])
