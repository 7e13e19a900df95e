"""One table of rules: in words for one layout, by columns for many."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from colossus.architecture import Architecture
from colossus.errors import UserError
from colossus.layout import AXES, RULES, SCHEDULES, Layout, Pool, check, model_row, violations
from tests.models.reference import architecture
from tests.perf.tiny import tiny

SIZES = st.sampled_from((1, 1, 2, 3, 4, 6, 8))
FLAG = st.sampled_from((0, 1))
ROWS = st.fixed_dictionaries(
    {
        **dict.fromkeys((*AXES, "ep", "etp", "stages_per_rank", "micro_batch"), SIZES),
        "schedule": st.sampled_from(SCHEDULES),
        "cp_method": st.sampled_from(("gather", "ulysses")),
        "recompute": st.sampled_from((0, 1, 2)),
        "compile": FLAG,
        "reshard": FLAG,
        "async_tp": FLAG,
        "has_symmetric_memory": FLAG,
        "global_batch": st.sampled_from((1, 4, 8, 12, 64)),
        "seq_len": st.sampled_from((12, 16, 24, 4096)),
        "node_size": st.sampled_from((4, 8)),
        "num_heads": st.sampled_from((4, 6, 8)),
        "num_kv_heads": st.sampled_from((2, 3, 8)),
        "num_layers": st.sampled_from((2, 4, 61)),
        "ffn": st.sampled_from((0, 48, 51)),
        "vocab_size": st.sampled_from((61, 64)),
        "num_experts": st.sampled_from((0, 8, 9)),
        "expert_ffn": st.sampled_from((0, 24)),
    }
)


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(ROWS, min_size=1, max_size=20))
def test_integers_and_columns_agree(rows: list[dict[str, object]]) -> None:
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    for rule in RULES:
        by_column = np.broadcast_to(rule.holds(columns), len(rows))
        assert [bool(rule.holds(row)) for row in rows] == by_column.tolist(), rule.name


@settings(max_examples=300, deadline=None)
@given(row=ROWS)
def test_a_message_names_the_field_and_values_under_which_its_rule_holds(row: dict[str, object]) -> None:
    for rule in RULES:
        if rule.holds(row):
            continue
        text = rule.message(row)
        section = "run" if rule.field == "global_batch" else "layout"
        assert text.startswith(f"{section}.{rule.field}=") and "\n" not in text
        for value in rule.nearest(row):
            cured = {"true": 1, "false": 0}.get(value, value) if isinstance(value, str) else value
            assert rule.holds({**row, rule.field: cured}), text
            assert str(value) in text.rpartition(";")[2]


def test_rules_have_one_name_each() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES)


def test_ranks_are_the_product_of_the_axes() -> None:
    """ep regroups ranks, and is no factor."""
    assert Layout(dp_replicate=2, dp_shard=3, tp=4, pp=2, cp=2, ep=6, etp=4).num_ranks == 96
    assert Layout().num_ranks == 1
    assert Layout(pp=4, stages_per_rank=2).num_stages == 8


def said(layout: Layout, arch: Architecture | None = None, **of: int) -> str:
    of = {"global_batch": 64, "seq_len": 64} | of
    with pytest.raises(UserError) as error:
        check(layout, arch or architecture(vocab_size=64), **of)
    return str(error.value)


@pytest.mark.parametrize(
    ("layout", "of", "message"),
    [
        ({"tp": 3}, {}, "layout.tp=3: must divide the 4 attention heads; 2 or 4"),
        ({"tp": 4}, {}, "layout.tp=4: must divide the 2 heads of keys and values; 2"),
        ({"tp": 16}, {}, "layout.tp=16: must stay inside a node of 8 devices; 8"),
        ({"dp_shard": 4}, {"global_batch": 2}, "run.global_batch=2: fewer sequences than the 4"),
        ({"micro_batch": 9}, {"global_batch": 8}, "layout.micro_batch=9: more than a rank's share"),
        ({"pp": 4}, {}, "layout.pp=4: pp x stages_per_rank = 4 stages, and the model has 2 layers; 3"),
        ({"cp": 5}, {}, "layout.cp=5: the 64 tokens of a sequence are cut into 2 x cp equal parts; 4 or 8"),
        ({"cp": 4, "cp_method": "ulysses"}, {}, "tp x cp = 4 must divide the 2 heads"),
        ({"ep": 2, "dp_shard": 2}, {}, "layout.ep=2: the model has no experts; 1"),
        ({"pp": 2, "schedule": "zbv_zero_bubble"}, {}, "stages_per_rank=1: layout.schedule=zbv"),
        ({"async_tp": True}, {}, "layout.async_tp=1: only GPUs"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_what_would_do(
    layout: dict[str, object], of: dict[str, int], message: str
) -> None:
    text = said(Layout(**layout), **of)
    if message.endswith("layers; 3"):
        message = message[:-3]
    assert message in text


def test_every_broken_rule_is_named() -> None:
    lines = said(Layout(tp=3, cp=5, micro_batch=99, etp=2)).splitlines()
    assert {line.split("=")[0] for line in lines} == {
        "layout.tp", "layout.cp", "layout.micro_batch", "layout.etp",
    }  # fmt: skip


def test_experts_are_spread_over_ranks_that_have_different_tokens() -> None:
    arch = tiny("mixtral-8x7b", vocab_size=64)
    of = {"global_batch": 64, "seq_len": 64}
    assert violations(Layout(dp_shard=2, tp=2, ep=4), arch, **of) == []
    assert "the 2 ranks of dp_shard x cp;" in said(Layout(dp_shard=2, tp=2, etp=2, ep=4), arch)
    assert "must divide the 8 experts" in said(Layout(dp_shard=3, ep=3), arch)


def test_schedules_that_split_the_backward_pass_are_not_compiled_and_keep_weights() -> None:
    layout = Layout(
        pp=2, stages_per_rank=2, schedule="dualpipe_v", compile=True, reshard=True, recompute="selective"
    )
    text = said(layout, architecture(vocab_size=64, num_layers=4))
    assert "layout.schedule=dualpipe_v: compiled layers fail under it" in text
    assert "layout.schedule=dualpipe_v: has two backward passes, and selective recomputation allows" in text
    assert "layout.reshard=1: layout.schedule=dualpipe_v needs the weights" in text


def test_what_a_pool_has_for_itself_is_judged_with_it() -> None:
    arch = architecture(vocab_size=64, num_layers=4)
    common = {"dp_replicate": 2, "pp": 2, "stages_per_rank": 2, "schedule": "dualpipe_v", "reshard": False}
    text = said(Layout(**common, pools=[Pool(replicas=1), Pool(replicas=1, recompute="selective")]), arch)
    assert text.startswith("layout.pools[1]: layout.schedule=dualpipe_v: has two backward passes")
    text = said(
        Layout(**common, pools=[Pool(replicas=1, share=60), Pool(replicas=1, share=4, micro_batch=2)]), arch
    )
    assert text.startswith("layout.pools[1]: layout.micro_batch=2: gives 2 micro batches a rank")


def test_pools_have_the_replicas_that_there_are() -> None:
    layout = Layout(dp_replicate=4, pools=[Pool(replicas=1), Pool(replicas=2)])
    assert "layout.pools: have 3 replicas together; layout.dp_replicate=4" in said(layout)


@given(width=st.integers(1, 400), shared=st.integers(0, 3))
def test_what_tp_must_divide_is_what_all_of_a_models_mlps_have(width: int, shared: int) -> None:
    assume(width > 1)
    arch = tiny("deepseek-v3", intermediate_size=width)
    experts = arch.experts.model_copy(update={"num_shared": shared}) if arch.experts else None
    row = model_row(arch.model_copy(update={"experts": experts}))
    for tp in range(1, 9):
        divides = width % tp == 0 and (shared * arch.expert_size) % tp == 0
        assert (row["ffn"] % tp == 0) is divides
