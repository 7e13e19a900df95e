"""One table of rules: in words for one layout, by columns for many."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from colossus.errors import UserError
from colossus.layout import RULES, Layout, check, violations

SIZES = st.integers(1, 6)


def layout(**values: int) -> Layout:
    return Layout(
        **({"dp_replicate": 1, "dp_shard": 1, "tp": 1, "pp": 1, "cp": 1, "ep": 1, "micro_batch": 1} | values)
    )


@given(rows=st.lists(st.tuples(SIZES, SIZES, SIZES, SIZES, st.integers(1, 12)), min_size=1, max_size=20))
def test_words_and_columns_agree(rows) -> None:
    names = ("dp_replicate", "dp_shard", "tp", "micro_batch", "global_batch")
    columns = {name: np.array([row[i] for row in rows]) for i, name in enumerate(names)}
    columns |= {axis: np.ones(len(rows), dtype=int) for axis in ("pp", "cp", "ep")}
    legal = np.logical_and.reduce([np.broadcast_to(rule.holds(columns), len(rows)) for rule in RULES])
    for row, expected in zip(rows, legal, strict=True):
        values = dict(zip(names, row, strict=True))
        batch = values.pop("global_batch")
        assert (violations(layout(**values), batch) == []) == expected


def test_ranks_are_the_product_of_the_axes() -> None:
    assert layout(dp_replicate=2, dp_shard=3).num_ranks == 6
    assert Layout().num_ranks == 1


def test_every_broken_rule_is_named_with_what_would_do() -> None:
    with pytest.raises(UserError) as error:
        check(layout(tp=2, dp_shard=4, micro_batch=9), global_batch=2)
    text = str(error.value)
    assert (
        "layout.tp=2" in text
        and "layout.dp_shard=2" in text
        and "layout.micro_batch=9" in text
        and "at most 1" in text
    )
