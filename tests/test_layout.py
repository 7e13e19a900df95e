"""One table of rules: in words for one layout, by columns for many."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from colossus.architecture import Architecture
from colossus.errors import UserError
from colossus.layout import AXES, RULES, SCHEDULES, Layout, Pool, broken, check, model_row, violations
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
        "zero": st.sampled_from((1, 2, 3)),
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


@settings(max_examples=100, deadline=None)
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
        ({"tp": 3}, {}, "layout.tp=3: must divide the 4 attention heads; 2"),  # 2 heads of keys
        ({"tp": 4}, {}, "layout.tp=4: must divide the 2 heads of keys and values; 2"),
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


@pytest.mark.parametrize("tokens", [65, 257, 50257, 128_001, 256_003])
@pytest.mark.parametrize("tp", [2, 3, 4, 8])
def test_a_padded_vocabulary_that_is_offered_can_be_split(tokens: int, tp: int) -> None:
    """The tokens of GPT-2 as Megatron-LM pads them for 8 ranks: 51,200 (arXiv 1909.08053)."""
    rule = next(rule for rule in RULES if rule.name == "tp-vocab")
    row = {"tp": tp, "vocab_size": tokens}
    if rule.holds(row):
        return
    offered = int(rule.message(row).partition("model.vocab_size=")[2].partition(";")[0])
    assert rule.holds({**row, "vocab_size": offered}) and tokens < offered < 1.1 * tokens + tp
    assert (tokens, tp) != (50257, 8) or offered == 51200


def test_tensor_parallel_ranks_share_a_node() -> None:
    text = said(Layout(tp=16), architecture(num_heads=16, num_kv_heads=16, vocab_size=64))
    assert text == "layout.tp=16: must stay inside a node of 8 devices; 8"


@pytest.mark.parametrize("tp", [3, 5, 7, 10**7])
def test_a_field_that_breaks_several_rules_is_one_error_with_one_way_out(tp: int) -> None:
    """Heads, heads of keys and values, the vocabulary and the tokens of a sequence: 1 divides them all."""
    arch = architecture(num_heads=1, num_kv_heads=1, vocab_size=4096)
    (line,) = said(Layout(tp=tp), arch, seq_len=256).splitlines()
    assert line == f"layout.tp={tp}: must divide the 1 attention heads; 1"


def test_a_consequence_is_no_error_of_its_own() -> None:
    """With 2 stages, as the message says, 2 micro batches would do; with 4 they would not."""
    (line,) = said(Layout(pp=4), global_batch=2).splitlines()
    assert line.startswith("layout.pp=4: ") and line.endswith("; 2")


@given(
    layout=st.fixed_dictionaries({n: st.integers(1, 70) for n in ("tp", "cp", "ep", "etp", "micro_batch")}),
    heads=st.sampled_from([1, 4, 6, 16]),
)
def test_who_does_as_the_messages_say_has_a_legal_layout(layout: dict[str, int], heads: int) -> None:
    arch, of = architecture(num_heads=heads, num_kv_heads=heads, vocab_size=96), {"global_batch": 48}
    lines = violations(Layout(**layout), arch, **of, seq_len=96)
    fields = [line.partition("=")[0] for line in lines]
    assert len(set(fields)) == len(fields)
    for line in lines:
        name, offered = line.partition("=")[0].removeprefix("layout."), line.rpartition("; ")[2]
        layout[name] = int(offered.partition(" or ")[0])
    assert violations(Layout(**layout), arch, **of, seq_len=96) == []


def test_every_broken_rule_is_named() -> None:
    lines = said(Layout(tp=3, cp=5, micro_batch=99, etp=2)).splitlines()
    assert {line.split("=")[0] for line in lines} == {
        "layout.tp", "layout.cp", "layout.micro_batch", "layout.etp",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "later", "message"),
    [
        (
            {"pp": 2, "schedule": "interleaved_1f1b", "stages_per_rank": 2, "micro_batch": 1},
            [(3, 5, 64)],
            "layout.micro_batch=1: from step 3 on: gives 5 micro batches a rank",
        ),
        ({"cp": 2}, [(2, 8, 64), (4, 8, 62)], "layout.cp=2: from step 4 on: the 62 tokens of a sequence"),
        ({"cp": 2, "cp_method": "ulysses"}, [(1, 4, 63)], "layout.cp=2: from step 1 on: the 63 tokens"),
        ({"tp": 2}, [(1, 4, 63)], "layout.tp=2: from step 1 on: tp x cp must divide the 63 tokens"),
        ({"dp_shard": 4}, [(7, 3, 64)], "run.global_batch=3: from step 7 on: fewer sequences than the 4"),
        ({"micro_batch": 4}, [(1, 2, 64)], "layout.micro_batch=4: from step 1 on: more than a rank's share"),
        (
            {"pp": 2, "zero": 1},
            [(1, 1, 64)],
            "layout.micro_batch=1: from step 1 on: gives 1 micro batch a rank",
        ),
    ],
)
def test_every_shape_of_a_run_is_judged(
    layout: dict[str, object], later: list[tuple[int, int, int]], message: str
) -> None:
    """What is offered instead holds at all of them."""
    arch = architecture(num_layers=4, vocab_size=64)
    made = Layout(**layout)
    of = {"global_batch": 4, "seq_len": 64}
    assert violations(made, arch, **of) == []
    (said,) = violations(made, arch, **of, later=later)
    assert message in said
    field = said.partition("=")[0].removeprefix("layout.")
    offered = said.rpartition("; ")[2].split(" or ")
    if field != "run.global_batch" and offered[0].isdigit():
        for value in offered:
            cured = made.model_copy(update={field: int(value)})
            left = violations(cured, arch, **of, later=later)
            assert not any(text.startswith(f"layout.{field}=") for text in left), (value, left)


def test_pools_are_judged_at_every_batch() -> None:
    """Of a batch of 6 shares of 1 and 3 are 1 or 2, and 4 or 5."""
    pools = [Pool(replicas=1, share=1), Pool(replicas=1, share=3, micro_batch=3)]
    made = Layout(dp_replicate=2, pools=pools)
    assert violations(made, architecture(), global_batch=4, seq_len=16, later=[(2, 6, 16)]) == []
    (said,) = violations(made, architecture(), global_batch=4, seq_len=16, later=[(2, 6, 16), (5, 2, 16)])
    assert said.startswith("layout.pools[1]: layout.micro_batch=3: from step 5 on: more than a rank's share")


def test_experts_are_spread_over_ranks_that_have_different_tokens() -> None:
    arch = tiny("mixtral-8x7b", vocab_size=64)
    of = {"global_batch": 64, "seq_len": 64}
    assert violations(Layout(dp_shard=2, tp=2, ep=4), arch, **of) == []
    assert "the 2 ranks of dp_shard x cp;" in said(Layout(dp_shard=2, tp=2, etp=2, ep=4), arch)
    assert "must divide the 8 experts" in said(Layout(dp_shard=3, ep=3), arch)


def test_schedules_that_split_the_backward_pass_are_not_compiled_and_keep_weights() -> None:
    layout = Layout(
        pp=2, stages_per_rank=2, schedule="dualpipe_v", compile=True, zero=3, recompute="selective"
    )
    text = said(layout, architecture(vocab_size=64, num_layers=4))
    assert "layout.schedule=dualpipe_v: compiled layers fail under it" in text
    assert "layout.schedule=dualpipe_v: takes backward passes in parts, and each would compute" in text
    assert "layout.zero=3: layout.schedule=dualpipe_v needs the weights" in text


def test_what_a_pool_has_for_itself_is_judged_with_it() -> None:
    arch = architecture(vocab_size=64, num_layers=4)
    common = {"dp_replicate": 2, "pp": 2, "stages_per_rank": 2, "schedule": "dualpipe_v", "zero": 1}
    text = said(Layout(**common, pools=[Pool(replicas=1), Pool(replicas=1, recompute="selective")]), arch)
    assert text.startswith("layout.pools[1]: layout.schedule=dualpipe_v: takes backward passes in parts")
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


WHOLE = {"vocab_size": 64, "num_layers": 8, "num_heads": 8, "num_kv_heads": 4}
LEGAL = [  # the same but for what decides, one legal and one not; of: of the batch and the samples
    ({"cp": 4}, {"seq_len": 64}, {"seq_len": 68}, "cp"),  # 2 x 4 parts
    ({"cp": 4, "cp_method": "ulysses"}, {"seq_len": 68}, {"seq_len": 66}, "cp"),  # 4 parts
    ({"tp": 2, "cp": 2, "cp_method": "ulysses"}, {"seq_len": 64}, {"seq_len": 62}, "tp"),
    ({"dp_shard": 4, "dp_replicate": 2}, {"global_batch": 8}, {"global_batch": 7}, "global_batch"),
    ({"dp_shard": 2, "micro_batch": 4}, {"global_batch": 7}, {"global_batch": 6}, "micro_batch"),
    ({"pp": 4, "micro_batch": 2}, {"global_batch": 7}, {"global_batch": 6}, "micro_batch"),  # 1f1b: 4 and 3
    ({"pp": 4, "dp_shard": 2}, {"global_batch": 7}, {"global_batch": 6}, "micro_batch"),
    (
        {"pp": 2, "stages_per_rank": 2, "schedule": "dualpipe_v", "zero": 1},
        {"global_batch": 4},
        {"global_batch": 3},
        "micro_batch",
    ),
    (  # in rounds of 2 or more, equal ones: 3 is one round, 5 can't be cut into two
        {"pp": 2, "stages_per_rank": 2, "schedule": "interleaved_1f1b"},
        {"global_batch": 3},
        {"global_batch": 5},
        "micro_batch",
    ),
]


@pytest.mark.parametrize(("layout", "legal", "illegal", "field"), LEGAL)
def test_where_a_rule_begins_to_hold(
    layout: dict[str, object], legal: dict[str, int], illegal: dict[str, int], field: str
) -> None:
    arch = architecture(**WHOLE)
    of = {"global_batch": 64, "seq_len": 64}
    assert violations(Layout(**layout), arch, **(of | legal)) == []
    broken = violations(Layout(**layout), arch, **(of | illegal))
    assert [line.partition("=")[0].partition(".")[2] for line in broken] == [field]


@pytest.mark.parametrize(
    ("legal", "illegal", "changes"),
    [
        ({"tp": 2, "cp": 2}, {"tp": 2, "cp": 4}, {"cp_method": "ulysses"}),  # 4 heads of keys and values
        ({"tp": 4}, {"tp": 8}, {}),
        ({"pp": 4, "stages_per_rank": 2}, {"pp": 4, "stages_per_rank": 3}, {"schedule": "interleaved_1f1b"}),
        ({"pp": 1}, {"pp": 2}, {"stages_per_rank": 1, "schedule": "zbv_zero_bubble", "zero": 1}),
    ],
)
def test_how_far_an_axis_reaches(
    legal: dict[str, int], illegal: dict[str, int], changes: dict[str, object]
) -> None:
    arch, of = architecture(**WHOLE), {"global_batch": 64, "seq_len": 64}
    assert violations(Layout(**(changes | legal)), arch, **of) == []
    assert len(violations(Layout(**(changes | illegal)), arch, **of)) == 1


def test_a_replica_has_what_its_pool_says() -> None:
    pools = [Pool(replicas=2, micro_batch=3), Pool(replicas=1, recompute="full"), Pool(replicas=1)]
    layout = Layout(dp_replicate=4, micro_batch=1, recompute="none", pools=pools)
    of_each = [layout.of_replica(replica) for replica in range(4)]
    assert [each.micro_batch for each in of_each] == [3, 3, 1, 1]
    assert [each.recompute for each in of_each] == ["none", "none", "full", "none"]


@pytest.mark.parametrize(("share", "wrong"), [(31, True), (32, False), (33, True)])
def test_shares_of_pools_make_up_the_batch(share: int, wrong: bool) -> None:
    pools = [Pool(replicas=1, share=64 - 32), Pool(replicas=1, share=share)]
    broken = violations(
        Layout(dp_replicate=2, pools=pools), architecture(**WHOLE), global_batch=64, seq_len=64
    )
    near = f"shares of 64 together, or run.global_batch={32 + share}"
    said = f"layout.pools: take {32 + share} sequences together; run.global_batch=64; {near}"
    assert broken == [said] * wrong


BASE = {
    **dict.fromkeys((*AXES, "ep", "etp", "stages_per_rank", "micro_batch"), 1),
    "schedule": "1f1b", "cp_method": "gather", "recompute": 0, "compile": 0, "zero": 1, "async_tp": 0,
    "has_symmetric_memory": 0, "global_batch": 32, "seq_len": 64, "node_size": 8, "num_heads": 8,
    "num_kv_heads": 4, "num_layers": 8, "ffn": 64, "vocab_size": 64, "num_experts": 8, "expert_ffn": 32,
}  # fmt: skip
V, ZB, INTERLEAVED = "zbv_zero_bubble", "interleaved_zero_bubble", "interleaved_1f1b"
APART = (V, ZB, "dualpipe_v")  # gradients of weights come apart from those of inputs
# of each rule, what keeps it and what breaks it, on both sides of its edge
EDGES: dict[str, list[tuple[dict[str, object], bool]]] = {
    "ranks-fit-batch": [
        ({"dp_shard": 32}, True), ({"dp_shard": 33}, False),
        ({"dp_replicate": 2, "dp_shard": 16}, True), ({"dp_replicate": 3, "dp_shard": 11}, False),
    ],
    "micro-batch-fits": [
        ({"dp_shard": 4, "micro_batch": 8}, True), ({"dp_shard": 4, "micro_batch": 9}, False),
        ({"dp_shard": 4, "micro_batch": 9, "global_batch": 33}, True),
        ({"dp_shard": 4, "micro_batch": 10, "global_batch": 33}, False),
        ({"dp_shard": 2, "dp_replicate": 2, "micro_batch": 9}, False),
    ],
    "tp-heads": [({"tp": 8}, True), ({"tp": 3}, False)],
    "tp-kv-heads": [({"tp": 4}, True), ({"tp": 8}, False)],
    "tp-ffn": [({"tp": 4}, True), ({"tp": 4, "ffn": 66}, False), ({"tp": 4, "ffn": 0}, True)],
    "tp-vocab": [({"tp": 4}, True), ({"tp": 4, "vocab_size": 66}, False)],
    "tp-node": [({"tp": 8}, True), ({"tp": 8, "node_size": 4}, False), ({"tp": 4, "node_size": 4}, True)],
    "tp-sequence": [
        ({"tp": 2, "cp": 2, "seq_len": 68}, True), ({"tp": 2, "cp": 2, "seq_len": 66}, False),
        ({"tp": 1, "cp": 4, "seq_len": 66}, True), ({"tp": 2, "seq_len": 65}, False),
        ({"seq_len": 65}, True),
    ],
    "cp-sequence": [
        ({"cp": 4, "seq_len": 64}, True), ({"cp": 4, "seq_len": 60}, False),
        ({"cp": 4, "seq_len": 60, "cp_method": "ulysses"}, True), ({"cp": 1, "seq_len": 61}, True),
        ({"cp": 3, "seq_len": 66}, True), ({"cp": 3, "seq_len": 64}, False),
        ({"cp": 4, "seq_len": 62, "cp_method": "ulysses"}, False),
    ],
    "ulysses-heads": [
        ({"cp": 2, "tp": 2, "cp_method": "ulysses"}, True), ({"cp": 4, "tp": 2}, True),
        ({"cp": 4, "tp": 2, "cp_method": "ulysses"}, False),
    ],
    "etp-is-tp": [({"tp": 4, "etp": 4}, True), ({"tp": 4, "etp": 2}, False), ({"tp": 4}, True)],
    "etp-ffn": [({"etp": 4}, True), ({"etp": 4, "expert_ffn": 30}, False)],
    "ep-needs-experts": [({"num_experts": 0}, True), ({"ep": 2, "num_experts": 0}, False), ({"ep": 2}, True)],
    "ep-experts": [({"ep": 4}, True), ({"ep": 3}, False)],
    "ep-ranks": [
        ({"dp_shard": 2, "cp": 2, "tp": 2, "ep": 8}, True),
        ({"dp_shard": 2, "cp": 2, "tp": 2, "etp": 2, "ep": 8}, False),
        ({"dp_shard": 2, "cp": 2, "tp": 2, "etp": 2, "ep": 4}, True),
        ({"dp_shard": 2, "dp_replicate": 2, "ep": 4}, False), ({"dp_shard": 2, "pp": 2, "ep": 4}, False),
    ],
    "stages-of-schedule": [
        ({"stages_per_rank": 2}, False), ({"schedule": V}, True), ({"pp": 2}, True),
        ({"pp": 2, "stages_per_rank": 2}, False),
        ({"pp": 2, "schedule": "gpipe", "stages_per_rank": 2}, False),
        ({"pp": 2, "schedule": V, "stages_per_rank": 2}, True), ({"pp": 2, "schedule": V}, False),
        ({"pp": 2, "schedule": "dualpipe_v", "stages_per_rank": 3}, False),
        ({"pp": 2, "schedule": INTERLEAVED}, False),
        ({"pp": 2, "schedule": INTERLEAVED, "stages_per_rank": 3}, True),
        ({"pp": 2, "schedule": ZB, "stages_per_rank": 2}, True), ({"pp": 2, "schedule": ZB}, False),
    ],
    "pp-layers": [
        ({"pp": 4, "stages_per_rank": 2}, True), ({"pp": 4, "stages_per_rank": 2, "num_layers": 7}, False),
    ],
    "pp-micro-batches": [
        ({"pp": 8, "micro_batch": 4}, True), ({"pp": 8, "micro_batch": 5}, False),
        ({"pp": 8, "micro_batch": 4, "dp_shard": 2}, False), ({"pp": 1, "micro_batch": 32}, True),
        ({"pp": 8, "micro_batch": 5, "global_batch": 36}, True),
        ({"pp": 4, "micro_batch": 4, "stages_per_rank": 2, "schedule": "dualpipe_v"}, True),
        ({"pp": 4, "micro_batch": 5, "stages_per_rank": 2, "schedule": "dualpipe_v"}, False),
        *(({"pp": 8, "micro_batch": 32, "schedule": name}, True) for name in ("gpipe", INTERLEAVED, ZB, V)),
    ],
    "pp-rounds": [
        *(({"pp": 4, "global_batch": count, "schedule": name}, count != 9)
          for name in (INTERLEAVED, ZB) for count in (3, 6, 8, 9)),
        ({"pp": 4, "global_batch": 9}, True), ({"pp": 1, "global_batch": 9, "schedule": ZB}, True),
        ({"pp": 4, "global_batch": 17, "micro_batch": 2, "schedule": ZB}, False),
    ],
    "no-compiled-zero-bubble": [
        *(({"pp": 2, "schedule": name, "compile": 1}, name not in APART) for name in SCHEDULES),
        ({"pp": 1, "schedule": V, "compile": 1}, True), ({"pp": 2, "schedule": V}, True),
    ],
    "zero-bubble-divides-nothing": [
        *(({"pp": 2, "schedule": name, "zero": 3}, name not in APART) for name in SCHEDULES),
        ({"pp": 1, "schedule": V, "zero": 3}, True), ({"pp": 2, "schedule": V}, True),
        ({"pp": 2, "schedule": V, "zero": 2}, False),
    ],
    "no-recomputed-zero-bubble": [
        *(({"pp": 2, "schedule": V, "recompute": kind}, kind == 0) for kind in (0, 1, 2)),
        ({"pp": 2, "recompute": 1}, True), ({"pp": 1, "schedule": V, "recompute": 1}, True),
    ],
    "async-tp-hardware": [
        ({"async_tp": 1}, False), ({"async_tp": 1, "has_symmetric_memory": 1}, True), ({}, True),
    ],
}  # fmt: skip


def test_every_rule_holds_up_to_its_edge() -> None:
    assert set(EDGES) == {rule.name for rule in RULES}
    for rule in RULES:
        assert {holds for _, holds in EDGES[rule.name]} == {True, False}
        for changed, holds in EDGES[rule.name]:
            assert bool(rule.holds(BASE | changed)) is holds, (rule.name, changed)


@settings(max_examples=100, deadline=None)
@given(row=ROWS)
def test_a_rule_reads_what_it_asks_for(row: dict[str, object]) -> None:
    """Whatever the values: with those fields alone it says the same, and without one of them nothing."""
    for rule in RULES:
        alone = {name: row[name] for name in rule.asks}
        assert bool(rule.holds(alone)) == bool(rule.holds(row))
        said = [where for other, where in broken(alone) if other is rule]
        assert said == [not rule.holds(row)]
        for name in alone:
            less = {field: value for field, value in alone.items() if field != name}
            assert rule not in [other for other, _ in broken(less)]


def test_replicas_belong_to_the_pools_in_their_order() -> None:
    layout = Layout(
        dp_replicate=5, micro_batch=3, recompute="selective",
        pools=[Pool(replicas=2, micro_batch=7), Pool(replicas=3, recompute="full")],
    )  # fmt: skip
    found = [(mine.micro_batch, mine.recompute) for mine in map(layout.of_replica, range(5))]
    assert found == [(7, "selective")] * 2 + [(3, "full")] * 3
    assert Layout(micro_batch=3).of_replica(4).micro_batch == 3


def test_shares_of_pools_are_the_whole_batch() -> None:
    arch = architecture(vocab_size=64)
    for share, together in ((30, 62), (32, 66), (31, None)):
        layout = Layout(dp_replicate=3, pools=[Pool(replicas=2, share=share), Pool(replicas=1, share=2)])
        found = violations(layout, arch, global_batch=64, seq_len=64)
        near = f"shares of 64 together, or run.global_batch={together}"
        said = [f"layout.pools: take {together} sequences together; run.global_batch=64; {near}"]
        assert found == (said if together else [])
    some = Layout(dp_replicate=2, pools=[Pool(replicas=1, share=60), Pool(replicas=1)])
    assert "for all, or for none" in said_of(some)


def said_of(layout: Layout) -> str:
    return said(layout, architecture(vocab_size=64))
