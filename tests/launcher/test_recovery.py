"""When a run goes on by itself."""

from __future__ import annotations

import pytest

from colossus.launcher.recovery import IN_VAIN, Fault, decide


def fault(saved_step: int, num_steps: int = 5, culprit: int | None = 1) -> Fault:
    return Fault(culprit, "rank 1 ended", num_steps, saved_step)


@pytest.mark.parametrize(
    ("faults", "goes_on", "why"),
    [
        ([fault(20)], True, "from step 20, which is saved"),
        ([fault(0)], True, "from the begin, as nothing is saved yet"),
        ([fault(20, culprit=None)], False, "what failed would fail again"),
        ([fault(20, num_steps=0)], False, "it died before a step was taken"),
        ([fault(20), fault(20, num_steps=0)], True, "from step 20, which is saved"),  # while it recovered
        (
            [fault(20), *[fault(20, num_steps=0)] * 2],
            False,
            f"{IN_VAIN} attempts in a row died before anything new was saved",
        ),
        ([fault(20)] * 2, True, "from step 20, which is saved"),
        ([fault(20)] * 3, False, f"{IN_VAIN} attempts in a row died before anything new was saved"),
        ([fault(20)] * 2 + [fault(25)], True, "from step 25, which is saved"),
        ([fault(20), fault(20), fault(25), fault(25)], True, "from step 25, which is saved"),
        ([fault(step) for step in range(1, 100)], True, "from step 99, which is saved"),
    ],
)
def test_it_goes_on_as_long_as_something_new_is_saved(faults: list[Fault], goes_on: bool, why: str) -> None:
    found = decide(faults)
    assert (found.goes_on, found.why) == (goes_on, why)
