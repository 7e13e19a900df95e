"""What a reader sees of a run: from its event log alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from colossus.events import EventLog
from colossus.trainer.run import Run


def write(folder: Path, *events: tuple[str, int | None, dict[str, Any]]) -> Run:
    """One attempt."""
    log = EventLog(folder)
    for kind, step, fields in events:
        log.write(kind, step=step, **fields)
    log.close()
    return Run(folder)


def steps(*numbers: int, loss: float) -> list[tuple[str, int | None, dict[str, Any]]]:
    return [("step", n, {"loss": loss + n}) for n in numbers]


def test_losses_are_of_the_steps_that_the_run_is_made_of(tmp_path: Path) -> None:
    """A killed attempt took steps 0 to 5; the next went on from step 3, and ended at step 4."""
    write(tmp_path, ("start", 0, {}), *steps(*range(6), loss=1))
    run = write(tmp_path, ("resume", 3, {}), *steps(3, loss=100))
    assert run.loss == {0: 1, 1: 2, 2: 3, 3: 103}
    assert len(run.events("step")) == 7 and {e["attempt"] for e in run.events()} == {0, 1}


def test_numbers_that_are_none(tmp_path: Path) -> None:
    run = write(
        tmp_path, ("start", 0, {}), ("step", 0, {"loss": float("nan")}), ("step", 1, {"loss": float("inf")})
    )
    assert str(run.loss) == "{0: nan, 1: inf}"


@pytest.mark.parametrize("reason", ["finished", "SIGINT", "SIGTERM"])
def test_the_outcome_is_how_the_last_attempt_ended(tmp_path: Path, reason: str) -> None:
    assert Run(tmp_path).outcome == "unfinished"
    assert write(tmp_path, ("start", 0, {}), ("end", 1, {"reason": reason})).outcome == reason
    assert write(tmp_path, ("resume", 1, {})).outcome == "unfinished"  # killed after it went on


def test_bits_per_byte_are_of_the_newest_validation(tmp_path: Path) -> None:
    assert Run(tmp_path).bits_per_byte is None
    values = [("validation", n, {"bits_per_byte": 3.0 - n}) for n in (0, 1)]
    assert write(tmp_path, *values).bits_per_byte == 2.0
    assert write(tmp_path, ("resume", 0, {})).bits_per_byte == 3.0  # the weights of step 1 are lost
    assert write(tmp_path, ("start", 0, {}), ("step", 0, {"loss": 1.0})).bits_per_byte == 3.0
