"""One table of rules: in words for one layout, by columns for many."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from colossus.errors import UserError
from colossus.layout import AXES, RULES, Layout, check, violations

SIZES = st.integers(1, 6)
NAMES = (*AXES, "ep", "micro_batch", "global_batch")
LAST = re.compile(r"(\d+)$")
CURES = {  # what a reader of each message would set
    **{f"{axis}-available": lambda said, axis=axis: (axis, 1) for axis in ("tp", "pp", "cp", "ep")},
    "ranks-fit-batch": lambda said: ("global_batch", int(re.search(r"at least (\d+)", said)[1])),
    "micro-batch-fits": lambda said: ("micro_batch", int(LAST.search(said)[1])),
}


def layout(**values: int) -> Layout:
    return Layout(
        **({"dp_replicate": 1, "dp_shard": 1, "tp": 1, "pp": 1, "cp": 1, "ep": 1, "micro_batch": 1} | values)
    )


@given(rows=st.lists(st.tuples(*[SIZES] * len(NAMES)), min_size=1, max_size=20))
def test_words_and_columns_agree(rows) -> None:
    """Rule by rule and row by row: the predicate over integers and over columns; and the words with both."""
    columns = {name: np.array([row[i] for row in rows]) for i, name in enumerate(NAMES)}
    by_rule = {rule.name: np.broadcast_to(rule.holds(columns), len(rows)) for rule in RULES}
    for i, row in enumerate(rows):
        values = dict(zip(NAMES, row, strict=True))
        broken = [rule for rule in RULES if not rule.holds(values)]
        assert [rule.name for rule in broken] == [name for name, holds in by_rule.items() if not holds[i]]
        batch = values.pop("global_batch")
        said = violations(layout(**values), batch)
        assert said == [rule.message(values | {"global_batch": batch}) for rule in broken]


@given(rows=st.tuples(*[SIZES] * len(NAMES)))
def test_the_nearest_legal_values_are_legal(rows) -> None:
    """Whatever is broken: with what the messages say, nothing is."""
    values = dict(zip(NAMES, rows, strict=True))
    for _ in range(len(RULES) + 1):
        broken = [rule for rule in RULES if not rule.holds(values)]
        if not broken:
            break
        field, value = CURES[broken[0].name](broken[0].message(values))
        values[field] = value
    assert all(rule.holds(values) for rule in RULES)


def test_rules_have_one_name_each_and_speak_of_fields() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES)
    row = dict.fromkeys(NAMES, 2)
    for rule in RULES:
        assert rule.message(row).startswith(("layout.", "run.")) and "\n" not in rule.message(row)


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
