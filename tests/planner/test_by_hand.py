"""What a step and its memory are put together from, worked out by hand: a model of eight equal layers.

Width 32, 4 heads of 8 over 2 of keys and values, feed-forward 48, 64 tokens in the vocabulary. A layer has
2 x 32 x 32 + 2 x 16 x 32 + 3 x 32 x 48 + 2 x 32 = 7,744 weights, each end 64 x 32 (the last 32 more).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from colossus.layout import ZERO_BUBBLE
from colossus.perf import communication as comm
from colossus.perf.corrections import Corrections
from colossus.perf.price import UPDATE_BYTES
from colossus.perf.schedule import HALF, bubble, fullest, timeline
from colossus.perf.software import MEGATRON_CORE, OURS
from colossus.planner.choice import all_refined, exact_pipeline
from colossus.planner.columns import Layouts
from colossus.planner.estimate import estimate, rank_weights
from colossus.planner.formulas import layers_ledger
from colossus.planner.memory import memory
from tests.perf.test_schedule import CASES, torch_order
from tests.perf.tiny import tiny
from tests.planner.problems import problem
from tests.planner.test_formulas import piece

LAYER, FIRST, LAST = 7744, 64 * 32, 64 * 32 + 32
TOKENS = 4096  # of a sample
WORK = ("products", "attention", "memory-bound", "recomputation", "tensor, context and expert messages")


def eight(batch: int = 16, software=OURS, count: int = 8, **changed):
    made = problem("llama3.2-1b", count=count, seq_len=TOKENS, batch=batch)
    arch = tiny("llama3.1-8b", **({"num_layers": 8, "vocab_size": 64} | changed))
    return replace(made, arch=arch, pricer=replace(made.pricer, software=software))


def parts(made, *rows):
    """Bytes by use of each layout."""
    needs = memory(made, Layouts.of(rows)).parts
    return [{name: float(column[i]) for name, column in needs.items()} for i in range(len(rows))]


def kept(made, **row) -> float:
    """Bytes that a micro-batch leaves in a layer, by the ledger, whose bytes are compared with autograd's."""
    ledger = made.ledger(piece(TOKENS, row.pop("micro_batch", 1.0), **row))
    return float(ledger.total("saved", stage="dense", phase="forward")[0])


# ---------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("schedule", "chunks", "layers", "halves", "ends", "sent"),
    [
        ("gpipe", 1, 16 * 2, 0, 16, 0),  # all 16 micro-batches, of two layers
        ("1f1b", 1, 4 * 2, 0, 0, 4),  # as many as there are ranks after this one, itself included
        # A round of the first stage, two a later rank, and one; seven of the first stage, four of the other.
        ("interleaved_1f1b", 2, 4 + 2 * 3 + 1, 0, 0, 2 * 7 + 4),
        ("interleaved_1f1b", 1, 4 * 2, 0, 0, 4),
        # One a later rank; as many weights' gradients wait. All but one are of the stage before the last.
        ("interleaved_zero_bubble", 2, 4 + 3 + 1, 4, 1, 2 * 7),
        ("zbv_zero_bubble", 2, 7, 7, 0, 7),  # the last rank's; the first has eight layers, and one of these
        ("dualpipe_v", 2, 2 * 4 + 1, 0, 1, 8),
    ],
)  # fmt: skip
def test_micro_batches_in_flight_wait_in_every_layer_of_a_rank(schedule, chunks, layers, halves, ends, sent):
    """halves: of which the gradients of inputs wait, too: of what products gave (q, k, v, out, gate, up,
    down) and of two norms, and of what a stage of a layer was given and gave on, in two bytes. ends:
    micro-batches whose last norm waits. sent: how often what a stage has sent on is kept."""
    made = eight()
    (needs,) = parts(made, {"pp": 4, "schedule": schedule, "stages_per_rank": chunks})
    end = float(made.ledger(piece(TOKENS, 1.0)).total("saved", stage="last", phase="forward")[0])
    half = TOKENS * 2 * (32 + 16 + 16 + 32 + 48 + 48 + 32 + 2 * 32 + 2 * 32)
    waiting = layers * kept(made) + halves * half + ends * end + sent * TOKENS * 2 * 32
    assert needs["activations"] == pytest.approx(waiting)


@pytest.mark.parametrize(("name", "per_rank", "pp", "micro_batches"), CASES)
def test_activations_wait_until_the_gradients_of_weights_are_made(name, per_rank, pp, micro_batches):
    """Counted over PyTorch's own orders, action by action."""
    if name in ("gpipe", "1f1b"):
        pytest.skip("PyTorch writes down no order of schedules with one stage")
    held, half, _ = fullest(name, pp, per_rank, micro_batches)[0]
    for rank in range(pp):
        now = most = together = 0.0
        order = torch_order(name, pp, per_rank, micro_batches, rank)
        waiting = 0
        for work, *_ in order:
            now += {"F": 1, "I": 0}.get(work, -1)
            waiting += {"I": 1, "W": -1}.get(work, 0)
            most = max(most, now)
            together = max(together, now + HALF * waiting)
        own = {stage for _, stage, _ in order}
        assert sum(held[stage] + HALF * half[stage] for stage in own) == pytest.approx(together)
        if name == "interleaved_zero_bubble" and micro_batches > pp:
            freed_early = most - rank  # so many gradients of weights are put off
            assert freed_early < most or rank == 0


def test_a_layer_that_is_made_again_is_there_once_beside_the_inputs_of_all():
    made = eight()
    plain, full, selective = parts(
        made, {"recompute": "none"}, {"recompute": "full"}, {"recompute": "selective"}
    )
    ends = plain["activations"] - 8 * kept(made)
    inputs = 32 * 2 * TOKENS  # of a layer, in two bytes
    assert full["activations"] == pytest.approx(8 * inputs + (kept(made) - inputs) + ends)
    some = inputs + kept(made, recompute=1.0)
    assert 2 * inputs < some < kept(made)
    assert selective["activations"] == pytest.approx(8 * some + (kept(made) - some) + ends)
    # three of a stage's four layers: one keeps all, and the stage what it has sent on
    (three,) = parts(made, {"pp": 2, "recompute": "full", "recompute_layers": 3})
    assert three["activations"] == pytest.approx(2 * (4 * inputs + kept(made)) + kept(made) - inputs)


def test_states_are_sharded_over_dp_shard_and_cp_and_divided_by_tp():
    made = eight(count=16)
    rows = [{}, {"dp_shard": 2, "cp": 2}, {"dp_shard": 2, "tp": 2}, {"dp_replicate": 4}]
    whole = 8 * LAYER + FIRST + LAST
    norms = 8 * 2 * 32 + 32  # which every rank of tp has
    expected = [whole, whole / 4, ((whole - norms) / 2 + norms) / 2, whole]
    for needs, weights in zip(parts(made, *rows), expected, strict=True):
        assert needs["weights"] == pytest.approx(4 * weights)
        assert needs["optimizer"] == pytest.approx(8 * weights)
        assert needs["gradients"] == pytest.approx(4 * weights)


def test_products_of_one_rank_read_copies_of_layers():
    """In two bytes, of what lies between the ends and the last norm."""
    for tied in (False, True):
        (one,) = parts(eight(tie_embeddings=tied), {})
        assert one["copies of weights"] == pytest.approx(2 * 8 * LAYER)


def test_copies_of_layers_that_are_made_again_go_with_them():
    """Three of eight layers: the copies of five stay, and of the one at work."""
    some, every = parts(eight(), {"recompute": "full", "recompute_layers": 3}, {"recompute": "full"})
    layers = 8 * LAYER
    assert some["copies of weights"] == pytest.approx(2 * layers * 6 / 8)
    assert every["copies of weights"] == pytest.approx(2 * layers / 8)


def test_gradients_of_the_only_micro_batch_come_as_its_activations_go():
    """At the end all are there and no activations; where another micro-batch follows, all the time."""
    one, two = (
        parts(eight(batch=batch, intermediate_size=8192), {"recompute": "full"})[0] for batch in (1, 2)
    )
    layer = LAYER + 3 * 32 * (8192 - 48)
    assert two["gradients"] == pytest.approx(4 * (8 * layer + FIRST + LAST))
    assert one["gradients"] == pytest.approx(4 * layer)  # of the last layer; the one before it is at work
    assert two["activations"] == one["activations"] > 0


def test_a_layer_has_gradients_of_its_widest_tensors_at_once():
    """Three of the width of the MLP and four of the model's, in two bytes."""
    (needs,) = parts(eight(), {"micro_batch": 2})
    assert needs["loss or one layer's gradients"] == pytest.approx(2 * TOKENS * (3 * 48 + 4 * 32) * 2)


def test_gpipe_keeps_a_gradient_of_the_output_matrix_for_each_loss_that_waits():
    """In fp32, beside what the matrix is multiplied with; in the backward pass too, where sums are there."""
    made = (eight(batch=batch, intermediate_size=8192) for batch in (16, 8))
    many, few = (parts(each, {"pp": 2, "schedule": "gpipe", "recompute": "full"})[0] for each in made)
    assert many["gradients"] == few["gradients"] > 0
    more = many["loss or one layer's gradients"] - few["loss or one layer's gradients"]
    assert more == pytest.approx(8 * (4 * 64 * 32 + TOKENS * 32 * 2))


def test_the_loss_has_logits_and_the_gradient_of_the_output_matrix():
    """Logits and their gradients at once, in two bytes; the matrix's gradient in fp32, its copy in two bytes;
    what it is multiplied with, and the gradient of that."""
    wide = eight(vocab_size=2**16)
    (needs,) = parts(wide, {})
    head = 2**16 * 32
    assert needs["loss or one layer's gradients"] == pytest.approx(
        TOKENS * 2**16 * 4 + 4 * head + 2 * TOKENS * 32 * 2
    )
    assert needs["copies of weights"] == pytest.approx(2 * 8 * LAYER + 2 * head)


def test_logits_of_other_programs_are_whole_and_spread_over_tp():
    (needs,) = parts(eight(software=MEGATRON_CORE), {"tp": 2, "micro_batch": 2})
    assert needs["loss or one layer's gradients"] == pytest.approx(2 * TOKENS * 64 / 2 * (2 + 4))


def test_what_is_reserved_is_more_than_what_is_allocated():
    needs = memory(eight(), Layouts.of([{}]))
    assert float(needs.reserved[0]) == pytest.approx(float(needs.allocated[0]) / 0.94)
    part = eight().pricer.hardware.accelerator
    for room, fits in ((1.01, True), (0.99, False)):
        assert needs.fits(replace(part, memory=room * float(needs.reserved[0])))[0] == fits


def test_experts_are_divided_by_their_own_ranks():
    """Mixtral: eight experts of 3 x 32 x 24 in each of five layers; a router of 8 x 32."""
    arch = tiny("mixtral-8x7b")
    made = replace(eight(), arch=arch)
    shape = made.shape("1f1b", 1, 1)
    rows = [{}, {"ep": 4, "dp_shard": 4}, {"ep": 2, "tp": 2, "etp": 2, "dp_shard": 2}]
    _, routed = rank_weights(arch, Layouts.of(rows), shape, 0)
    whole = 5 * 8 * 3 * 32 * 24
    assert routed.tolist() == [whole, whole / 4, whole / 4]
    one, spread = (needs["weights"] for needs in parts(made, {}, {"ep": 4, "dp_shard": 8}))
    dense = one / 4 - whole
    # over 8 ranks, of which 4 have other experts: 2 share each
    assert spread == pytest.approx(4 * (dense / 8 + whole / 4 / 2))


# ---------------------------------------------------------------------- seconds


def seconds_of(made, *rows):
    return estimate(made, Layouts.of(rows))


def one_layer(made, found, i: int = 0, stage: str = "dense") -> float:
    return sum(
        float(found.phases[phase, stage][i]) for phase in ("forward", "recompute", "backward", "weights")
    )


def test_a_step_is_its_micro_batches_of_the_slowest_rank():
    """Three layers over two ranks: one has two of them."""
    made = eight(batch=12, num_layers=3)
    found = seconds_of(made, {"pp": 2, "recompute": "full"}, {"micro_batch": 2, "recompute": "full"})
    counts = made.shape("1f1b", 2, 1).counts[:, 0].tolist()
    assert sorted(counts) == [1, 2]
    ends = [one_layer(made, found, 0, end) for end in ("first", "last")]
    slowest = max(count * one_layer(made, found) + end for count, end in zip(counts, ends, strict=True))
    work = sum(found.parts[name] for name in WORK)
    assert work[0] == pytest.approx(12 * slowest, rel=1e-9)
    alone = 3 * one_layer(made, found, 1) + sum(one_layer(made, found, 1, end) for end in ("first", "last"))
    assert work[1] == pytest.approx(6 * alone, rel=1e-9)
    again = 6 * 3 * float(found.phases["recompute", "dense"][1])
    assert found.parts["recomputation"][1] == pytest.approx(again, rel=1e-9)
    forward = found.phases["forward", "dense"][1]
    assert 0.7 * forward < found.phases["recompute", "dense"][1] < forward  # without its last product
    whole = eight(batch=12, num_layers=3, software=replace(OURS, stops_early=False))
    found = seconds_of(whole, {"micro_batch": 2, "recompute": "full"})
    assert found.phases["recompute", "dense"][0] == pytest.approx(forward, rel=0.02)


@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", 1), ("gpipe", 1), ("interleaved_1f1b", 2)])
def test_a_pipeline_waits_for_all_but_one_rank(schedule, chunks):
    made = eight()
    found = seconds_of(made, {"pp": 4, "schedule": schedule, "stages_per_rank": chunks})
    ends = sum(one_layer(made, found, 0, end) for end in ("first", "last"))
    mean = 2 * one_layer(made, found) + ends / 4
    assert found.parts["bubble"][0] == pytest.approx(3 * mean / chunks, rel=1e-9)
    send = float(found.send[0])
    size = TOKENS * 32 * 2  # a micro-batch's activations, in two bytes
    part = made.pricer.hardware.accelerator
    assert send == pytest.approx(size / (part.nvlink * comm.NVLINK_SHARE) + comm.SEND_START)
    # there and back: while it fills, then beside other work, of which they take a tenth
    messages = 2 * 3 * send + 0.1 * 2 * chunks * 16 * send
    assert found.parts["pipeline messages"][0] == pytest.approx(messages, rel=1e-9)


def test_with_fewer_micro_batches_than_ranks_each_stage_waits_for_the_round():
    made = eight(batch=2)
    found = seconds_of(made, {"pp": 4, "schedule": "interleaved_1f1b", "stages_per_rank": 2})
    ends = sum(one_layer(made, found, 0, end) for end in ("first", "last"))
    stage = (2 * one_layer(made, found) + ends / 4) / 2
    # a micro-batch passes 8 stages one after the other, and the second one follows a stage later
    assert found.parts["bubble"][0] + 2 * 2 * stage == pytest.approx((8 + 1) * stage, rel=1e-9)


def messages(made, kind: str, sent: float, size: float, stride: float = 1.0) -> float:
    group = comm.Group(np.array([size]), np.array([stride]))
    return float(made.pricer.messages(kind, np.array([sent]), group)[0])


@pytest.mark.parametrize("micro_batches", [1, 2, 6])
def test_weights_that_are_let_go_of_are_gathered_for_every_micro_batch(micro_batches):
    made = eight(batch=2 * micro_batches)
    found = seconds_of(made, *({"dp_shard": 2, "zero": zero} for zero in (3, 1, 2)))
    weights = 8 * LAYER + FIRST + LAST
    gather = messages(made, "all_gather", 2 * weights, 2)
    scatter = messages(made, "reduce_scatter", 4 * weights, 2)
    work = {phase: sum(float(found.phases[phase, name][0]) * count
                       for name, count in (("dense", 8), ("first", 1), ("last", 1)))
            for phase in ("forward", "recompute", "backward", "weights")}  # fmt: skip
    back = work["recompute"] + work["backward"] + work["weights"]

    def left(seconds: float, window: float) -> float:
        """What does not hide, and a tenth of what does."""
        over = max(0.0, seconds - window)
        return over + 0.1 * (seconds - over)

    # forward: gathered; backward: gathered again, and gradients summed; of the first layer nothing hides
    every = (
        micro_batches * (left(gather, work["forward"]) + left(gather + scatter, back))
        + (gather + scatter) / 8
    )
    once = sum(left(part * 7 / 8, window) + part / 8
               for part, window in ((gather, work["forward"]), (scatter, back)))  # fmt: skip
    assert found.parts["sharding messages"][0] == pytest.approx(every, rel=1e-9)
    assert found.parts["sharding messages"][1] == pytest.approx(once, rel=1e-9)
    summed = left(gather * 7 / 8, work["forward"]) + gather / 8
    summed += micro_batches * left(scatter, back) + scatter / 8
    assert found.parts["sharding messages"][2] == pytest.approx(summed, rel=1e-9)


def test_replicas_sum_their_shards():
    software = replace(OURS, overlaps_gradients=False, overlaps_weights=False)
    made = eight(software=software, count=16)
    found = seconds_of(made, {"dp_shard": 4, "zero": 1}, {"dp_shard": 4, "dp_replicate": 4, "zero": 1})
    weights = 8 * LAYER + FIRST + LAST
    more = messages(made, "all_reduce", 4 * weights / 4, 4, 4)
    assert np.diff(found.parts["sharding messages"])[0] == pytest.approx(more, rel=1e-9)


def test_an_update_touches_a_ranks_weights_and_adds_up_micro_batches():
    weights = 8 * LAYER + FIRST + LAST
    made = eight(batch=3)
    found = seconds_of(made, {"micro_batch": 3}, {"micro_batch": 1}, {"micro_batch": 1, "dp_shard": 3})
    copy = made.pricer.hardware.accelerator.copy
    each = (UPDATE_BYTES + 4 * 3) * weights / copy  # AdamW, and gradients clipped
    adds = 12 * weights / copy  # an fp32 gradient to those before: read twice, written once
    assert found.parts["update"].tolist() == pytest.approx([each, each + 2 * adds, each / 3], rel=1e-9)
    once = replace(made, pricer=replace(made.pricer, software=MEGATRON_CORE))
    assert float(seconds_of(once, {}).parts["update"][0]) == pytest.approx(each, rel=1e-9)
    # with the optimizer alone sharded, every rank clips whole gradients
    found = seconds_of(once, *({"dp_shard": 2, "zero": zero} for zero in (0.0, 1.0, 2.0)))
    halves = [each, (UPDATE_BYTES / 2 + 4 * 3) * weights / copy, each / 2]
    assert found.parts["update"].tolist() == pytest.approx(halves, rel=1e-9)


def test_mfu_is_model_flops_over_all_accelerators_at_their_peak():
    made = eight(batch=64)
    found = seconds_of(made, {"dp_shard": 4, "pp": 2})
    # 2 FLOPs a weight forward, twice that backward, without the embedding; and causal attention half
    a_token = 6 * (8 * (LAYER - 64) + 64 * 32) + 8 * 3 * 2 * 2 * 32 * (TOKENS + 1) / 2
    flops = a_token * 64 * TOKENS
    assert made.model_flops == pytest.approx(flops, rel=1e-3)
    peak = 8 * made.pricer.hardware.accelerator.bf16
    assert float(found.mfu(made)[0]) == pytest.approx(made.model_flops / (float(found.seconds[0]) * peak))
    choice = all_refined(made, Layouts.of([{"dp_shard": 4, "pp": 2}]), True)[0]
    assert choice.mfu == pytest.approx(made.model_flops / (choice.seconds * peak))
    assert choice.ranks == 8 and choice.micro_batches == 16


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved_1f1b", *ZERO_BUBBLE])
def test_many_micro_batches_take_a_timeline_of_few_and_the_slowest_rank_for_the_rest(schedule):
    """Against the whole timeline, in which every micro-batch is run."""
    chunks = 1 if schedule in ("gpipe", "1f1b") else 2
    made = eight(batch=60, num_layers=9)
    row = {
        "pp": 3,
        "schedule": schedule,
        "stages_per_rank": chunks,
        "recompute": "full",
        "recompute_layers": 1,
    }
    found = seconds_of(made, row)
    cut = made.shape(schedule, 3, chunks)
    of = {phase: [float(found.phases[phase, "dense"][0]) * float(count) for count in cut.by_stage[:, 0]]
          for phase in ("forward", "backward", "weights")}  # fmt: skip
    for phase, seconds in of.items():
        seconds[0] += float(found.phases[phase, "first"][0])
        seconds[-1] += float(found.phases[phase, "last"][0])
    again = float(found.phases["recompute", "dense"][0])  # of the first layer of each stage
    back = [seconds + again for seconds in of["backward"]]
    whole = timeline(schedule, 3, chunks, 60, of["forward"], back, of["weights"], float(found.send[0]))
    exact = exact_pipeline(made, Layouts.of([row]).row(0), found, 0)
    assert exact == pytest.approx(whole.seconds, rel=0.04)


def test_a_bubble_is_what_the_busiest_rank_waits():
    # two ranks, stages of unequal work are not asked for: 2 micro-batches, F=1 and B=2, by hand
    assert bubble("1f1b", 2, 1, 2, 1.0, 1.0, 1.0) == 3.0
    # fewer micro-batches than the schedule is written for: ZBV leaves the others out
    for micro_batches in (1, 2, 3, 5):
        line = timeline("zbv_zero_bubble", 3, 2, micro_batches, [1.0] * 6, [1.0] * 6, [1.0] * 6)
        assert line.busy.tolist() == [6.0 * micro_batches] * 3
        assert line.seconds >= 6 + 6 + 3 * (micro_batches - 1)
    # a backward pass waits for that of the next stage: one micro-batch goes there and back
    line = timeline("1f1b", 3, 1, 1, [1.0, 2.0, 3.0], [1.0, 1.0, 1.0], [0.5, 0.5, 0.5], send=0.25)
    assert line.seconds == 6 + 3 * 1.5 + 4 * 0.25


# ---------------------------------------------------------------------- messages of a layer


def sent(ledger, phase: str, kind: str, stream: str) -> float:
    rows = ledger.where(phase=phase, kind=kind, stream=stream)
    return float((ledger.sent[rows] * ledger.repeat[rows]).sum())


@pytest.mark.parametrize("recompute", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("tp", [1.0, 2.0])
@pytest.mark.parametrize("software", [OURS, MEGATRON_CORE], ids=lambda software: software.name)
def test_context_gathers_keys_and_values_and_sums_their_gradients(software, tp, recompute):
    """Ours keeps what was gathered, unless it recomputes; others gather once more for the gradients."""
    ledger = layers_ledger(tiny("llama3.1-8b"), piece(64, 3.0, cp=4.0, tp=tp, recompute=recompute), software)
    keys = 3 * 64 * 2 * 2 * 8 / tp * 2  # all tokens; keys and values; two heads of 8, in two bytes
    assert sent(ledger, "forward", "all_gather", "cp") == keys
    assert sent(ledger, "backward", "all_gather", "cp") == (0.0 if software is OURS else keys)
    assert sent(ledger, "backward", "reduce_scatter", "cp") == keys
    again = recompute >= 1 if software is OURS else recompute == 2
    assert sent(ledger, "recompute", "all_gather", "cp") == (keys if again else 0.0)


@pytest.mark.parametrize("recompute", [0.0, 2.0])
def test_tokens_go_to_their_experts_and_come_back(recompute):
    arch = tiny("mixtral-8x7b")  # two of eight experts a token
    ledger = layers_ledger(arch, piece(64, 3.0, ep=4.0, tp=2.0, recompute=recompute), OURS)
    there = 3 * 64 * 2 * 32 * 2 / 2  # a rank of tp sends its half of the tokens
    for phase in ("forward", "backward", *(["recompute"] if recompute else [])):
        assert sent(ledger, phase, "all_to_all", "ep") == 2 * there
    products = ledger.where(name="moe.experts.w_up", phase="forward")
    # of 4 ranks' tokens, two visits each, an eighth to each of the two experts that are here
    assert ledger.m[products, 0].tolist() == [3 * 64 / 2 * 2 * 4 / 8] and ledger.count[products, 0] == [2]


def test_selective_recomputation_makes_what_lies_between_products_again():
    """Attention too, where it is plain products, of which there are tokens x tokens."""
    arch = tiny("llama3.1-8b")
    for software, is_again in ((replace(OURS, fused_attention=False), True), (OURS, False)):
        ledger = layers_ledger(arch, piece(64, 1.0, recompute=1.0), software)
        again = set(ledger.name[(ledger.phase == "recompute") & (ledger.repeat[:, 0] > 0)].tolist())
        assert ({"attention.scores", "attention.values"} <= again) == is_again
        assert "attention_norm" in again
        assert not any(name.endswith((".wq", ".wo", "w_up", "w_down")) for name in again)


def test_products_are_divided_over_tp_where_their_weights_are():
    ledger = layers_ledger(tiny("llama3.1-8b"), piece(64, 1.0, tp=2.0), OURS)
    shape = {name: tuple(float(column[i, 0]) for column in (ledger.m, ledger.n, ledger.k))
             for i, name in enumerate(ledger.name)
             if ledger.phase[i] == "forward" and ledger.kind[i] == "product"}  # fmt: skip
    assert shape["attention.wq"] == (64, 16, 32) and shape["attention.wo"] == (64, 32, 16)
    assert shape["mlp.w_up"] == (64, 24, 32) and shape["mlp.w_down"] == (64, 32, 24)


# ---------------------------------------------------------------------- a processor's best rate


def on_processor(ranks: int, best: float):
    """A processor of 100 GFLOP/s; its products were timed at `best`, in a quicker moment."""
    made = eight(batch=4, hidden_size=256, num_heads=8, num_kv_heads=8, head_dim=32, intermediate_size=1024)
    pool = made.pricer.hardware.pools[0]
    part = replace(pool.accelerator, name="cpu", device="cpu", bf16=1e11, fp32=1e11, fp8=0.0, copy=1e12,
                   reachable=1.0, shared_by=ranks)  # fmt: skip
    shapes = [
        (float(m), float(n), float(k), 1.0) for m in (512, 4096) for n in (256, 1024) for k in (256, 1024)
    ]
    ratios = {("product", "", "bf16", phase): [(shape, 1e11 / best) for shape in shapes]
              for phase in ("forward", "backward", "weights")}  # fmt: skip
    found = Corrections.of(ratios, best={"bf16": best})
    pool = replace(pool, accelerator=part)
    return replace(made, pricer=replace(made.pricer, corrections=found)).on(
        replace(made.pricer.hardware, pools=(pool,), node_size=8)
    )


@pytest.mark.parametrize("best", [0.5e11, 1e11, 4e11])
@pytest.mark.parametrize("ranks", [1, 2])
def test_mfu_of_a_processor_is_never_above_its_best_measured_rate(ranks, best):
    made = on_processor(ranks, best)
    assert made.peak == max(best, 1e11) / ranks
    one = Layouts.of([{"dp_shard": ranks}])
    assert 0.05 < float(estimate(made, one).mfu(made)[0]) < 1.0
    assert all_refined(made, one, True)[0].mfu < 1.0
    # however quick an interpolated ratio says that a product is
    found = made.pricer.corrections
    surfaces = {key: replace(surface, ratios=surface.ratios - 5) for key, surface in found.surfaces.items()}
    quick = replace(found, surfaces=surfaces)
    hasty = replace(made, pricer=replace(made.pricer, corrections=quick))
    assert float(estimate(hasty, one).mfu(hasty)[0]) < 1.0


def test_ranks_that_share_a_processor_take_as_long_as_one_after_the_other():
    one, two = (on_processor(ranks, 1e11) for ranks in (1, 2))
    found = [float(seconds_of(made, {"micro_batch": 2}).parts["products"][0]) for made in (one, two)]
    assert found[1] == pytest.approx(2 * found[0])
