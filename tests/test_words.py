"""Units by size: no quantity is shown as 0.000198 of something large."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colossus.words import dollars, energy, memory, power, span

UNITS = {
    energy: {"Wh": 1e-3, "kWh": 1.0, "MWh": 1e3, "GWh": 1e6, "TWh": 1e9},
    power: {"W": 1.0, "kW": 1e3, "MW": 1e6, "GW": 1e9, "TW": 1e12},
    memory: {"bytes": 1.0, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40},
    span: {"us": 1e-6, "ms": 1e-3, "s": 1.0},
}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (energy(0.198), "198 Wh"),
        (energy(1.4e-4), "0.14 Wh"),
        (energy(6.26e6), "6.26 GWh"),
        (energy(0), "0 Wh"),
        (power(11_000), "11 kW"),
        (power(2.28e6), "2.28 MW"),
        (power(850), "850 W"),
        (dollars(3.96), "$3.96"),
        (dollars(0.0004), "<$0.01"),
        (dollars(0), "$0"),
        (dollars(432.1), "$432"),
        (dollars(9_870), "$9,870"),
        (dollars(17.24e6), "$17.2M"),
        (dollars(1.05e9), "$1.05B"),
        (memory(58.3 * 2**30), "58.3 GiB"),
        (memory(94.15 * 2**20), "94.2 MiB"),
        (memory(100), "100 bytes"),
        (memory(1023.9 * 2**20), "1 GiB"),
        (memory(1010 * 2**20), "0.99 GiB"),
        (span(16.64), "16.6 s"),
        (span(0.0858), "85.8 ms"),
        (span(12e-6), "12 us"),
        (span(0.9999), "1 s"),
    ],
)
def test_in_words(words: str, said: str) -> None:
    assert words == said


@pytest.mark.parametrize("words", UNITS, ids=lambda f: f.__name__)
@given(value=st.floats(1e-3, 1e9))
def test_the_words_are_the_quantity(words, value: float) -> None:
    """Three digits, at most four before the point, whatever the size."""
    value = max(min(value, 9000.0) if words is span else value, min(UNITS[words].values()))
    number, unit = re.fullmatch(r"([\d.,]+) ?(\S+)", words(value)).groups()
    said = float(number.replace(",", "")) * UNITS[words][unit]
    assert said == pytest.approx(value, rel=0.006, abs=0.5 if words is memory and value < 1000 else 0)
