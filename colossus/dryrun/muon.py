"""What shows of the messages of a traced update, whose matrices travel beside the work on others, by the
formula of plans."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from colossus.dryrun.rows import times_of
from colossus.dryrun.work import Message, Work
from colossus.perf.ledger import Row
from colossus.planner.muon import shown_seconds

COPIES = "dp_replicate"  # the axis that matrices cross on the way back alone


def is_travel(work: Work) -> bool:
    """Whether it is a message of a matrix to its owner, or back."""
    return isinstance(work, Message) and work.phase == "update"


def share_shown(done: Sequence[tuple[Work, Row, float]]) -> float:
    """Of the seconds of these messages. done: what an accelerator does once in a step, each with its row and
    its seconds."""
    times, seconds, work = defaultdict[str, float](float), defaultdict[str, float](float), 0.0
    for each, row, value in done:
        if is_travel(each):
            times[row.name] += times_of(row) / (1 if row.name == COPIES else 2)
            seconds[row.name] += value
        elif each.phase == "update":
            work += value
    total = sum(seconds.values())
    if not total:
        return 1.0
    there, buckets = (total - seconds[COPIES]) / 2, max(times.values())
    to, back, beside = (np.array([value / buckets]) for value in (there, total - there, work))
    return float(shown_seconds(to, back, beside, np.array([buckets]))[0]) / total
