"""The rows of one micro-batch through one layer and both ends, worked out by hand, and what they take.

Width 32, 4 heads of 8 over 2 of keys and values, feed-forward 48; 64 tokens in the vocabulary; two samples of
64 tokens in bf16.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from colossus.perf import communication as comm
from colossus.perf.corrections import Corrections
from colossus.perf.ledger import Ledger, Row
from colossus.perf.passes import OVERLAP_COST, TOGETHER
from colossus.perf.price import BACKWARD_PASSES, CLIP_BYTES, DEPTH, GAP, KEYS, Pricer
from colossus.perf.software import MEGATRON_2021, MEGATRON_CORE, OURS, OURS_EAGER
from colossus.planner.columns import Layouts
from colossus.planner.estimate import estimate, groups_of, kind_weights
from colossus.planner.formulas import layers_ledger
from colossus.planner.muon import muon_update, shown_seconds
from tests.perf.tiny import tiny
from tests.planner.problems import hardware, problem
from tests.planner.test_formulas import piece

T = 2 * 64  # tokens of the micro-batch
D, F, V = 32, 48, 64
ARCH = tiny("llama3.1-8b", vocab_size=V)


def rows(software=OURS, precision: str = "bf16", arch=ARCH, **axes: float) -> Ledger:
    return layers_ledger(arch, piece(64, 2.0, **axes), software, precision)


def of(ledger: Ledger, column: str, **words: str) -> float:
    return float(ledger.total(column, **words)[0])


# ---------------------------------------------------------------------- messages of tensor parallelism


@pytest.mark.parametrize("recompute", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("software", [OURS, MEGATRON_CORE], ids=lambda software: software.name)
def test_tensor_parallelism_sends_the_activations_of_attention_mlp_and_ends(software, recompute):
    ledger = rows(software, tp=2.0, recompute=recompute)
    tensor = T * D * 2
    ours = software is OURS
    # Ours gathers again what selective recomputation did not keep, and does not sum what nothing asks for.
    again = {0.0: (0, 0), 1.0: (2, 0), 2.0: (2, 1)} if ours else {0.0: (0, 0), 1.0: (0, 0), 2.0: (2, 2)}
    for phase, times in (("forward", (2, 2)), ("recompute", again[recompute]), ("backward", (2, 2))):
        for kind, number in zip(("all_gather", "reduce_scatter"), times, strict=True):
            assert of(ledger, "sent", stage="dense", stream="tp", phase=phase, kind=kind) == number * tensor
    # others gather once more for the gradients of weights what the products read
    more = of(ledger, "sent", stage="dense", phase="weights", stream="tp_hidden")
    assert more == (0 if ours else 2 * tensor)
    ends = {("first", "forward"): "reduce_scatter", ("first", "backward"): "all_gather",
            ("last", "forward"): "all_gather", ("last", "backward"): "reduce_scatter"}  # fmt: skip
    for (stage, phase), kind in ends.items():
        assert of(ledger, "sent", stage=stage, stream="tp", phase=phase) == tensor
        assert of(ledger, "sent", stage=stage, stream="tp", phase=phase, kind=kind) == tensor
    assert not of(rows(), "sent")


def test_without_sequence_parallelism_whole_activations_are_summed():
    ledger = rows(MEGATRON_CORE, tp=2.0, sp=0.0)
    for phase in ("forward", "backward"):
        assert of(ledger, "sent", stage="dense", phase=phase, kind="all_reduce") == 2 * T * D * 2
    assert not of(ledger, "sent", stage="dense", kind="all_gather")


def test_experts_that_tp_splits_gather_and_sum_what_arrives():
    ledger = rows(arch=tiny("mixtral-8x7b", num_kv_heads=4), tp=2.0, etp=2.0, ep=2.0)
    visits = T * 2 * D * 2  # two experts a token
    for phase in ("forward", "backward"):
        for kind in ("all_gather", "reduce_scatter"):
            assert of(ledger, "sent", stream="ep", phase=phase, kind=kind) == visits
    assert not of(rows(arch=tiny("mixtral-8x7b"), tp=2.0, ep=2.0), "sent", stream="ep", kind="all_gather")


# ---------------------------------------------------------------------- what moves memory


def test_what_lies_between_products_is_spread_over_tp_where_tokens_are():
    one, two, whole = rows(), rows(tp=2.0), rows(MEGATRON_CORE, tp=2.0, sp=0.0)
    other = rows(MEGATRON_CORE)
    for name in ("attention_norm", "mlp_norm", "mlp.gated", "attention.rotary"):
        words = {"name": name, "phase": "forward"}
        if not of(one, "bytes", **words):
            continue
        assert of(two, "bytes", **words) == of(one, "bytes", **words) / 2
        ranks = 1 if name.endswith("_norm") else 2
        assert of(whole, "bytes", **words) == of(other, "bytes", **words) / ranks
    assert of(one, "bytes", name="mlp_norm", phase="forward") > 0


def test_the_backward_pass_moves_half_as_much_again():
    ledger = rows()
    kinds = ledger.where(kind="elementwise")
    for name in set(ledger.name[kinds].tolist()):
        forward, back = (of(ledger, "bytes", name=name, phase=phase) for phase in ("forward", "backward"))
        assert back == pytest.approx(1.5 * forward)


def test_the_loss_reads_and_writes_logits_in_both_precisions():
    for tp in (1.0, 2.0):
        for phase in ("forward", "backward"):
            assert of(rows(tp=tp), "bytes", name="loss", phase=phase) == T * V / tp * (2 + 4 + 4)


def test_our_weights_are_cast_for_each_micro_batch_and_gradients_back():
    ledger = rows()
    for name, size in (("attention.wq", D * D), ("attention.wk", D * D / 2), ("mlp.w_down", D * F)):
        assert of(ledger, "bytes", name=f"{name} cast", phase="forward") == size * (4 + 2)
        assert of(ledger, "bytes", name=f"{name} gradient cast", phase="weights") == size * (4 + 2)
    assert not of(ledger, "bytes", name="head cast")
    assert not of(rows(precision="fp32"), "bytes", name="attention.wq cast")
    halves = rows(precision="fp8")
    assert of(halves, "bytes", name="attention.wq cast", phase="forward") == D * D * (4 + 1)


def test_float8_writes_every_operand_twice_in_a_byte():
    ledger = rows(MEGATRON_CORE, "fp8")
    assert of(ledger, "bytes", name="mlp.w_down to fp8", phase="forward") == 2 * T * F
    assert of(ledger, "bytes", name="mlp.w_down to fp8", phase="backward") == 2 * T * D
    eager = rows(OURS_EAGER, "fp8")
    assert of(eager, "bytes", name="mlp.w_down to fp8", phase="forward") == 4 * T * F
    products = ledger.where(kind="product")
    assert {ledger.precision[i] for i in np.nonzero(products)[0] if ledger.stage[i] == "last"} == {"bf16"}


def test_programs_that_add_gradients_apart_move_them_three_times():
    ledger = rows(MEGATRON_2021)
    assert of(ledger, "bytes", name="mlp.w_down gradient", phase="weights") == D * F * (4 + 4 + 2)
    product = of(rows(MEGATRON_CORE), "bytes", name="mlp.w_down", phase="weights")
    assert product == 2 * (T * D + T * F + D * F) + D * F * 2 * 4


def test_scores_that_are_written_are_scaled_masked_and_normalised():
    ledger = rows(MEGATRON_2021)
    area = 2 * 4 * 64 * 64 * 2  # of two samples' four heads, in two bytes
    assert of(ledger, "bytes", name="softmax", phase="forward") == 4 * area
    assert of(ledger, "bytes", name="softmax", phase="backward") == 5 * area
    assert not of(rows(), "bytes", name="softmax")


def test_products_read_both_operands_and_write_the_third():
    ledger = rows()
    for phase, more in (("forward", 0), ("backward", 0), ("weights", D * F * 2 * 4)):
        assert of(ledger, "bytes", name="mlp.w_up", phase=phase) == 2 * (T * D + D * F + T * F) + more
        assert of(ledger, "executed", name="mlp.w_up", phase=phase) == 2 * T * D * F


def test_the_weights_of_a_layer_by_what_divides_them():
    assert kind_weights(ARCH, "dense") == (2 * D, 3 * D * D + 3 * D * F, 0.0)
    assert kind_weights(ARCH, "first") == (0.0, V * D, 0.0)
    assert kind_weights(ARCH, "last") == (D, V * D, 0.0)
    assert kind_weights(ARCH.model_copy(update={"tie_embeddings": True}), "last") == (D, V * D, 0.0)
    whole, divided, experts = kind_weights(tiny("mixtral-8x7b"), "experts")
    assert experts == 8 * 3 * D * 24 and whole == 2 * D + 8 * D and divided == 3 * D * D


# ---------------------------------------------------------------------- seconds of rows


def seconds(pricer: Pricer, *several: Row) -> list[float]:
    return pricer.seconds(Ledger.of(several))[:, 0].tolist()


def test_attention_takes_what_its_keys_and_heads_allow():
    pricer = Pricer.of(hardware(), OURS, attention=0.5)
    part = hardware().accelerator
    m, n, count = 4096.0, 2048.0, 32.0
    made = {"stage": "x", "kind": "fused_attention", "m": m, "count": count}
    forward, narrow, back = seconds(
        pricer,
        Row("a", "forward", n=n, k=128.0, **made),
        Row("a", "forward", n=n, k=64.0, **made),
        Row("a", "backward", n=n * BACKWARD_PASSES, k=128.0, **made),
    )
    flops = 2 * m * n * 128 * count
    assert forward == pytest.approx(flops / (part.bf16 * 0.5 * n / (n + KEYS)))
    assert narrow == pytest.approx(forward / 2 / 0.5**0.25)
    assert back == pytest.approx(BACKWARD_PASSES * forward)
    older = replace(pricer, software=replace(OURS, flash="flash2"))
    assert seconds(older, Row("a", "forward", n=n, k=128.0, **made)) == [pytest.approx(forward / 0.6)]


def test_a_large_product_takes_what_long_runs_keep_of_the_best_rate():
    part = hardware().accelerator
    row = Row("x", "forward", "x", "product", m=128 * 132, n=256 * 16, k=8192)
    flops, depth = 2 * 128 * 132 * 256 * 16 * 8192, 8192 / (8192 + DEPTH)
    plain = Pricer.of(hardware(), OURS, hopper_products=0.8)
    assert seconds(plain, row) == [pytest.approx(flops / (part.bf16 * part.reachable * 0.8 * depth))]
    measured = replace(plain, corrections=Corrections({}, held=0.9))
    assert seconds(measured, row) == [pytest.approx(flops / (part.bf16 * part.reachable * 0.9 * depth))]
    # one of another machine of the kind says nothing about what is kept
    assert seconds(replace(plain, corrections=Corrections({})), row) == seconds(plain, row)


def test_an_update_reads_gradients_to_clip_them():
    part = hardware().accelerator
    for software in (OURS, replace(OURS, gradient_bytes=2.0)):
        took = Pricer.of(hardware(), software).update(np.array([1e9]), np.array([3e9]))
        clipped = 3e9 * software.gradient_bytes * CLIP_BYTES
        assert took.tolist() == [pytest.approx((34e9 + clipped) / part.copy)]


def test_device_and_host_take_more_than_the_longer_of_both():
    """Of the layer's forward pass: rows one by one, gaps between kernels, and a host that starts each."""
    made = replace(problem("llama3.2-1b", seq_len=64, batch=2), arch=ARCH)
    made = replace(made, pricer=replace(made.pricer, software=OURS_EAGER))
    found = estimate(made, Layouts.of([{"micro_batch": 2}]))
    ledger = rows(OURS_EAGER)
    mine = ledger.where(stage="dense", phase="forward", stream="compute")
    each = made.pricer.seconds(ledger.take(mine))[:, 0]
    kernels = ledger.launches[mine, 0].sum()
    device, host = each.sum() + GAP * kernels, made.pricer.dispatch() * kernels
    assert host > 0.9 * device, "a tiny layer waits for the host as long as for the device"
    together = (device**TOGETHER + host**TOGETHER) ** (1 / TOGETHER)
    assert float(found.phases["forward", "dense"][0]) == pytest.approx(together, rel=1e-9)


@pytest.mark.parametrize("hidden", [0.0, 1.0])
def test_what_hides_behind_products_takes_a_tenth_of_itself(hidden):
    software = replace(OURS, graphs=True, tp_hidden=hidden, cp_hidden=hidden)
    made = replace(problem("llama3.2-1b", seq_len=64, batch=2), arch=ARCH)
    made = replace(made, pricer=replace(made.pricer, software=software))
    layouts = Layouts.of([{"tp": 2, "cp": 2, "micro_batch": 2}])
    found = estimate(made, layouts)
    ledger = rows(software, tp=2.0, cp=2.0)
    ones = {name: np.ones(1) for name in ("dp_replicate", "dp_shard", "pp", "ep", "etp")}
    groups = comm.groups_of(ones | {"tp": 2 * np.ones(1), "cp": 2 * np.ones(1)}, OURS.order)
    took = made.pricer.seconds(ledger, groups) * ledger.repeat

    def stream(name: str, phase: str) -> float:
        return float(took[ledger.where(stage="dense", phase=phase, stream=name)].sum())

    attention = float(took[ledger.where(stage="dense", phase="forward", kind="fused_attention")].sum())
    forward = stream("compute", "forward")  # kernels are replayed: no host, no gaps
    # of two pieces all but the first hides
    forward += stream("tp", "forward") * (1 - hidden / 2 * (1 - OVERLAP_COST))
    forward += max(0.0, stream("cp", "forward") - hidden * attention)
    assert float(found.phases["forward", "dense"][0]) == pytest.approx(forward, rel=1e-9)


def test_muon_sends_matrices_in_fp32_to_owners_that_make_fifteen_products_of_each():
    """One dense layer: 2 of 32 x 32, 2 of 16 x 32, 3 of 32 x 48; see `muon.matrices`."""
    made = replace(problem("llama3.2-1b"), arch=tiny("llama3.1-8b", num_layers=1, vocab_size=V))
    ones = np.ones(1)
    axes = dict.fromkeys(("tp", "cp", "pp", "dp_replicate", "ep", "etp"), ones)
    shape = made.shape("1f1b", 1, 1)

    def took(**sizes: float) -> float:
        groups = comm.groups_of(
            {"dp_shard": ones} | axes | {k: v * ones for k, v in sizes.items()}, OURS.order
        )
        layouts = Layouts.of([sizes])
        return float(muon_update(made.arch, layouts, shape, made.pricer, "bf16", groups).seconds[0])

    one, numel = {}, 0
    for (short, long), count in {(32, 32): 2, (16, 32): 2, (32, 48): 3}.items():
        several = [
            Row("muon", "forward", "x", "product", m=m, n=n, k=k, bytes=2 * (m * k + n * k + 2 * m * n))
            for m, n, k in ((short, short, long), (short, short, short), (short, long, short))
        ]
        one[short, long] = count, 5 * sum(seconds(made.pricer, *several))
        numel += count * short * long
    everything = sum(count * each for count, each in one.values())
    assert took() == pytest.approx(everything, rel=1e-9)

    def message(sent: float, size: float) -> float:
        return float(made.pricer.messages("all_to_all", np.array([sent]), comm.Group(size * ones, ones))[0])

    # There and back, a rank's part of all; among more ranks than matrices an owner is sent a whole one.
    assert took(dp_shard=4.0) == pytest.approx(everything / 4 + 2 * message(4 * numel / 4, 4.0), rel=1e-9)
    longest = max(each for _, each in one.values())
    assert took(dp_shard=64.0) == pytest.approx(longest + 2 * message(4 * 32 * 48, 64.0), rel=1e-9)
    assert took(dp_replicate=2.0) == pytest.approx(everything / 2 + message(4 * numel, 2.0), rel=1e-9)


def test_what_shows_of_muons_messages_is_what_no_work_hides():
    """Of one bucket both ways; of several the first one's way there, the last one's back, and what is longer
    than the work."""

    def shown(work: float, buckets: float) -> float:
        return float(shown_seconds(*(np.array([value]) for value in (2.0, 3.0, work, buckets)))[0])

    def hidden(seconds: float) -> float:
        return OVERLAP_COST * seconds

    assert shown(100.0, 1.0) == 5.0
    assert shown(100.0, 7.0) == 5.0 + hidden(30.0)
    assert shown(0.0, 4.0) == 4 * 5.0
    assert shown(2.5, 2.0) == 5.5 + hidden(4.5)  # the second goes there beside the first one's work
    assert shown(2.5, 4.0) == 5.5 + 2 * 2.5 + hidden(9.5)


def test_muons_experts_are_shared_by_replicas_and_sent_where_they_are_cut():
    """Eight experts a layer: whole ones on two ranks, parts of all on sixteen."""
    of = replace(problem("llama3.2-1b"), arch=tiny("mixtral-8x7b", num_layers=1, vocab_size=V))
    made = of.shape("1f1b", 1, 1)

    def update(**sizes: float) -> tuple[float, float]:
        layouts = Layouts.of([sizes])
        groups = groups_of(of, layouts)
        found = muon_update(of.arch, layouts, made, of.pricer, "bf16", groups)
        return float(found.work[0]), float(found.messages[0])

    alone, _ = update()
    copies, sent = update(dp_replicate=2)
    assert copies == pytest.approx(alone / 2, rel=0.02) and sent > 0
    by_ep, by_fsdp = update(dp_shard=2, ep=2), update(dp_shard=2)
    assert by_ep == by_fsdp  # either way four experts each
    whole, cut = update(dp_shard=8)[1], update(dp_shard=16)[1]
    assert cut > 1.5 * whole  # these travel too
