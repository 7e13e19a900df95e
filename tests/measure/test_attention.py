"""Attention is computed in the way that was timed to be quicker, once for each shape and type."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from colossus.architecture import Architecture
from colossus.measure import attention
from colossus.measure.attention import attention_seconds, fused_is_quicker
from colossus.models import build
from colossus.models.attend import attend
from tests.perf.tiny import tiny


def arch() -> Architecture:
    return tiny("llama3.2-1b")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLOSSUS_CACHE", str(tmp_path))


@pytest.mark.parametrize(
    ("fused", "products", "taken"), [(0.5, 1.0, True), (0.95, 1.0, False), (2.0, 1.0, False)]
)
def test_it_is_timed_once_and_taken_where_it_is_plainly_quicker(
    fused: float, products: float, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "attention_seconds", lambda *_: {True: fused, False: products})
    assert fused_is_quicker(arch(), 128, "fp32", 1, "cpu") is taken
    monkeypatch.setattr(attention, "attention_seconds", lambda *_: pytest.fail("it was kept"))
    assert fused_is_quicker(arch(), 128, "fp32", 1, "cpu") is taken


def test_by_shape_type_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[tuple[int, torch.dtype, int]] = []

    def seconds(arch: Architecture, seq_len: int, dtype: torch.dtype, threads: int) -> dict[bool, float]:
        timed.append((seq_len, dtype, threads))
        return {True: 1.0, False: 1.0}

    monkeypatch.setattr(attention, "attention_seconds", seconds)
    for case in [(128, "fp32", 1), (128, "bf16", 1), (256, "fp32", 1), (128, "fp32", 2)]:
        fused_is_quicker(arch(), *case, "cpu")
    assert len(set(timed)) == 4
    timed.clear()
    fused_is_quicker(arch(), 128, "fp32", 1, "cpu")
    assert not timed


@pytest.mark.parametrize(
    ("seq_len", "kind", "device", "changed"),
    [
        (4096, "fp32", "cpu", {}),  # there the kernel is taken anyway
        (1, "fp32", "cpu", {}),
        (128, "fp32", "cuda", {}),
        (128, "fp64", "cpu", {}),
        (128, "fp32", "cpu", {"attention_soft_cap": 30.0}),  # which the kernel does not know
    ],
)
def test_where_there_is_no_choice_nothing_is_timed(
    seq_len: int, kind: str, device: str, changed: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "attention_seconds", lambda *_: pytest.fail("there is no choice"))
    assert not fused_is_quicker(arch().model_copy(update=changed), seq_len, kind, 1, device)


def test_both_are_timed_and_the_threads_stay() -> None:
    before = torch.get_num_threads()
    found = attention_seconds(arch(), 64, torch.float32, 1)
    assert set(found) == {True, False} and all(0 < seconds < 60 for seconds in found.values())
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("masked", [False, True])
def test_both_compute_the_same(masked: bool) -> None:
    q, k, v = (torch.randn(2, heads, 48, 16, dtype=torch.float64) for heads in (4, 2, 2))
    mask = torch.ones(48, 48, dtype=torch.bool).tril().triu(-9) if masked else None
    torch.testing.assert_close(
        attend(q, k, v, mask, fused=True), attend(q, k, v, mask), rtol=1e-12, atol=1e-12
    )


def test_a_model_takes_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(arch(), seed=0, dtype=torch.float64)
    tokens_BT = torch.arange(64).view(2, 32) % arch().vocab_size
    plain = model(tokens_BT)
    model.fused_attention = True
    monkeypatch.setattr("colossus.models.attend.attend_by_products", lambda *_: pytest.fail("not chosen"))
    torch.testing.assert_close(model(tokens_BT), plain, rtol=1e-10, atol=1e-10)
