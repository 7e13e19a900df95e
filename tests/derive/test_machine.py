"""What a machine cannot hold is refused before anything starts."""

from __future__ import annotations

import pytest

from colossus.derive import derive
from colossus.derive.machine import RANK_BYTES, check_ranks
from colossus.derive.to_plan import with_model
from colossus.errors import UserError
from colossus.job import Job, load_job
from colossus.layout import AXES
from colossus.planner.plan import make_plan
from tests.derive.machines import machine
from tests.derive.test_planned import GPUS, TINY


def spread(device: str, dp_shard: int) -> Job:
    axes = {f"layout.{axis}": 1 for axis in AXES} | {"layout.dp_shard": dp_shard}
    return load_job(None, [f"fleet.device={device}"]).put(axes, "argument")


def test_as_many_ranks_as_the_memory_holds() -> None:
    here = machine()
    most = here.memory_bytes // RANK_BYTES
    check_ranks(spread("cpu", most), here)
    with pytest.raises(UserError, match=rf"layout.dp_shard={most + 1}: .* on this machine.*at most {most}$"):
        check_ranks(spread("cpu", most + 1), here)


@pytest.mark.parametrize(("words", "ranks"), [([], 3), (["layout.tp=2"], 2), (["layout.dp_shard=2"], 2)])
def test_a_count_of_ranks_means_to_train_what_it_means_to_plan(words: list[str], ranks: int) -> None:
    job = load_job(None, [*TINY, "fleet.count=3", *words])
    assert derive(job, machine()).layout.num_ranks == ranks
    fixed = job.put({"layout.pp": 1, "layout.cp": 1, "data.seq_len": 512}, "argument")
    assert make_plan(with_model(fixed, machine()), machine()).best.ranks == ranks


def test_more_ranks_than_are_counted_are_refused() -> None:
    for device, here in (("cpu", machine()), ("cuda", GPUS)):
        words = [*TINY, f"fleet.device={device}", "fleet.count=2"]
        assert derive(load_job(None, words), here).layout.dp_shard == 2
        with pytest.raises(UserError, match=r"^layout.tp=4: 4 ranks; at most fleet.count=2$"):
            derive(load_job(None, [*words, "layout.tp=4"]), here)
    with pytest.raises(UserError, match=r"^fleet.count=5: 5 ranks on this machine, .*4 GPUs, .*; at most 4$"):
        derive(load_job(None, [*TINY, "fleet.device=cuda", "fleet.count=5"]), GPUS)
    named = ["fleet.accelerator=h100-sxm", "fleet.count=8"]  # planned for others: tried here on what is here
    assert derive(load_job(None, [*TINY, "fleet.device=cpu", *named]), machine()).layout.num_ranks == 1


def test_as_many_ranks_as_there_are_gpus() -> None:
    check_ranks(spread("cuda", 4), GPUS)
    with pytest.raises(UserError, match=r"layout.dp_shard=5: 5 ranks.*4 GPUs, .*; at most 4$"):
        check_ranks(spread("cuda", 5), GPUS)
