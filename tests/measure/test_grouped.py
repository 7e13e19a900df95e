"""Products of experts are computed in the way that was timed to be quicker, and are the same either way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from colossus.measure import grouped
from colossus.measure.grouped import equal_is_quicker, grouped_seconds
from colossus.models.grouped import WASTE, _Places, grouped_product
from tests.perf.tiny import tiny

COUNTS = {"alike": [5, 5, 5, 5], "nearly": [5, 4, 6, 5], "apart": [0, 1, 0, 19], "one empty": [7, 0, 7, 6]}


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equal_groups_give_the_same(name: str, dtype: torch.dtype, near: float) -> None:
    ends = torch.tensor(COUNTS[name]).cumsum(0).int()
    few = 4 * max(COUNTS[name]) <= WASTE * 20
    assert _Places(ends, 20).are_few == few
    found = []
    for equal in (False, True):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(20, 8, generator=generator, dtype=dtype).requires_grad_()
        w = torch.randn(4, 12, 8, generator=generator, dtype=dtype).requires_grad_()
        y = grouped_product(x, w, ends, equal)
        found.append([y, *torch.autograd.grad(y.square().sum(), (x, w))])
    for grouped_, equal_ in zip(*found, strict=True):
        torch.testing.assert_close(equal_, grouped_, rtol=near, atol=near * 10)


def test_no_rows_at_all() -> None:
    ends = torch.zeros(4, dtype=torch.int32)
    assert grouped_product(torch.ones(0, 8), torch.ones(4, 12, 8), ends, True).shape == (0, 12)


def test_it_is_timed_once_for_experts_on_a_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLOSSUS_CACHE", str(tmp_path))
    mixture = tiny("deepseek-v3")
    monkeypatch.setattr(grouped, "grouped_seconds", lambda *_: {True: 0.6, False: 1.0})
    assert equal_is_quicker(mixture, "fp32", 1, "cpu")
    monkeypatch.setattr(grouped, "grouped_seconds", lambda *_: pytest.fail("it was kept, or is no choice"))
    assert equal_is_quicker(mixture, "fp32", 1, "cpu")
    assert not equal_is_quicker(mixture, "fp32", 1, "cuda")
    assert not equal_is_quicker(tiny("llama3.2-1b"), "fp32", 1, "cpu")


def test_both_are_timed() -> None:
    found = grouped_seconds(4, 8, 16, 32, torch.float32, 1)
    assert set(found) == {True, False} and min(found.values()) > 0
