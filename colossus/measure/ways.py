"""Which of two ways of computing the same is quicker on this machine, timed once."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable

from colossus.hardware.machine import keep_text
from colossus.measure import accounting
from colossus.measure.machine import kept_folder

ATTEMPTS = 2  # where other programs took the cores


def is_quicker(
    name: str, way: str, usual: str, seconds: Callable[[], dict[bool, float]], share: float, threads: int
) -> bool:
    """Whether `way` takes less than `share` of the time of the `usual` one: as kept, else timed now.

    It is timed once: the choice changes bits, and two runs of one job should be alike.

    name: of the file that keeps the seconds of both. seconds: times them on so many threads; true is `way`.
    """
    path = kept_folder() / f"{name}.json"
    try:
        kept = json.loads(path.read_text())
        return bool(kept[f"{way}_seconds"] < share * kept[f"{usual}_seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        timed = _least(seconds, threads)
    with contextlib.suppress(OSError):  # where nothing can be kept, timing again costs half a second
        keep_text(path, json.dumps({f"{way}_seconds": timed[True], f"{usual}_seconds": timed[False]}))
    return timed[True] < share * timed[False]


def _least(seconds: Callable[[], dict[bool, float]], threads: int) -> dict[bool, float]:
    """Of each way, the least of all attempts, the last of which was not disturbed or is one too many."""
    least = {True: float("inf"), False: float("inf")}
    for _ in range(ATTEMPTS):
        before, timed = accounting.read(), seconds()
        least = {way: min(least[way], timed[way]) for way in least}
        if not accounting.was_disturbed(before, accounting.read(), threads):
            break
    return least
