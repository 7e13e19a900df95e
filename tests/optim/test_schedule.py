"""Schedules: continuous, bounded, and what was published at the points that matter."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from colossus.optim.schedule import Decay, cosine_factor, wsd_factor


def test_cosine_is_half_way_in_the_middle_and_ends_at_its_floor() -> None:
    assert cosine_factor(10, 10, 110, 0.1) == 1.0
    assert math.isclose(cosine_factor(60, 10, 110, 0.1), 0.55)
    assert math.isclose(cosine_factor(110, 10, 110, 0.1), 0.1)


def test_wsd_is_flat_until_it_decays_in_a_line() -> None:
    decay = Decay(100, 200)
    assert wsd_factor(99, 10, None) == wsd_factor(100, 10, decay) == 1.0
    assert math.isclose(wsd_factor(150, 10, decay), 0.5) and wsd_factor(200, 10, decay) == 0.0
    assert math.isclose(wsd_factor(0, 9, None), 0.1)


@given(st.integers(0, 500), st.integers(0, 50), st.integers(0, 300), st.integers(1, 200), st.floats(0, 1))
def test_a_share_is_never_outside_0_and_1(
    step: int, warmup: int, begin: int, length: int, floor: float
) -> None:
    assert 0 <= wsd_factor(step, warmup, Decay(begin, begin + length, 1.0, floor)) <= 1
    assert 0 <= cosine_factor(step, warmup, begin + length, floor) <= 1


@given(st.integers(1, 100), st.integers(2, 100), st.data())
def test_a_decay_that_is_planned_again_goes_on_from_where_it_was(begin: int, length: int, data) -> None:
    first = Decay(begin, begin + length)
    now = data.draw(st.integers(begin, begin + length - 1))
    again = Decay(now, now + 3, wsd_factor(now, 0, first), 0.0)
    assert math.isclose(wsd_factor(now, 0, again), wsd_factor(now, 0, first))
    assert wsd_factor(now + 3, 0, again) == 0.0
