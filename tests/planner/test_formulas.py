"""The ledger from formulas: its FLOPs are the counter's on real models; layouts divide work and lose none."""

from __future__ import annotations

import numpy as np
import pytest

from colossus.measure.counter import flop_counter
from colossus.models import build
from colossus.perf.flops import model_flops_per_token, saved_bytes_per_token
from colossus.perf.ledger import COMMUNICATION
from colossus.perf.parts import FUSED, kernel_of
from colossus.perf.software import MEGATRON_CORE, OURS, OURS_EAGER
from colossus.planner.formulas import Piece, layer_counts, layers_ledger
from tests.models.reference import random_tokens
from tests.perf.tiny import PRESETS, tiny

TOKENS, BATCH = 24, 2


def piece(seq_len: int = TOKENS, sequences: float = BATCH, **axes: float) -> Piece:
    plain = {"tp": 1.0, "cp": 1.0, "ep": 1.0, "etp": 1.0, "sp": 1.0, "recompute": 0.0} | axes
    return Piece(np.array([sequences]), *(np.array([v]) for v in plain.values()), seq_len)


def total(ledger, arch, column, **words):
    """Over the whole model: each kind of layer as often as there are layers of it."""
    counts = {kind: len(layers) for kind, layers in layer_counts(arch).items()} | {"first": 1, "last": 1}
    return sum(
        count * float(ledger.total(column, stage=stage, **words)[0]) for stage, count in counts.items()
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_flops_are_what_pytorch_counts_on_the_real_model(preset):
    arch = tiny(preset)
    model, tokens_BT = build(arch, seed=0), random_tokens(arch, BATCH, TOKENS)
    with flop_counter() as counter:
        model(tokens_BT).logsumexp(-1).sum().backward()
    for software in (OURS, MEGATRON_CORE):  # with products of one input apart, and in one
        ledger = layers_ledger(arch, piece(), software, "fp32", kernel_of(arch, TOKENS, "cpu"))
        assert total(ledger, arch, "executed") == pytest.approx(counter.get_total_flops(), rel=1e-12)


@pytest.mark.parametrize("preset", PRESETS)
def test_model_flops_are_those_of_mfu(preset):
    arch = tiny(preset)
    ledger = layers_ledger(arch, piece(), OURS, "bf16")
    assert total(ledger, arch, "model") == pytest.approx(
        model_flops_per_token(arch, TOKENS) * BATCH * TOKENS, rel=1e-12
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_saved_bytes_are_those_of_the_table_of_parts(preset):
    arch = tiny(preset)
    ledger = layers_ledger(arch, piece(), OURS_EAGER, "bf16")
    assert total(ledger, arch, "saved") == pytest.approx(
        saved_bytes_per_token(arch, TOKENS, kernel=FUSED, type_bytes=2) * BATCH * TOKENS, rel=1e-12
    )


@pytest.mark.parametrize(
    "axes",
    [{"tp": 2.0}, {"cp": 2.0}, {"tp": 2.0, "cp": 4.0}, {"ep": 2.0}, {"tp": 2.0, "etp": 2.0, "ep": 4.0}],
)
def test_a_layout_divides_work_and_loses_none(axes):
    arch = tiny("mixtral-8x7b", num_kv_heads=4)
    whole = layers_ledger(arch, piece(), OURS, "bf16")
    part = layers_ledger(arch, piece(**axes), OURS, "bf16")
    ranks = axes.get("tp", 1.0) * axes.get("cp", 1.0)  # ep ranks are among those that have other tokens
    assert ranks * total(part, arch, "executed") == pytest.approx(total(whole, arch, "executed"), rel=1e-12)
    products = part.where(kind="product")
    shapes = 2 * part.m * part.n * part.k * part.count
    counted = np.where(part.phase == "forward", 1.0, 1.0)[:, None] * part.executed
    assert np.allclose(shapes[products], counted[products], rtol=1e-9), "shapes and FLOPs of a product differ"


def test_recomputation_repeats_the_forward_pass_and_keeps_less():
    arch = tiny("llama3.1-8b")
    plain, again = (layers_ledger(arch, piece(recompute=r), OURS, "bf16") for r in (0.0, 2.0))
    forward = total(plain, arch, "executed", phase="forward") - float(
        plain.total("executed", stage="last", phase="forward")[0]
    )
    last = float(plain.total("executed", name="mlp.w_down", phase="forward")[0]) * arch.num_layers
    assert total(again, arch, "executed", phase="recompute") == pytest.approx(forward - last, rel=1e-12)
    assert total(again, arch, "saved") < 0.2 * total(plain, arch, "saved")


def test_messages_carry_the_published_bytes():
    # Megatron-LM, Korthikanti et al. 2022: tensor and sequence parallelism gather and scatter the activations
    # twice a layer, forward and backward: [sequences, seq_len, hidden] in two bytes.
    arch = tiny("llama3.1-8b")
    ledger = layers_ledger(arch, piece(tp=2.0), OURS, "bf16")
    tensor = BATCH * TOKENS * arch.hidden_size * 2
    for phase in ("forward", "backward"):
        rows = ledger.where(stage="dense", phase=phase, stream="tp", kind=COMMUNICATION)
        assert float((ledger.sent[rows] * ledger.repeat[rows]).sum()) == 4 * tensor
    assert not float(layers_ledger(arch, piece(), OURS, "bf16").total("sent", kind=COMMUNICATION)[0])


def test_muon_takes_what_its_products_take():
    """Of one dense layer: five rounds of three products for each of its matrices, counted by hand."""
    from colossus.planner.muon import matrices

    arch = tiny("llama3.1-8b")  # width 32, 4 heads of 8 over 2 of keys, feed-forward 48
    assert matrices(arch, "dense") == {(32, 32, False): 2, (16, 32, False): 2, (32, 48, False): 3}
    experts = matrices(tiny("mixtral-8x7b"), "experts")
    assert experts[24, 32, True] == 3 * 8


def test_rows_of_experts_are_made_again_but_where_ranks_exchange_them():
    """Of selective recomputation: what goes to experts and what comes back are messages under `ep`."""
    arch = tiny("mixtral-8x7b")
    kept = {}
    for ep in (1.0, 2.0):
        ledger = layers_ledger(arch, piece(recompute=1.0, ep=ep), OURS, "bf16")
        rows = ledger.where(phase="forward") & np.isin(ledger.name, ("moe.experts.rows", "moe.experts.sum"))
        kept[ep] = float(ledger.saved[rows].sum())
    both = 2 * TOKENS * BATCH * arch.experts.per_token * arch.hidden_size * 2
    assert kept == {1.0: 0.0, 2.0: both}
