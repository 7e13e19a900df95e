"""What a machine cannot hold is refused before anything starts."""

from __future__ import annotations

import pytest

from colossus.derive.machine import RANK_BYTES, check_ranks
from colossus.errors import UserError
from colossus.job import Job, load_job
from colossus.layout import AXES
from tests.derive.machines import machine
from tests.derive.test_planned import GPUS


def spread(device: str, dp_shard: int) -> Job:
    axes = {f"layout.{axis}": 1 for axis in AXES} | {"layout.dp_shard": dp_shard}
    return load_job(None, [f"fleet.device={device}"]).put(axes, "argument")


def test_as_many_ranks_as_the_memory_holds() -> None:
    here = machine()
    most = here.memory_bytes // RANK_BYTES
    check_ranks(spread("cpu", most), here)
    with pytest.raises(UserError, match=rf"layout.dp_shard={most + 1}: .* on this machine.*at most {most}$"):
        check_ranks(spread("cpu", most + 1), here)


def test_as_many_ranks_as_there_are_gpus() -> None:
    check_ranks(spread("cuda", 4), GPUS)
    with pytest.raises(UserError, match=r"layout.dp_shard=5: 5 ranks.*4 GPUs, .*; at most 4$"):
        check_ranks(spread("cuda", 5), GPUS)
