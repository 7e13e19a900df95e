"""A run that grows from machines of one kind into a mixed fleet, and shrinks again, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from colossus import api
from colossus.job import Job
from tests.ranks.pool import Pool
from tests.trainer.running import StopAt
from tests.trainer.test_in_layouts import spread

Make = Callable[..., Job]
EXACT = ["precision.type=fp64", "run.global_batch=8", "run.steps=6", "run.validate_every=0"]
MIXED = "layout.pools=[{replicas=1,share=2},{replicas=2,micro_batch=2,recompute='full',share=3}]"
SHARDED = "layout.pools=[{replicas=1,share=2},{replicas=1,micro_batch=1,share=6}]"


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool() as made:
        yield made


@pytest.mark.parametrize(
    ("ranks", "mixed"),
    [(3, ["layout.dp_replicate=3", "layout.dp_shard=1", MIXED]), (4, ["layout.dp_replicate=2", SHARDED])],
    ids=["replicas of one rank", "replicas of two"],
)
def test_into_unequal_pools_and_back(ranks: int, mixed: list[str], small_job: Make, pool: Pool) -> None:
    """Each time as `colossus train RUN WORDS` goes on; what was derived of the batch follows the pools."""
    alone = api.train(small_job("alone", *EXACT))
    run = spread(pool, small_job("run", *EXACT, "layout.dp_shard=2"), [StopAt(2)])
    back = ["layout.dp_replicate=1", "layout.dp_shard=2", "layout.pools=[]"]
    for words, end in ((mixed, 4), (back, 6)):
        job = api.resolve(api.load_job(run.folder, words))
        assert bool(job.layout.pools) == (words is mixed)
        run = spread(pool, job, [StopAt(end)])
        assert len(run.loss) == end
    assert run.loss == pytest.approx(alone.loss, rel=1e-12)
    assert [event["num_ranks"] for event in run.events("resume")] == [ranks, 2]
