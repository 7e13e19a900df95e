"""One of two ways is timed, again where others took the cores, and kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from colossus.measure import ways
from colossus.measure.ways import ATTEMPTS, is_quicker


@pytest.mark.parametrize(
    ("disturbed", "attempts", "taken"),
    [
        ([False], 1, False),  # 3.0 against 2.0
        ([True, False], 2, True),  # the least of each: 1.0 against 2.0
        ([True] * 9, ATTEMPTS, True),
    ],
)
def test_a_disturbed_timing_is_taken_again(
    disturbed: list[bool], attempts: int, taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLOSSUS_CACHE", str(tmp_path))
    told = iter(disturbed)
    monkeypatch.setattr(ways.accounting, "was_disturbed", lambda *_: next(told))
    timed = [{True: 3.0, False: 2.0}, {True: 1.0, False: 4.0}, {True: 3.0, False: 4.0}]
    left = list(timed)

    def choice() -> bool:
        return is_quicker("way", "new", "old", lambda: left.pop(0), share=0.9, threads=2)

    assert choice() is taken
    assert len(timed) - len(left) == attempts
    assert choice() is taken  # as it was kept
    assert len(timed) - len(left) == attempts
