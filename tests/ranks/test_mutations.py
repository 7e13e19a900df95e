"""A reduction that is switched off, or a trap that is back, is noticed. `benchmarks.mutations` has all."""

from __future__ import annotations

import pytest

from tests.ranks.mutations import MUTATIONS, Mutation
from tests.ranks.pool import Pool

QUICK = {name: made for name, made in MUTATIONS.items() if not made.compiled}
HERE = dict(list(QUICK.items())[::4])


@pytest.mark.parametrize("mutation", HERE.values(), ids=HERE.keys())
def test_it_is_noticed(mutation: Mutation, pool: Pool) -> None:
    assert mutation.deviation(pool) > 1
