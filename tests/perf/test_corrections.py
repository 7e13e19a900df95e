"""Prices near measured shapes are the measured ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from colossus.hardware.calibration import of_accelerator
from colossus.hardware.catalogue import accelerator
from colossus.perf.corrections import Corrections
from colossus.perf.ledger import Ledger, Row
from colossus.perf.price import Pricer
from colossus.perf.software import OURS
from colossus.planner.measured import corrections_of
from tests.planner.problems import hardware

KEY = ("product", "", "bf16", "forward")


def of_rows(*rows: tuple[tuple[float, ...], float]) -> Corrections:
    return Corrections.of({KEY: rows})


def test_a_measured_shape_has_its_own_ratio() -> None:
    found = of_rows(((1024, 1024, 1024, 1), 1.5), ((4096, 4096, 4096, 1), 0.8), ((256, 256, 256, 1), 3.0))
    ratio, distance = found.ratio_and_distance(KEY, np.array([1024.0, 256.0]), 1024.0, 1024.0, 1.0)
    assert ratio[0] == pytest.approx(1.5, rel=0.01) and distance[0] == 0
    assert 0.8 < ratio[1] < 3.0 and distance[1] == pytest.approx(2.0)


def test_beyond_the_largest_shape_nothing_changes() -> None:
    found = of_rows(((1024, 1024, 1024, 1), 1.5), ((4096, 4096, 4096, 1), 0.8))
    far = found.ratio(KEY, np.array([4096.0, 1e6]), 4096.0, 4096.0, 1.0)
    assert far[0] == far[1]


def test_what_was_not_measured_is_left_alone() -> None:
    found = of_rows(((1024, 1024, 1024, 1), 1.5))
    assert not found.has(("attention", "hopper", "bf16", "forward"))
    rows = [
        Row("gated", "forward", "", "elementwise", bytes=1e9),
        Row("attention.scores", "forward", "", "fused_attention", m=1024, n=512, k=64, count=8),
    ]
    ledger = Ledger.of(rows)
    plain = Pricer.of(hardware(1), OURS)
    assert (replace(plain, corrections=found).seconds(ledger) == plain.seconds(ledger)).all()


def test_timings_of_an_h200_are_priced_as_they_were_measured() -> None:
    """Products and attention of the table, each priced as a row of a ledger."""
    calibration = of_accelerator("h200-sxm")
    assert calibration is not None
    part = accelerator("h200-sxm")
    pricer = Pricer.of(
        hardware(1, "h200-sxm"), OURS, corrections_of(replace(calibration, held=1.0), part, here=True)
    )
    errors = []
    for timing in calibration.timings:
        if timing.kind != "product" or timing.precision != "bf16":
            continue
        m, n, k, count = timing.shape
        moved = 2 * (m * k + n * k + m * n)
        row = Row("product", timing.phase, "", "product", m=m, n=n, k=k, count=count, bytes=moved)  # type: ignore[arg-type]
        errors.append(pricer.seconds(Ledger.of([row]))[0, 0] / timing.seconds - 1)
    assert len(errors) > 300
    assert np.abs(errors).mean() < 0.01 and np.abs(errors).max() < 0.1
